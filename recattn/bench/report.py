"""Measurements for reading: on a terminal, as Markdown, and as the cells of any other table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from recattn.bench.measure import OWN, Measurement
from recattn.bench.timing import Ratio

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "provider",
    "ms",
    "p20–p80",
    "faster by",
    "±",
    "peak MiB",
    "smaller by",
    "roofline",
    "error",
    "first call",
)
LEFT = ("mode", "provider")
LEGEND = (
    "Medians of interleaved calls. faster by, smaller by: how many times the time, round by round, and the peak"
    " memory of recattn a provider takes; in the row of recattn, what the fastest of the others takes. ±: how well"
    " the former is known, with 95 %. Peak memory: tensors alive at once, inputs not counted. roofline: the least"
    " time for bytes and flops, over the time taken. error: against float64, relative to the largest element. first"
    " call: with all that is compiled in it, and of a training step without the optimizer."
)


MORE = ("relative_low", "relative_high", "roofline", "first_ms", "deviation")


class Section(NamedTuple):
    """One case: what it is, and its measurements."""

    title: str
    measured: Sequence[Measurement]


def table(section: Section) -> Table:
    """For a rich console; `failures` go below it."""
    from rich import box
    from rich.table import Table

    result = Table(title=section.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        result.add_column(column, justify="left" if column in LEFT else "right", no_wrap=column == "provider")
    for mode, group in groupby(section.measured, key=lambda m: m.mode):
        result.add_section()
        result.add_row(mode, style="italic")
        for m, cells in rows(list(group)):
            result.add_row(*cells, style="red" if m.error else None)
    return result


def markdown(section: Section) -> str:
    """The same as a Markdown section."""
    columns = ("mode", *COLUMNS)
    lines: list[Sequence[str]] = [columns, [":--" if column in LEFT else "--:" for column in columns]]
    for mode, group in groupby(section.measured, key=lambda m: m.mode):
        lines += [(mode, *cells) for _, cells in rows(list(group))]
    text = f"## {section.title}\n\n" + "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    return text + "".join(f"\n- {line}\n" for line in failures(section.measured))


def rows(measured: Sequence[Measurement]) -> list[tuple[Measurement, tuple[str, ...]]]:
    """Cells for `COLUMNS`, of measurements of one case in one mode."""
    return [(m, _cells(m, compared)) for m, compared in _pairs(measured)]


def records(measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    """What goes into files: `Measurement.record()`, and the figures of the table that follow from others."""
    result = []
    for _, group in groupby(measured, key=lambda m: (m.op, m.case, m.mode)):
        for m, compared in _pairs(list(group)):
            faster, smaller = _factors(m, compared)
            figures = {"faster_by": faster and faster.middle, "smaller_by": smaller}
            result.append({**m.record(), **figures, **{name: getattr(m, name) for name in MORE}})
    return result


def _pairs(measured: Sequence[Measurement]) -> list[tuple[Measurement, Measurement | None]]:
    """What each is compared with: recattn, or if it is that, the fastest of the others."""
    own = next((m for m in measured if m.provider == OWN), None)
    fastest = fastest_other(measured)
    return [(m, fastest if m is own else own) for m in measured]


def _factors(m: Measurement, compared: Measurement | None) -> tuple[Ratio | None, float | None]:
    """How many times the time and the peak memory of recattn the other of the two takes."""
    if compared is None or not (m.ms and compared.ms and m.peak_bytes and compared.peak_bytes):
        return None, None
    other, own = (compared, m) if m.provider == OWN else (m, compared)
    assert other.peak_bytes
    assert own.peak_bytes
    middle = times(other, own)
    bounds = Ratio(other.relative_low or middle, middle, other.relative_high or middle)
    return bounds, other.peak_bytes / own.peak_bytes


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
        f"Against the fastest other provider recattn is {middle:.2g}× as fast in the geometric mean over"
        f" {len(factors)} cases and modes, from {factors[0]:.2g}× to {factors[-1]:.2g}×."
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


def _cells(m: Measurement, compared: Measurement | None) -> tuple[str, ...]:
    if m.ms is None or m.ms_p20 is None or m.ms_p80 is None or m.peak_bytes is None:
        return (m.provider, "failed", *[""] * (len(COLUMNS) - 2))
    faster, smaller = _factors(m, compared)
    return (
        m.provider,
        milliseconds(m.ms),
        f"{milliseconds(m.ms_p20)}–{milliseconds(m.ms_p80)}",
        "" if faster is None else f"{faster.middle:.2f}×",
        "" if faster is None else f"{faster.uncertainty:.0%}",
        mebibytes(m.peak_bytes),
        "" if smaller is None else f"{smaller:.2f}×",
        "" if m.roofline is None else f"{m.roofline:.0%}",
        "" if m.deviation is None else f"{m.deviation:.0e}",
        "" if m.first_ms is None else f"{m.first_ms / 1e3:.2g} s",
    )


def milliseconds(ms: float) -> str:
    """Three or four digits that count."""
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.2f}"
