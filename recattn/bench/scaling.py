"""How time and memory grow along one size of a case."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recattn.bench.measure import Measurement
from recattn.bench.report import OWN, mebibytes, milliseconds
from recattn.bench.task import Case

if TYPE_CHECKING:
    from rich.table import Table


class Axis(NamedTuple):
    """A size that is varied: the field of a case, what it is called, its letter, and values for quick and full runs."""

    field: str
    label: str
    letter: str
    quick: tuple[float, ...]
    full: tuple[float, ...]


AXES = {
    "length": Axis(
        "max_length",
        "longest history L, items",
        "L",
        tuple(4**n for n in range(2, 8)),
        tuple(2**n for n in range(4, 18)),
    ),
    "batch": Axis(
        "batch",
        "histories in the batch B",
        "B",
        tuple(4**n for n in range(6)),
        tuple(2**n for n in range(14)),
    ),
    "candidates": Axis(
        "candidates",
        "candidates per history C",
        "C",
        tuple(4**n for n in range(5)),
        tuple(2**n for n in range(11)),
    ),
    "fill": Axis(
        "fill",
        "fill, mean length over L",
        "fill",
        (0.05, 0.1, 0.2, 0.5, 1.0),
        (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    ),
    "fields": Axis("fields", "fields F", "F", (4, 8, 16, 32, 64), (4, 8, 16, 24, 32, 39, 48, 64, 96, 128)),
}


def at(case: Case, over: str, value: float) -> Case:
    """The case with another size.

    Raises:
        ValueError: if its operator has no such size.
    """
    field = AXES[over].field
    if not hasattr(case, field):
        known = [name for name, axis in AXES.items() if hasattr(case, axis.field)]
        raise ValueError(f"over: expected one of {', '.join(known)} for {case.op}, got {over!r}")
    chosen: dict[str, Any] = {field: value if over == "fill" else int(value)}
    return replace(case, **chosen)


@dataclass(frozen=True)
class Curve:
    """One provider in one mode, over the sizes at which it ran.

    Args:
        sizes: ascending.
        ms, peak_bytes: at each size.
    """

    provider: str
    mode: str
    sizes: tuple[float, ...]
    ms: tuple[float, ...]
    peak_bytes: tuple[float, ...]

    def exponents(self) -> tuple[float, float] | tuple[None, None]:
        """Of time and of memory; None for a curve of one point."""
        if len(self.sizes) < 2:
            return None, None
        return fit_exponent(self.sizes, self.ms), fit_exponent(self.sizes, self.peak_bytes)

    def forecast_bytes(self, size: float) -> float:
        """The peak memory at a larger size, if it grows on as between the last two, but at least in proportion."""
        if len(self.sizes) < 2:
            return self.peak_bytes[-1] * size / self.sizes[-1]
        steps = (self.sizes[-1] / self.sizes[-2], self.peak_bytes[-1] / self.peak_bytes[-2])
        exponent = max(math.log(steps[1]) / math.log(steps[0]), 1.0)
        return self.peak_bytes[-1] * (size / self.sizes[-1]) ** exponent

    def size_of_bytes(self, limit: float) -> float | None:
        """The size at which the peak memory comes to the limit, if it grows by the fitted exponent, but at least in
        proportion; None if it hardly grows."""
        _, exponent = self.exponents()
        if exponent is None or exponent < 0.1:
            return None
        return self.sizes[-1] * (limit / self.peak_bytes[-1]) ** (1 / max(exponent, 1.0))


def curves(measured: Mapping[float, Sequence[Measurement]]) -> list[Curve]:
    """One curve per provider and mode, from measurements by size, of the points that have figures."""
    points: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for size in sorted(measured):
        for m in measured[size]:
            if m.ms and m.peak_bytes:
                points.setdefault((m.provider, m.mode), []).append((size, m.ms, m.peak_bytes))
    return [Curve(*name, *zip(*series, strict=True)) for name, series in points.items()]


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    r"""The exponent p of `values ∝ sizes^p`: the least-squares slope of log value over log size.

    Over the upper half of the sizes only: the lower half is bent by what a call costs at any size.

    Args:
        sizes: positive and ascending.
        values: positive, one per size.

    Raises:
        ValueError: for fewer than two points, or a number that is not positive.
    """
    if len(sizes) != len(values) or len(sizes) < 2:
        raise ValueError(f"values: expected at least 2, one per size, got {len(values)} for {len(sizes)}")
    if min(*sizes, *values) <= 0:
        raise ValueError(f"sizes, values: expected positive numbers, got {list(sizes)} and {list(values)}")
    upper = slice(min(len(sizes) // 2, len(sizes) - 2), None)
    return float(np.polyfit(np.log(sizes[upper]), np.log(values[upper]), 1)[0])


def crossovers(fitted: Sequence[Curve], letter: str) -> list[str]:
    """For each other provider and mode, where it is faster than recattn and where it is slower, in words."""
    lines = []
    own = {curve.mode: curve for curve in fitted if curve.provider == OWN}
    for curve in fitted:
        if curve.provider == OWN or curve.mode not in own:
            continue
        times = dict(zip(own[curve.mode].sizes, own[curve.mode].ms, strict=True))
        pairs = zip(curve.sizes, curve.ms, strict=True)
        ratios = [(size, ms / times[size]) for size, ms in pairs if size in times]
        if ratios:
            lines.append(f"{curve.mode}: {curve.provider} is {_where(ratios, letter)}")
    return lines


def _where(ratios: Sequence[tuple[float, float]], letter: str) -> str:
    """Of sizes and how many times as long as recattn something takes there."""

    def word(ratio: float) -> str:
        return "slower" if ratio > 1 else "faster"

    factors = [ratio for _, ratio in ratios]
    extremes = f"it takes {min(factors):.2g}× to {max(factors):.2g}× the time of {OWN}"
    steps = [
        (word(b[1]), _crossing(a, b))
        for a, b in zip(ratios[:-1], ratios[1:], strict=True)
        if word(a[1]) != word(b[1])
    ]
    if not steps:
        return f"{word(factors[0])} everywhere: {extremes}"
    begin = f"{word(factors[0])} below {letter}={_rounded(steps[0][1])}"
    return (
        ", ".join([begin, *(f"{after} above {letter}={_rounded(size)}" for after, size in steps)])
        + f"; {extremes}"
    )


def _crossing(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Where a ratio between two points becomes 1, on logarithmic axes."""
    share = math.log(a[1]) / (math.log(a[1]) - math.log(b[1]))
    return a[0] * (b[0] / a[0]) ** share


def ends(measured: Mapping[float, Sequence[Measurement]], letter: str) -> list[str]:
    """For each provider that failed, where it first did and why; modes that did alike together."""
    first: dict[tuple[str, str], str] = {}
    for size in sorted(measured):
        for m in measured[size]:
            if m.error:
                first.setdefault((m.provider, m.mode), f"{letter}={size:g}: {m.error}")
    modes: dict[tuple[str, str], list[str]] = {}
    for (provider, mode), where in first.items():
        modes.setdefault((provider, where), []).append(mode)
    return [f"{', '.join(names)}: {provider} stops at {where}" for (provider, where), names in modes.items()]


def reaches(fitted: Sequence[Curve], limit: float, letter: str) -> list[str]:
    """For each mode the sizes at which providers would take as much memory as there is, in words."""
    found: dict[str, list[str]] = {}
    for curve in fitted:
        size = curve.size_of_bytes(limit)
        if size is not None:
            found.setdefault(curve.mode, []).append(f"{_rounded(size)} ({curve.provider})")
    memory = f"{limit / 2**30:.3g} GiB"
    return [
        f"{mode}: by its growth memory comes to {memory} at about {letter}={', '.join(sizes)}"
        for mode, sizes in found.items()
    ]


def _rounded(size: float) -> str:
    """To two or three digits that count, without an exponent."""
    return f"{float(f'{size:.2g}'):.0f}" if size >= 100 else f"{size:.3g}"


FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "ms": ("time, ms", milliseconds),
    "peak_bytes": ("peak memory, MiB", mebibytes),
}


def cells(
    mode: str,
    field: str,
    measured: Mapping[float, Sequence[Measurement]],
    fitted: Sequence[Curve],
    letter: str,
) -> list[list[str]]:
    """Time or memory over size in one mode, one column per provider that ran: the heading, a row per size, the
    exponents."""
    by_size = {size: {m.provider: m for m in ms if m.mode == mode} for size, ms in measured.items()}
    exponents = {curve.provider: curve.exponents() for curve in fitted if curve.mode == mode}
    result = [[letter, *exponents]]
    for size, row in sorted(by_size.items()):
        result.append([f"{size:g}", *(_figure(row, p, field, FIGURES[field][1]) for p in exponents)])
    of_field = [pair[list(FIGURES).index(field)] for pair in exponents.values()]
    result.append(["", *("" if p is None else f"∝ {letter}^{p:.2f}" for p in of_field)])
    return result


def _figure(row: Mapping[str, Measurement], provider: str, field: str, show: Callable[[float], str]) -> str:
    """A figure, and in brackets how many times recattn's it is."""
    value = getattr(row[provider], field) if provider in row else None
    if value is None:
        return "failed"
    own = getattr(row[OWN], field) if OWN in row and provider != OWN else None
    return f"{show(value)} ({value / own:.1f}×)" if own else show(value)


def table(title: str, content: Sequence[Sequence[str]]) -> Table:
    """`cells` for a rich console."""
    from rich import box
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in content[0]:
        result.add_column(column, justify="right")
    for row in content[1:-1]:
        result.add_row(*row)
    result.add_section()
    result.add_row(*content[-1], style="italic")
    return result
