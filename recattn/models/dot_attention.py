"""The simplest attention model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recattn.data import Batch
from recattn.models.mlp import mlp
from recattn.models.ranking import RankingModel
from recattn.nn import TargetAttention


class DotAttention(RankingModel):
    r"""Attention in its three steps: similarity, softmax, weighted sum.

    .. math::
        p = \sum_t softmax_t(q \cdot k_t / \sqrt{d})\, k_t,\qquad logit = MLP([e_{user}, q, p])

    Args:
        num_users, num_items, num_categories, dim: see `RankingModel`.
        score: the similarity, see `recattn.nn.TargetAttention`.
        num_heads: of the attention.
        hidden: the widths of the hidden layers of the head, PReLU each.
        dropout: behind each of them.

    Raises:
        ValueError: for an id count or width below 1, or an option that does not exist.

    Source: Luong et al., "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015, for the
    attention; the head is that of DIN.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_categories: int,
        *,
        dim: int = 32,
        score: str = "scaled_dot",
        num_heads: int = 1,
        hidden: Sequence[int] = (200, 80),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_users, num_items, num_categories, dim)
        self.attention = TargetAttention(2 * dim, score, num_heads=num_heads)
        self.head = mlp(5 * dim, hidden, dropout=dropout)

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        user, target, history = self.embedding(batch)
        pooled = self.attention(target, history)
        return self.head(torch.cat([user, target, pooled], dim=1)).squeeze(1)
