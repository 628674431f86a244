"""DeepCTR-Torch: the two recurrent layers of its DIEN."""

from __future__ import annotations

import torch
from deepctr_torch.layers.core import DNN
from deepctr_torch.layers.sequence import AGRUCell, AUGRUCell, DynamicGRU
from deepctr_torch.models.dien import InterestEvolving, InterestExtractor
from torch import Tensor
from torch.nn import functional as F

from recattn.swap.coverage import Swap, Uncovered, expect, expect_own, instead_of
from recattn.swap.histories import by_length
from recattn.swap.recurrences import Histories, Recurrence, check_auxiliary, check_by

__all__ = ["SWAPS", "FusedInterestEvolving", "FusedInterestExtractor"]

CELLS = {"AGRU": AGRUCell, "AUGRU": AUGRUCell}


class FusedInterestExtractor(InterestExtractor):
    """`InterestExtractor`, whose auxiliary network reads the items that count and no others."""

    @instead_of(InterestExtractor.forward)
    def forward(
        self, keys: Tensor, keys_length: Tensor, neg_keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor]:
        """Runs over the histories `keys [B, T, H]`, of `keys_length [B]`.

        Returns:
            The states of those that are not empty, `[b, T, H]`, 0 in the padding, and the auxiliary loss.
        """
        recurrence = _extractor(self)
        _check_lengths(keys, keys_length)
        some = keys_length > 0
        if not bool(some.any()):  # for which the library returns one tensor
            return InterestExtractor.forward(self, keys, keys_length, neg_keys)
        histories = Histories(*_rows_of(some, keys, by_length(keys_length, keys.shape[1])))
        states, _ = recurrence.run(histories)
        loss = torch.zeros((1,), device=keys.device)
        if self.use_neg and neg_keys is not None:
            (negatives,) = _rows_of(some, neg_keys)
            clicks, others = (self.auxiliary_net(x) for x in histories.next_items(states, negatives))
            if clicks.numel():
                targets = torch.cat([torch.ones_like(clicks), torch.zeros_like(others)])
                loss = F.binary_cross_entropy(torch.cat([clicks, others]), targets)
        return histories.pad(states), loss


class FusedInterestEvolving(InterestEvolving):
    """`InterestEvolving` of any `gru_type`, over the items that count, without a loop over steps in Python."""

    @instead_of(InterestEvolving.forward)
    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        keys_length: Tensor,
        mask: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """The final states `[B, H]` of `keys [b, T, H]`, what `InterestExtractor` returned, by `query [B, H]`; 0 for
        an empty history. `mask` is not read, as in the library."""
        recurrence = _evolution(self)
        some = keys_length > 0
        keys_length = keys_length[some]
        if len(keys_length) == 0:
            return torch.zeros(query.shape, device=query.device)
        _check_lengths(keys, keys_length)
        (targets,) = _rows_of(some, query)
        targets = targets.unsqueeze(1)
        histories = Histories(keys, by_length(keys_length, keys.shape[1]))
        if self.gru_type == "GRU":
            states, _ = recurrence.run(histories)
            out = self.attention(targets, histories.pad(states), keys_length.unsqueeze(1)).squeeze(1)
        else:
            scores = self.attention(targets, keys, keys_length.unsqueeze(1))
            _, out = recurrence.run(histories, scores)
        return (
            out
            if len(out) == len(query)
            else out.new_zeros(query.shape).index_copy(0, some.nonzero().squeeze(1), out)
        )


def _rows_of(some: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The rows that are asked for, without a copy where that is all."""
    if bool(some.all()):
        return list(tensors)
    rows = some.nonzero().squeeze(1)
    return [x.index_select(0, rows) for x in tensors]


def _check_lengths(keys: Tensor, lengths: Tensor) -> None:
    if keys.dim() != 3 or lengths.shape != keys.shape[:1]:
        raise Uncovered(f"keys, keys_length: {tuple(keys.shape)}, {tuple(lengths.shape)}")
    if lengths.is_cpu and lengths.numel() and bool((lengths > keys.shape[1]).any()):
        raise Uncovered("keys_length: over the padded length")


def _extractor(layer: InterestExtractor) -> Recurrence:
    for method in ("forward", "_cal_auxiliary_loss"):
        expect_own(method, layer)
    if layer.use_neg:
        check_auxiliary(layer.auxiliary_net, DNN)
    return Recurrence.of_gru("gru", layer.gru)


def _evolution(layer: InterestEvolving) -> Recurrence:
    for method in ("forward", "_get_last_state"):
        expect_own(method, layer)
    if layer.gru_type in CELLS:
        expect("interest_evolution", layer.interest_evolution, DynamicGRU)
        cell = layer.interest_evolution.rnn
        expect("interest_evolution.rnn", cell, CELLS[layer.gru_type])
        return Recurrence.of_cell("interest_evolution.rnn", cell, layer.gru_type.lower())
    return Recurrence.of_gru("interest_evolution", layer.interest_evolution, layer.gru_type.lower())


SWAPS = (
    Swap(InterestExtractor, FusedInterestExtractor, check_by(_extractor)),
    Swap(InterestEvolving, FusedInterestEvolving, check_by(_evolution)),
)
