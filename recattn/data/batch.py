"""What a ranking model is called with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recattn.jagged import Jagged


@dataclass(frozen=True, eq=False)
class Batch:
    """B targets, each with the history of the user that it was shown to. Ids are dense and begin at 0.

    Args:
        user: `[B]` int64.
        item: `[B]` int64, the target.
        category: `[B]` int64, that of the target.
        history: item ids, `[T]` int64, oldest first. Histories may be empty.
        history_category: their categories, `[T]` int64, over the offsets of `history`.
        label: `[B]`, 1.0 where the user liked the target, else 0.0.

    Raises:
        ValueError: for shapes that disagree.
    """

    user: Tensor
    item: Tensor
    category: Tensor
    history: Jagged
    history_category: Jagged
    label: Tensor

    def __post_init__(self) -> None:
        for name in ("user", "item", "category", "label"):
            shape = tuple(getattr(self, name).shape)
            if shape != (self.history.batch_size,):
                raise ValueError(f"{name}: expected [{self.history.batch_size}], got {list(shape)}")
        if self.history_category.values.shape != self.history.values.shape:
            raise ValueError(
                f"history_category: expected values {list(self.history.values.shape)}, as the history, got"
                f" {list(self.history_category.values.shape)}"
            )

    @property
    def size(self) -> int:
        """B."""
        return self.history.batch_size

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        history = self.history.to(device)
        return Batch(
            user=self.user.to(device),
            item=self.item.to(device),
            category=self.category.to(device),
            history=history,
            history_category=history.with_values(self.history_category.values.to(device)),
            label=self.label.to(device),
        )
