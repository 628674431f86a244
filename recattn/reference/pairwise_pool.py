"""pairwise_pool as its formula, one pair of fields after the other, in plain PyTorch operations."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from recattn.composite.score_dropout import kept


def pairwise_pool(
    fields: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor,
    *,
    dropout: float = 0.0,
    return_weights: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The oracle for `recattn.functional.pairwise_pool`: same arguments, same result, any floating dtype.

    `seed` is what decides the dropped weights, as the operator draws it.
    """
    batch, count, width = fields.shape
    pairs = [fields[:, i] * fields[:, j] for i, j in combinations(range(count), 2)]
    if not pairs:
        out = fields.new_zeros(batch, width)
        return (out, fields.new_zeros(batch, 0)) if return_weights else out
    scores = [torch.relu(pair @ weight.T + bias) @ projection for pair in pairs]
    weights = torch.softmax(torch.stack(scores, 1), 1)
    if dropout:
        assert seed is not None
        row, column = (torch.arange(n, device=fields.device) for n in weights.shape)
        weights = weights * kept(seed, row[:, None], column, dropout) / (1 - dropout)
    out = sum((weights[:, p, None] * pair for p, pair in enumerate(pairs)), fields.new_zeros(batch, width))
    return (out, weights) if return_weights else out


def pairwise_pool_gathered(
    fields: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor,
    *,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same with the products of all pairs in memory, `[B, P, K]`, as ranking libraries write it.

    What dropout drops differs from what the operator does.
    """
    first, second = torch.triu_indices(fields.shape[1], fields.shape[1], 1, device=fields.device)
    pairs = fields.index_select(1, first) * fields.index_select(1, second)
    hidden = torch.relu(torch.nn.functional.linear(pairs, weight, bias))
    scores = torch.nn.functional.linear(hidden, projection.unsqueeze(0))
    weights = torch.nn.functional.dropout(torch.softmax(scores, 1), dropout)
    out = (weights * pairs).sum(1)
    return (out, weights.squeeze(2)) if return_weights else out
