"""What all ranking models have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recattn.data import Batch
from recattn.models.embedding import BatchEmbedding
from recattn.nn import Twin


class Losses(NamedTuple):
    """What training minimises, and the part of the labels: without auxiliary terms."""

    total: Tensor
    labels: Tensor


class RankingModel(Twin):
    """A model that ranks items for users: ids in, one logit per target out.

    Subclasses say in `forward` how; all are made as `Model(num_users, num_items, num_categories, dim=...)`, and
    items are `2 * dim` wide, their own vector next to that of their category.

    Args:
        num_users, num_items, num_categories: how many ids there are of each.
        dim: the width of each embedding.

    Raises:
        ValueError: for an id count or width below 1.
    """

    def __init__(self, num_users: int, num_items: int, num_categories: int, dim: int) -> None:
        super().__init__()
        self.embedding = BatchEmbedding(num_users, num_items, num_categories, dim)

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass that defines forward")

    def loss(self, batch: Batch) -> Tensor:
        """What training minimises, a scalar."""
        return self.losses(batch).total

    def losses(self, batch: Batch) -> Losses:
        """The same, and what of it is of the labels: here all of it, their mean binary cross-entropy."""
        loss = torch.nn.functional.binary_cross_entropy_with_logits(self(batch), batch.label)
        return Losses(loss, loss)
