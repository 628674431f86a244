"""FuxiCTR: the target attentions of its layers, `DIN_Attention` and `MultiHeadTargetAttention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuxictr.pytorch.layers.activations import Dice
from fuxictr.pytorch.layers.attentions.dot_product_attention import ScaledDotProductAttention
from fuxictr.pytorch.layers.attentions.target_attention import DIN_Attention, MultiHeadTargetAttention
from fuxictr.pytorch.layers.blocks.mlp_block import MLP_Block
from torch import Tensor, nn
from torch.nn import functional as F

from recattn import functional
from recattn.backend import requested_backend
from recattn.jagged import offsets_of
from recattn.ops.library import on_cpu
from recattn.swap.coverage import Options, Swap, Uncovered, expect, expect_own, instead_of, leave_small
from recattn.swap.histories import IN_WORDS, MEAN, ZERO, Padded, attend, in_table, remarks, table_of
from recattn.swap.scorers import Gate, Scorer

__all__ = ["SWAPS", "FusedDINAttention", "FusedMultiHeadTargetAttention"]


class FusedDINAttention(DIN_Attention):
    """`DIN_Attention`, computed over the items that count and no others.

    As in the library, an empty history pools to 0, or with `use_softmax` to the mean of all its positions, and batch
    norm and Dice in training have statistics of all positions.
    """

    @instead_of(DIN_Attention.forward)
    def forward(self, target_item: Tensor, history_sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools the histories.

        Args:
            target_item: `[B, D]`.
            history_sequence: `[B, L, D]`.
            mask: `[B, L]`, of any dtype, 1 where an item counts, else 0.

        Returns:
            `[B, D]`; in float32 at least with a mask, which the library multiplies by in float32.
        """
        leave_small(history_sequence, Options.of(self), "activation_unit")
        _check_shapes(target_item, history_sequence)
        history = Padded(history_sequence, valid_of(mask, history_sequence))
        pooled = attend(_scorer(self), target_item, history, Options.of(self), **_pooling(self))
        return pooled.to(result_dtype(pooled, history_sequence, mask))


class FusedMultiHeadTargetAttention(MultiHeadTargetAttention):
    r"""`MultiHeadTargetAttention` over the items that count; on an accelerator without projections of the history.

    .. math:: (W_q q) \cdot (W_k k_t) = (W_k^T W_q q) \cdot k_t,\qquad \sum_t a_t W_v k_t = W_v \sum_t a_t k_t

    per head, so the heads are candidates that share the history as it is.
    """

    @instead_of(MultiHeadTargetAttention.forward)
    def forward(self, target_item: Tensor, history_sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools the histories; arguments as of `DIN_Attention`.

        Returns:
            `[B, D]`.
        """
        leave_small(history_sequence, Options.of(self), "target_attention")
        _check_multi_head(self)
        if self.training and self.dot_attention.dropout is not None:
            raise Uncovered("dropout of the attention is not built")
        _check_shapes(target_item, history_sequence)
        history = Padded(history_sequence, valid_of(mask, history_sequence))
        if not self.use_qkvo:
            layout = history.layout()
            pooled = functional.target_attention(
                target_item, values=layout["keys"], num_heads=self.num_heads, scale=_scale(self), **layout
            )
            assert isinstance(pooled, Tensor)
            return self._pooled(history, pooled)
        if on_cpu(target_item) and requested_backend() != "triton":
            return self.W_o(self._of_projected_items(target_item, history))
        return self.W_o(self._of_shared_items(target_item, history))

    def _of_projected_items(self, target: Tensor, history: Padded) -> Tensor:
        """Projects the items that count, which on a CPU takes less than candidates do."""
        batch, longest = history.keys.shape[:2]
        if history.valid is None:
            keys, offsets = history.keys.flatten(0, 1), torch.arange(batch + 1) * longest
        else:
            table, step = table_of(history.keys)
            rows = history.valid.flatten().nonzero().squeeze(1)
            keys = table.index_select(0, in_table(rows, longest, step))
            offsets = offsets_of(history.valid.sum(1))
        pooled = functional.target_attention(
            self.W_q(target),
            F.linear(keys, self.W_k.weight),
            F.linear(keys, self.W_v.weight),
            offsets,
            num_heads=self.num_heads,
            scale=_scale(self),
        )
        assert isinstance(pooled, Tensor)
        empty = MEAN if Options.of(self).exact else ZERO
        means = history.pooled(history.keys.new_zeros(batch, history.keys.shape[2]), empty)
        return pooled + F.linear(means, self.W_v.weight) if history.any_empty(empty) else pooled

    def _of_shared_items(self, target: Tensor, history: Padded) -> Tensor:
        """Each head a candidate that shares the history as it is."""
        batch, _, width = history.keys.shape
        heads, size = self.num_heads, self.head_dim
        query = self.W_q(target).reshape(batch, heads, size)
        shared = torch.einsum("bhd,hdi->bhi", query, self.W_k.weight.view(heads, size, width))
        layout = history.layout()
        pooled = functional.target_attention(
            shared.reshape(batch * heads, width),
            values=layout["keys"],
            query_offsets=torch.arange(batch + 1, device=target.device) * heads,
            scale=_scale(self),
            **layout,
        )
        assert isinstance(pooled, Tensor)
        pooled = self._pooled(history, pooled.reshape(batch, heads * width))
        value = self.W_v.weight.view(heads, size, width)
        out = torch.einsum("bhi,hdi->bhd", pooled.reshape(batch, heads, width), value)
        return out.reshape(batch, heads * size)

    def _pooled(self, history: Padded, pooled: Tensor) -> Tensor:
        """`[B, heads·D]`, each head of an empty history the mean of its positions."""
        empty = MEAN if Options.of(self).exact else ZERO
        times = pooled.shape[1] // history.keys.shape[2]
        wide = history if times == 1 else Padded(history.keys.repeat(1, 1, times), history.valid)
        return wide.pooled(pooled, empty)


def _scale(layer: MultiHeadTargetAttention) -> float:
    return 1 / float(layer.scale or 1)


def valid_of(mask: Tensor | None, history: Tensor) -> Tensor | None:
    """`[B, L]` bool. The library multiplies by the mask: one of other numbers than 0 and 1 is left to it, where finding
    out waits for nothing."""
    if mask is None:
        return None
    if mask.shape != history.shape[:2]:
        raise Uncovered(f"mask: {tuple(mask.shape)}")
    valid = mask != 0
    if mask.dtype != torch.bool and mask.is_cpu and not bool((mask == valid).all()):
        raise Uncovered("mask: of other numbers than 0 and 1")
    return valid


def result_dtype(result: Tensor, history: Tensor, mask: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(result.dtype, history.dtype)
    return dtype if mask is None else torch.promote_types(dtype, torch.float32)


def scorer_of(block: Any, name: str) -> Scorer:
    """Of a `MLP_Block`."""
    expect(name, block, MLP_Block)
    expect(f"{name}.mlp", block.mlp, nn.Sequential)
    modules = {f"{name}.mlp.{i}": module for i, module in enumerate(block.mlp)}
    return Scorer.of(modules, {Dice: "dice"}, _gate)


def _gate(dice: Dice) -> Gate:
    return Gate(dice.alpha, dice.bn)


def _scorer(layer: DIN_Attention) -> Scorer:
    expect_own("forward", layer)
    scorer = scorer_of(layer.attention_layer, "attention_layer")
    if scorer.output not in ("identity", "sigmoid") or (scorer.output != "identity" and layer.use_softmax):
        raise Uncovered(f"attention_layer: {scorer.output} of the score is not built")
    return scorer


def _pooling(layer: DIN_Attention) -> dict[str, Any]:
    if layer.use_softmax:
        return {"normalize": "softmax", "empty": MEAN}
    output = _scorer(layer).output
    return {"normalize": "none" if output == "identity" else output, "empty": ZERO}


def _check_shapes(target: Tensor, history: Tensor) -> None:
    if history.dim() != 3 or target.shape != (history.shape[0], history.shape[2]) or history.shape[1] == 0:
        raise Uncovered(f"target_item, history_sequence: {tuple(target.shape)}, {tuple(history.shape)}")


def _check_din(layer: Any, options: Options) -> Sequence[str]:
    return remarks(_scorer(layer), options, _pooling(layer)["empty"])


def _check_multi_head(layer: MultiHeadTargetAttention) -> None:
    expect_own("forward", layer)
    expect("dot_attention", layer.dot_attention, ScaledDotProductAttention)
    if layer.use_qkvo:
        for name in ("W_k", "W_v"):
            expect(name, getattr(layer, name), nn.Linear)
            if getattr(layer, name).bias is not None:
                raise Uncovered(f"{name}: has a bias")


def _remark_multi_head(layer: Any, options: Options) -> Sequence[str]:
    _check_multi_head(layer)
    said = [] if options.exact else [f"an empty history gives 0, not {IN_WORDS[MEAN]}"]
    if layer.dot_attention.dropout is not None:
        said.insert(0, "in eval only: dropout of the attention is not built")
    return said


SWAPS = (
    Swap(DIN_Attention, FusedDINAttention, _check_din, "activation_unit"),
    Swap(MultiHeadTargetAttention, FusedMultiHeadTargetAttention, _remark_multi_head, "target_attention"),
)
