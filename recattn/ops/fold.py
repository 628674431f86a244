"""The algebra that takes the first layer from depth 4D to D.

With one block of the first weight per feature, W1 = [Wq | Wk | Wd | Wp] for q, k, q-k and q*k,

    z1 = W_eff(q) k + c(q),   W_eff(q) = (Wk - Wd) + Wp·diag(q),   c(q) = (Wq + Wd) q + b1

so each block adds to, or subtracts from, the parts of a folded layer that act on q, on k and on q*k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# feature: its sign in the parts that act on q, on k and on q*k
SIGNS = {"q": (1, 0, 0), "k": (0, 1, 0), "q-k": (1, -1, 0), "q*k": (0, 0, 1)}
FEATURES = tuple(SIGNS)


class Folded(NamedTuple):
    """The first layer as a function of k: `W_eff(q) = key + product·diag(q)` and `c(q) = bias`."""

    query: Tensor  # [H1, D], what c(q) = query·q + b1 is made of
    key: Tensor  # [H1, D]
    product: Tensor  # [H1, D]
    bias: Tensor  # [B, H1]


def fold(
    weight: Tensor, bias: Tensor, query: Tensor, features: Sequence[str], constant: bool = True
) -> Folded:
    """`weight [H1, F·D]`, `bias [H1]` and `query [B, D]`, all of one dtype, to the folded layer. Without its `constant`
    c(q) it has no bias: `[0, H1]`."""
    blocks = weight.split(query.shape[1], dim=1)
    parts = [_signed_sum([SIGNS[f][part] for f in features], blocks) for part in range(3)]
    c = torch.addmm(bias, query, parts[0].t()) if constant else bias.new_empty(0, bias.shape[0])
    return Folded(parts[0], parts[1], parts[2], c)


def unfold(
    key: Tensor, product: Tensor, bias: Tensor, folded: Folded, query: Tensor, features: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the folded parts `key`, `product [H1, D]` and `bias [B, H1]`, to those of W1, b1 and, as far
    as it came through c(q), the query."""
    parts = (bias.t() @ query, key, product)
    weight = torch.cat([_signed_sum(SIGNS[f], parts) for f in features], dim=1)
    return weight, bias.sum(0), bias @ folded.query


def _signed_sum(signs: Sequence[int], terms: Sequence[Tensor]) -> Tensor:
    signed = [(sign, term) for sign, term in zip(signs, terms, strict=True) if sign]
    if not signed:
        return torch.zeros_like(terms[0])
    (sign, total), *others = signed
    total = total if sign > 0 else -total
    for sign, term in others:
        total = torch.add(total, term, alpha=sign)
    return total
