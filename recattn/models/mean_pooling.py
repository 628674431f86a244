"""The baseline without attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recattn.data import Batch
from recattn.models.mlp import mlp
from recattn.models.ranking import RankingModel


class MeanPooling(RankingModel):
    r"""The mean of the history, whatever the target: what attention has to beat.

    .. math::
        p = \frac{1}{L} \sum_t k_t,\qquad logit = MLP([e_{user}, q, p])

    Args:
        num_users, num_items, num_categories, dim: see `RankingModel`.
        hidden: the widths of the hidden layers of the head, PReLU each.
        dropout: behind each of them.

    Raises:
        ValueError: for an id count or width below 1, or a dropout outside [0, 1).

    Source: the base model of Zhou et al., KDD 2018, and of Covington et al., "Deep Neural Networks for YouTube
    Recommendations", RecSys 2016. The former takes the sum; a mean does not grow with the history.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_categories: int,
        *,
        dim: int = 32,
        hidden: Sequence[int] = (200, 80),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_users, num_items, num_categories, dim)
        self.head = mlp(5 * dim, hidden, dropout=dropout)

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        user, target, history = self.embedding(batch)
        return self.head(torch.cat([user, target, history.mean()], dim=1)).squeeze(1)
