"""Measurements for reading: on a terminal, as Markdown, and as the cells of any other table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from recattn.bench.measure import OWN, Measurement
from recattn.bench.roofline import Peaks
from recattn.bench.task import Work

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "provider",
    "ms",
    "p20–p80",
    "faster by",
    "peak MiB",
    "smaller by",
    "roofline",
    "error",
    "first call",
)
LEFT = ("mode", "provider")
LEGEND = (
    "Medians of interleaved calls. faster by, smaller by: how many times the time, round by round, and the peak"
    " memory of recattn a provider takes; in the row of recattn, what the fastest of the others takes. Peak"
    " memory: tensors alive at once, inputs not counted. roofline: the least time for bytes and flops, over the"
    " time taken. error: against float64, relative to the largest element. first call: with all that is compiled"
    " in it, and of a training step without the optimizer."
)


class Section(NamedTuple):
    """One case: what it is, and its measurements."""

    title: str
    measured: Sequence[Measurement]


def table(section: Section, peaks: Peaks | None = None) -> Table:
    """For a rich console; `failures` go below it."""
    from rich import box
    from rich.table import Table

    result = Table(title=section.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        result.add_column(column, justify="left" if column in LEFT else "right", no_wrap=column == "provider")
    for mode, group in groupby(section.measured, key=lambda m: m.mode):
        result.add_section()
        result.add_row(mode, style="italic")
        for m, cells in rows(list(group), peaks):
            result.add_row(*cells, style="red" if m.error else None)
    return result


def markdown(section: Section, peaks: Peaks | None = None) -> str:
    """The same as a Markdown section."""
    columns = ("mode", *COLUMNS)
    lines: list[Sequence[str]] = [columns, [":--" if column in LEFT else "--:" for column in columns]]
    for mode, group in groupby(section.measured, key=lambda m: m.mode):
        lines += [(mode, *cells) for _, cells in rows(list(group), peaks)]
    text = f"## {section.title}\n\n" + "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    return text + "".join(f"\n- {line}\n" for line in failures(section.measured))


def rows(
    measured: Sequence[Measurement], peaks: Peaks | None = None
) -> list[tuple[Measurement, tuple[str, ...]]]:
    """Cells for `COLUMNS`, of measurements of one case in one mode."""
    own = next((m for m in measured if m.provider == OWN), None)
    fastest = fastest_other(measured)
    return [(m, _cells(m, fastest if m is own else own, peaks)) for m in measured]


def times(m: Measurement, own: Measurement) -> float:
    """How many times as long as recattn's calls those of a provider take."""
    assert m.ms is not None
    assert own.ms is not None
    return m.ms / own.ms if m.relative is None else m.relative


def fastest_other(measured: Sequence[Measurement]) -> Measurement | None:
    """The fastest that is not recattn, of measurements of one case in one mode."""
    others = [m for m in measured if m.ms is not None and not m.provider.startswith(OWN)]
    return min(others, key=lambda m: m.relative or m.ms or math.inf, default=None)


def speedups(measured: Sequence[Measurement]) -> list[tuple[Measurement, Measurement, float]]:
    """Of each case and mode recattn, the fastest other provider, and how many times as long that takes."""
    found = []
    for _, group in groupby(measured, key=lambda m: (m.op, m.case, m.mode)):
        of_mode = list(group)
        own = next((m for m in of_mode if m.provider == OWN and m.ms), None)
        other = fastest_other(of_mode)
        if own is not None and other is not None:
            found.append((own, other, times(other, own)))
    return found


def summary(measured: Sequence[Measurement]) -> str:
    """What came out, in a sentence or two."""
    found = speedups(measured)
    if not found:
        return "There is no case that both recattn and another provider computed."
    factors = sorted(factor for *_, factor in found)
    middle = math.exp(sum(map(math.log, factors)) / len(factors))
    lost = [
        f"{own.case} in {own.mode} ({factor:.2f}×, {other.provider})"
        for own, other, factor in found
        if factor < 1
    ]
    text = (
        f"Against the fastest other provider recattn takes 1/{middle:.2g} of the time in the geometric mean over"
        f" {len(factors)} cases and modes, and is from {factors[0]:.2g}× to {factors[-1]:.2g}× as fast."
    )
    if not lost:
        return f"{text} It is slower in none."
    return f"{text} It is slower in {len(lost)}: {'; '.join(lost)}."


def failures(measured: Sequence[Measurement]) -> list[str]:
    """A line for each provider without figures, with the modes that it failed in."""
    modes: dict[tuple[str, str, str], list[str]] = {}
    for m in measured:
        if m.error:
            modes.setdefault((m.case, m.provider, m.error), []).append(m.mode)
    return [
        f"{case}, {provider}, {', '.join(names)}: {error}" for (case, provider, error), names in modes.items()
    ]


def _cells(m: Measurement, other: Measurement | None, peaks: Peaks | None) -> tuple[str, ...]:
    """`other` is recattn, or what recattn is compared with."""
    if m.ms is None or m.ms_p20 is None or m.ms_p80 is None or m.peak_bytes is None:
        return (m.provider, "failed", *[""] * (len(COLUMNS) - 2))
    faster = smaller = share = ""
    if other is not None and other is not m and other.ms and other.peak_bytes and m.peak_bytes:
        a, b = (other, m) if m.provider == OWN else (m, other)
        assert a.peak_bytes
        assert b.peak_bytes
        faster, smaller = f"{times(a, b):.2f}×", f"{a.peak_bytes / b.peak_bytes:.2f}×"
    if peaks is not None and m.bytes is not None and m.flops is not None:
        share = f"{peaks.share(Work(m.bytes, m.flops), m.ms):.0%}"
    return (
        m.provider,
        milliseconds(m.ms),
        f"{milliseconds(m.ms_p20)}–{milliseconds(m.ms_p80)}",
        faster,
        mebibytes(m.peak_bytes),
        smaller,
        share,
        "" if m.deviation is None else f"{m.deviation:.0e}",
        "" if m.first_ms is None else f"{m.first_ms / 1e3:.2g} s",
    )


def milliseconds(ms: float) -> str:
    """Three or four digits that count."""
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.2f}"
