"""RecBole: the two recurrent layers of its DIEN."""

from __future__ import annotations

import torch
from recbole.model.layers import MLPLayers
from recbole.model.sequential_recommender.dien import (
    AGRUCell,
    AUGRUCell,
    DynamicRNN,
    InterestEvolvingLayer,
    InterestExtractorNetwork,
)
from torch import Tensor
from torch.nn import functional as F

from recattn.swap.coverage import Swap, Uncovered, expect, expect_own, instead_of
from recattn.swap.histories import by_length
from recattn.swap.recurrences import Histories, Recurrence, check_auxiliary, check_by

__all__ = ["SWAPS", "FusedInterestEvolvingLayer", "FusedInterestExtractorNetwork"]

CELLS = {"AGRU": AGRUCell, "AUGRU": AUGRUCell}


class FusedInterestExtractorNetwork(InterestExtractorNetwork):
    """`InterestExtractorNetwork`, whose auxiliary network reads the items that count and no others."""

    @instead_of(InterestExtractorNetwork.forward)
    def forward(
        self, keys: Tensor, keys_length: Tensor, neg_keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs over the histories `keys [B, T, H]`, of `keys_length [B]`; returns the states `[B, T, H]`, 0 in the
        padding, and the auxiliary loss, NaN where no history has two items, as in the library."""
        recurrence = _extractor(self)
        _check_lengths(keys, keys_length)
        if neg_keys is None:
            raise Uncovered("neg_keys: None")
        histories = Histories(keys, by_length(keys_length, keys.shape[1]))
        states, _ = recurrence.run(histories)
        clicks, others = (self.auxiliary_net(x) for x in histories.next_items(states, neg_keys))
        targets = torch.cat([torch.ones_like(clicks), torch.zeros_like(others)])
        loss = F.binary_cross_entropy_with_logits(torch.cat([clicks, others]), targets)
        return histories.pad(states), loss


class FusedInterestEvolvingLayer(InterestEvolvingLayer):
    """`InterestEvolvingLayer` of any `gru`, over the items that count, without a loop over steps in Python."""

    @instead_of(InterestEvolvingLayer.forward)
    def forward(self, queries: Tensor, keys: Tensor, keys_length: Tensor) -> Tensor:
        """The final states `[B, H]` of `keys [B, T, H]`, of `keys_length [B]`, by `queries [B, H]`."""
        recurrence = _evolution(self)
        _check_lengths(keys, keys_length)
        histories = Histories(keys, by_length(keys_length, keys.shape[1]))
        if self.gru == "GRU":
            states, _ = recurrence.run(histories)
            out: Tensor = self.attention_layer(queries, histories.pad(states), keys_length).squeeze(1)
            return out
        _, last = recurrence.run(histories, self.attention_layer(queries, keys, keys_length))
        return last


def _check_lengths(keys: Tensor, lengths: Tensor) -> None:
    """The library does not take empty histories."""
    if keys.dim() != 3 or lengths.shape != keys.shape[:1]:
        raise Uncovered(f"keys, keys_length: {tuple(keys.shape)}, {tuple(lengths.shape)}")
    if bool(((lengths < 1) | (lengths > keys.shape[1])).any()):
        raise Uncovered("keys_length: below 1, or over the padded length")


def _extractor(layer: InterestExtractorNetwork) -> Recurrence:
    for method in ("forward", "auxiliary_loss"):
        expect_own(method, layer)
    check_auxiliary(layer.auxiliary_net, MLPLayers)
    return Recurrence.of_gru("gru", layer.gru)


def _evolution(layer: InterestEvolvingLayer) -> Recurrence:
    for method in ("forward", "final_output"):
        expect_own(method, layer)
    if layer.gru in CELLS:
        expect("dynamic_rnn", layer.dynamic_rnn, DynamicRNN)
        expect("dynamic_rnn.rnn", layer.dynamic_rnn.rnn, CELLS[layer.gru])
        return Recurrence.of_cell("dynamic_rnn.rnn", layer.dynamic_rnn.rnn, layer.gru.lower())
    return Recurrence.of_gru("dynamic_rnn", layer.dynamic_rnn, layer.gru.lower())


SWAPS = (
    Swap(InterestExtractorNetwork, FusedInterestExtractorNetwork, check_by(_extractor)),
    Swap(InterestEvolvingLayer, FusedInterestEvolvingLayer, check_by(_evolution)),
)
