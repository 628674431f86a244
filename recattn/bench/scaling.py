"""How time and memory grow with the length of the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recattn.bench.measure import Measurement


@dataclass(frozen=True)
class Curve:
    """One provider in one mode, over the lengths at which it ran.

    Args:
        lengths: L, the longest history of a batch, ascending.
        ms, peak_bytes: at each length.
    """

    provider: str
    mode: str
    lengths: tuple[int, ...]
    ms: tuple[float, ...]
    peak_bytes: tuple[float, ...]

    def exponents(self) -> tuple[float, float] | tuple[None, None]:
        """Of time and of memory; None for a curve of one point."""
        if len(self.lengths) < 2:
            return None, None
        return fit_exponent(self.lengths, self.ms), fit_exponent(self.lengths, self.peak_bytes)


def curves(measured: Mapping[int, Sequence[Measurement]]) -> list[Curve]:
    """One curve per provider and mode, from measurements by length, of the points that have figures."""
    points: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for length in sorted(measured):
        for m in measured[length]:
            if m.ms and m.peak_bytes:
                points.setdefault((m.provider, m.mode), []).append((length, m.ms, m.peak_bytes))
    return [Curve(*name, *zip(*at, strict=True)) for name, at in points.items()]


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    r"""The exponent p of `values ∝ lengths^p`: the least-squares slope of log value over log length.

    Over the upper half of the lengths only: the lower half is bent by what a call costs at any length.

    Args:
        lengths: positive and ascending.
        values: positive, one per length.

    Raises:
        ValueError: for fewer than two points, or a number that is not positive.
    """
    if len(lengths) != len(values) or len(lengths) < 2:
        raise ValueError(f"values: expected at least 2, one per length, got {len(values)} for {len(lengths)}")
    if min(*lengths, *values) <= 0:
        raise ValueError(
            f"lengths, values: expected positive numbers, got {list(lengths)} and {list(values)}"
        )
    upper = slice(min(len(lengths) // 2, len(lengths) - 2), None)
    return float(np.polyfit(np.log(lengths[upper]), np.log(values[upper]), 1)[0])
