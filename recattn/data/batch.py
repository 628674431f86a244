"""What a ranking model is called with."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

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
        timestamp: `[B]` int64, when the target was shown, in seconds. Models that use time need it, and
        history_timestamp: when what is in the history happened, `[T]` int64.
        history_liked: `[T]` bool, whether the user liked it. Models that tell likes from dislikes need it.

    Raises:
        ValueError: for shapes that disagree.
    """

    user: Tensor
    item: Tensor
    category: Tensor
    history: Jagged
    history_category: Jagged
    label: Tensor
    timestamp: Tensor | None = None
    history_timestamp: Jagged | None = None
    history_liked: Jagged | None = None

    def __post_init__(self) -> None:
        for column in fields(self):
            value, sequences = getattr(self, column.name), column.name.startswith("history")
            wanted = Jagged if sequences else Tensor
            if not isinstance(value, wanted) and (value is not None or column.default is MISSING):
                raise TypeError(f"{column.name}: expected a {wanted.__name__}, got {type(value).__name__}")
        for column in fields(self):
            value = getattr(self, column.name)
            if value is not None and value.device != self.history.device:
                raise ValueError(
                    f"{column.name}: expected device {self.history.device}, as the history, got {value.device}"
                )
        for name in ("user", "item", "category", "label", "timestamp"):
            column = getattr(self, name)
            if column is not None and tuple(column.shape) != (self.history.batch_size,):
                raise ValueError(f"{name}: expected [{self.history.batch_size}], got {list(column.shape)}")
        for name in ("history_category", "history_timestamp", "history_liked"):
            column = getattr(self, name)
            if column is not None and column.values.shape != self.history.values.shape:
                raise ValueError(
                    f"{name}: expected values {list(self.history.values.shape)}, as the history, got"
                    f" {list(column.values.shape)}"
                )

    @property
    def size(self) -> int:
        """B."""
        return self.history.batch_size

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        history = self.history.to(device)

        def moved(column: Tensor | Jagged | None) -> Tensor | Jagged | None:
            if isinstance(column, Jagged):
                return history.with_values(column.values.to(device))
            return None if column is None else column.to(device)

        columns = {field.name: moved(getattr(self, field.name)) for field in fields(self)}
        return Batch(**{**columns, "history": history})  # type: ignore[arg-type]
