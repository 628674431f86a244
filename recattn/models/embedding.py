"""Ids to vectors, as all models here do it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recattn.data import Batch
from recattn.jagged import Jagged


class Embedded(NamedTuple):
    """A batch as vectors."""

    user: Tensor  # [B, dim]
    target: Tensor  # [B, 2 * dim]
    history: Jagged  # [T, 2 * dim]


class BatchEmbedding(nn.Module):
    """Looks up users, items and categories; an item is its own vector followed by that of its category.

    Args:
        num_users, num_items, num_categories: how many ids there are of each.
        dim: the width of each of the three tables.
    """

    def __init__(self, num_users: int, num_items: int, num_categories: int, dim: int) -> None:
        super().__init__()
        sizes = {"num_users": num_users, "num_items": num_items, "num_categories": num_categories, "dim": dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.user = nn.Embedding(num_users, dim)
        self.item = nn.Embedding(num_items, dim)
        self.category = nn.Embedding(num_categories, dim)
        for table in (self.user, self.item, self.category):
            # With PyTorch's unit variance the noise of rare ids outweighs what the others learn in an epoch.
            nn.init.normal_(table.weight, std=0.05)

    def items(self, item: Tensor, category: Tensor) -> Tensor:
        """Item ids `[R]` and their categories to `[R, 2 * dim]`."""
        return torch.cat([self.item(item), self.category(category)], dim=1)

    def forward(self, batch: Batch) -> Embedded:
        history = self.items(batch.history.values, batch.history_category.values)
        return Embedded(
            user=self.user(batch.user),
            target=self.items(batch.item, batch.category),
            history=batch.history.with_values(history),
        )
