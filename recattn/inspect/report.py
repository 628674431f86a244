"""Records for reading on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from recattn.inspect.chips import CHIPS
from recattn.inspect.records import Record

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["COLUMNS", "LEGEND", "cells", "failures", "groups", "tables"]

COLUMNS = (
    "kernel",
    "regs",
    "spill B",
    "shared B",
    "occup.",
    "MMA",
    "special",
    "fma",
    "shared",
    "global",
    "roof µs",
    "binds",
)
LEGEND = (
    "regs: per thread. spill: bytes of spill stores and loads. occup.: resident warps over the most. MMA, special,"
    " fma, shared, global: instructions in the code, not how often they run; the last as count×bytes per thread. roof:"
    " the least time for the operator's whole forward or backward on that chip, by data-sheet figures: a model, not a"
    " measurement."
)


def groups(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """By chip and dtype, each with a title."""
    for (arch, dtype), group in groupby(records, key=lambda r: (r.arch, r.dtype)):
        yield f"{arch} ({CHIPS[arch].name}), {dtype}", list(group)


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """For a rich console; `failures` go below."""
    from rich import box
    from rich.table import Table

    for title, group in groups(records):
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for column in COLUMNS:
            text = column in ("kernel", "global", "binds")
            table.add_column(column, justify="left" if text else "right", overflow="fold")
        for (op, shape), rows in groupby(group, key=lambda r: (r.op, r.shape)):
            table.add_section()
            table.add_row(f"{op}\n{shape.replace(',', ' ')}", style="italic")
            for record in rows:
                table.add_row(*cells(record), style=None if record.ok else "red")
        yield table


def cells(record: Record) -> tuple[str, ...]:
    """For `COLUMNS`."""
    name = f"{record.step} {record.kernel}"
    bound = (f"{record.roofline.microseconds:.1f}", record.roofline.binds)
    if record.instructions is None:
        return (name, "failed", *[""] * 8, *bound)
    mix: dict[str, Any] = record.instructions
    memory = " ".join(f"{count}×{size}" for size, count in mix["memory"].items())
    counts = (str(mix[kind]) for kind in ("matrix", "special", "fma", "shared"))
    figures = (
        str(record.registers),
        str(record.spill_bytes),
        str(record.shared_bytes),
        f"{record.occupancy:.0%}",
    )
    return (name, *figures, *counts, memory, *bound)


def failures(records: Sequence[Record]) -> list[str]:
    """A line for each record that is not ok."""
    return [
        f"{r.arch}, {r.dtype}, {r.op}, {r.kernel}: {r.error or f'{r.spill_bytes} bytes of spills'} ({r.shape})"
        for r in records
        if not r.ok
    ]
