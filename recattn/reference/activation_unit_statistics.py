"""activation_unit_statistics by its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn.reference.activation_unit import hidden_activation, mlp, sequences


def activation_unit_statistics(
    query: Tensor,
    keys: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    query_offsets: Tensor | None = None,
    rows: Tensor | None = None,
    features: Sequence[str] = ("q", "k", "q-k", "q*k"),
    activation: str = "sigmoid",
    activation_params: Any = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations of all items of all queries, their mean and variance, and how many there are."""
    z = [query.new_zeros(0, len(biases[-1]))]
    for q, items, row in sequences(query, len(keys), offsets, query_offsets, rows):
        act = hidden_activation(activation, activation_params, dropout, seed, row)
        z.append(mlp(q, keys[items], weights, biases, features, act))
    return moments(torch.cat(z))


def moments(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of `[n, H]`."""
    count = torch.tensor(len(z), device=z.device)
    mean = z.sum(0) / count.clamp_min(1)
    return mean, (z - mean).square().sum(0) / count.clamp_min(1), count
