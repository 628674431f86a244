"""FuxiCTR: the DIEN of the model zoo that its wheel holds, LongCTR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from model_zoo.LongCTR.DIEN.DIEN import DIEN, AGRUCell, AttentionLayer, AUGRUCell, DynamicGRU
from torch import Tensor, nn

from recattn.swap.coverage import Options, Swap, Uncovered, expect, expect_own, instead_of
from recattn.swap.fuxictr import result_dtype, scorer_of, valid_of
from recattn.swap.histories import MEAN, ZERO, Padded, attend, by_length, remarks
from recattn.swap.recurrences import Histories, Recurrence
from recattn.swap.scorers import Scorer

__all__ = ["SWAPS", "FusedAttentionLayer", "FusedDIEN"]

CELLS = {"AGRU": AGRUCell, "AUGRU": AUGRUCell}


class FusedDIEN(DIEN):
    """`DIEN` whose GRUs run over the items that count, without a loop over steps in Python.

    As in the library a history is the first positions of its row, as many as its mask has ones, whichever they are.
    """

    @instead_of(DIEN.interest_extraction)
    def interest_extraction(self, idx: int, sequence_emb: Tensor, mask: Tensor) -> tuple[None, Tensor]:
        """The states `[b, L, D]`, 0 in the padding. In place of the packed ones that the library returns too, None:
        `interest_evolution` is their only reader."""
        recurrence = _extraction(self, idx)
        _evolution(self, idx)
        histories = Histories(sequence_emb, _first(mask))
        states, _ = recurrence.run(histories)
        return None, histories.pad(states)

    @instead_of(DIEN.interest_evolution)
    def interest_evolution(
        self,
        idx: int,
        packed_interests: None,  # noqa: ARG002
        interest_emb: Tensor,
        target_emb: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """The final states, `[b, D]`."""
        _extraction(self, idx)
        recurrence = _evolution(self, idx)
        histories = Histories(interest_emb, _first(mask))
        if self.gru_type == "GRU":
            return recurrence.run(histories)[1]
        return recurrence.run(histories, self.attention_modules[idx](interest_emb, target_emb, mask))[1]


class FusedAttentionLayer(AttentionLayer):
    r"""`AttentionLayer`, whose bilinear form projects the target and not the history: `k^T W q = k · (W q)`."""

    @instead_of(AttentionLayer.forward)
    def forward(self, sequence_emb: Tensor, target_emb: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention `[B, L]` of `target_emb [B, D]` to `sequence_emb [B, L, D]`."""
        expect_own("forward", self)
        batch, longest, width = sequence_emb.shape
        if target_emb.shape != (batch, width) or longest == 0:
            raise Uncovered(f"target_emb: {tuple(target_emb.shape)}")
        valid = valid_of(mask, sequence_emb)
        normalize = "softmax" if self.use_attention_softmax else "none"
        options = Options.of(self)
        if self.attention_type == "din_attention":
            scores = attend(
                _scorer(self),
                target_emb,
                Padded(sequence_emb, valid),
                options,
                normalize=normalize,
                empty=MEAN if self.use_attention_softmax else ZERO,
                return_scores=True,
            )
            return scores.to(result_dtype(scores, sequence_emb, mask))
        if self.attention_type == "bilinear_attention":
            target_emb = target_emb @ self.W_kernel.t()
        scores = torch.bmm(sequence_emb, target_emb.unsqueeze(2)).squeeze(2)
        scores = scores.to(result_dtype(scores, scores, mask))
        if valid is None:
            return scores.softmax(1) if normalize == "softmax" else scores
        if normalize == "none":
            return scores.masked_fill(~valid, 0)
        attention = scores.masked_fill(~valid, -1e9).softmax(1)
        return attention if options.exact else attention.masked_fill(~valid, 0)


def _first(mask: Tensor) -> Tensor:
    lengths = mask.sum(1)
    if bool((lengths < 1).any()):  # which the library removes before
        raise Uncovered("mask: an empty history")
    return by_length(lengths, mask.shape[1])


def _extraction(model: DIEN, idx: int) -> Recurrence:
    for method in ("interest_extraction", "interest_evolution"):
        expect_own(method, model)
    return Recurrence.of_gru(f"extraction_modules.{idx}", model.extraction_modules[idx])


def _evolution(model: DIEN, idx: int) -> Recurrence:
    name, module = f"evolving_modules.{idx}", model.evolving_modules[idx]
    if model.gru_type == "GRU":
        return Recurrence.of_gru(name, module)
    if model.gru_type not in CELLS:
        raise Uncovered(f"{model.gru_type}, which the library's own code fails at")
    expect(name, module, DynamicGRU)
    cell = module.gru_cell
    expect(f"{name}.gru_cell", cell, CELLS[model.gru_type])
    parts: list[Tensor] = []
    for linear in (cell.x2h, cell.h2h):
        expect(f"{name}.gru_cell", linear, nn.Linear)
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for part in (linear.weight, bias):
            update, reset, candidate = part.chunk(3)
            parts.append(torch.cat([reset, -update, candidate]))
    weight_ih, bias_ih, weight_hh, bias_hh = parts
    return Recurrence(model.gru_type.lower(), weight_ih, weight_hh, bias_ih, bias_hh)


def _scorer(layer: AttentionLayer) -> Scorer:
    scorer = scorer_of(layer.attn_mlp, "attn_mlp")
    if scorer.output != "identity":
        raise Uncovered(f"attn_mlp: {scorer.output} of the score is not built")
    return scorer


def _check_model(model: Any, _: Options) -> Sequence[str]:
    for idx in range(len(model.extraction_modules)):
        _extraction(model, idx)
        _evolution(model, idx)
    return ()


def _check_attention(layer: Any, options: Options) -> Sequence[str]:
    expect_own("forward", layer)
    empty = MEAN if layer.use_attention_softmax else ZERO
    if layer.attention_type == "din_attention":
        return remarks(_scorer(layer), options, empty)
    return ["an empty history gives 0"] if not options.exact and empty == MEAN else []


SWAPS = (
    Swap(DIEN, FusedDIEN, _check_model),
    Swap(AttentionLayer, FusedAttentionLayer, _check_attention),
)
