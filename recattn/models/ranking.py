"""What all ranking models have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn.data import Batch
from recattn.models.embedding import BatchEmbedding
from recattn.nn import Twin


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
        """What training minimises, a scalar: the mean binary cross-entropy of the labels."""
        return torch.nn.functional.binary_cross_entropy_with_logits(self(batch), batch.label)
