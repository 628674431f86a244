"""The histories that a layer is given, in any layout, as the operators take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recattn.jagged import Jagged, pack, unpack, valid_positions


@dataclass(frozen=True)
class Histories:
    """Keys and values where they are, and which of them are in which history.

    Attributes:
        keys, values: `[R, D]` and, if others than the keys are pooled, `[R, Dv]`.
        offsets: `[B + 1]`.
        rows: `[T]`, the rows of keys and values at each position of the histories, if these are not end to end.
        unique_rows: whether no row is at two positions.
        valid: `[B, L]` of a padded batch.
    """

    keys: Tensor
    values: Tensor | None
    offsets: Tensor
    rows: Tensor | None = None
    unique_rows: bool = False
    valid: Tensor | None = None

    @classmethod
    def of(
        cls,
        keys: Jagged | Tensor,
        values: Jagged | Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        table: Tensor | None,
        *,
        name: str = "keys",
    ) -> Histories:
        """Of keys `[..., D]`, which the caller may call by another name, or of ids `[...]` of the rows of a table."""
        expect_sequences(name, keys)
        if values is not None:
            expect_sequences("values", values)
        padded = isinstance(keys, Tensor) and not keys.is_nested
        if not padded and (lengths is not None or mask is not None):
            raise ValueError(f"lengths, mask: expected None, since {name} are not padded")
        if table is not None:
            ids, offsets, valid = _ids(name, keys, lengths, mask)
            if isinstance(values, Jagged) or (values is not None and values.is_nested):
                raise TypeError(f"values: expected another table, [R, Dv], got {type(values).__name__}")
            return cls(table, values, offsets, ids, valid=valid)
        if isinstance(keys, Tensor) and padded:
            if keys.dim() != 3:
                raise ValueError(f"{name}: expected [B, L, D], got {list(keys.shape)}")
            valid = valid_positions(keys, lengths, mask)
            values = padded_values(keys, values)
            rows, offsets = pack(valid)
            return cls(keys.flatten(0, 1), _flat(values), offsets, rows, True, valid)
        history = as_jagged(keys)
        return cls(history.values, None if values is None else as_jagged(values).values, history.offsets)

    def packed(self) -> tuple[Jagged, Tensor | None]:
        """The keys and the values end to end."""
        if self.rows is None:
            return Jagged(self.keys, self.offsets), self.values
        valid = torch.arange(self.rows.numel(), device=self.rows.device) < self.offsets[-1]
        rows = torch.where(valid, self.rows, 0)
        values = None if self.values is None else self.values.index_select(0, rows)
        return Jagged(self.keys.index_select(0, rows), self.offsets), values

    def in_layout_of(self, keys: Jagged | Tensor, attention: Tensor) -> Jagged | Tensor:
        """`attention [T]` as the keys came: Jagged, nested or `[B, L]`."""
        if self.valid is not None:
            return unpack(attention, self.valid)
        history = Jagged(attention, self.offsets)
        return history if isinstance(keys, Jagged) else history.to_nested()


def expect_sequences(name: str, x: Any) -> None:
    if not isinstance(x, Jagged | Tensor):
        raise TypeError(f"{name}: expected a Jagged or a tensor, got {type(x).__name__}")


def padded_values(keys: Tensor, values: Jagged | Tensor | None) -> Tensor | None:
    """The values, which have to be padded as the keys are."""
    if values is None:
        return None
    padded = isinstance(values, Tensor) and not values.is_nested
    if isinstance(values, Tensor) and padded and values.dim() == 3 and values.shape[:2] == keys.shape[:2]:
        return values
    got = list(values.shape) if isinstance(values, Tensor) and padded else type(values).__name__
    raise ValueError(f"values: expected [{keys.shape[0]}, {keys.shape[1]}, Dv], as the keys, got {got}")


def as_jagged(x: Jagged | Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Jagged:
    """Jagged sequences of any layout; a padded batch, which has lengths or a mask, is copied."""
    if isinstance(x, Jagged):
        return x
    if x.is_nested:
        return Jagged.from_nested(x)
    return Jagged.from_padded(x, lengths=lengths, mask=mask)


def _ids(
    name: str, ids: Jagged | Tensor, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = ids.values.dtype if isinstance(ids, Jagged) else ids.dtype
    if dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected ids, int32 or int64, since a table is given, got {dtype}")
    if isinstance(ids, Tensor) and not ids.is_nested:
        if ids.dim() != 2:
            raise ValueError(f"{name}: expected ids [B, L], since a table is given, got {list(ids.shape)}")
        valid = valid_positions(ids, lengths, mask)
        rows, offsets = pack(valid)
        return ids.flatten().index_select(0, rows), offsets, valid
    history = as_jagged(ids)
    return history.values, history.offsets, None


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten(0, 1)
