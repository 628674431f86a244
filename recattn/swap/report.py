"""What `recattn.fuse` did to a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One layer that a fused one exists for.

    Attributes:
        path: as in `named_modules`; empty for the model itself.
        layer: the name of the library's class.
        swapped: whether it was replaced.
        reason: why it was not; or, if it was, in what it differs from the library's, empty for nothing.
    """

    path: str
    layer: str
    swapped: bool
    reason: str


@dataclass(frozen=True, repr=False)
class Report:
    """The layers of a model that a fused one exists for, as `named_modules` finds them; prints as a table."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()  # below the table

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no layer that recattn has a fused form of"
        cells = [("path", "layer", "fused", "reason")]
        for row in self.rows:
            cells.append((row.path or "(model)", row.layer, "yes" if row.swapped else "no", row.reason))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__
