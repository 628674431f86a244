"""The least time that a chip needs for an operator: a model, not a measurement."""

from __future__ import annotations

from typing import NamedTuple

from recattn.inspect.calls import Work
from recattn.inspect.chips import Chip

__all__ = ["Bound", "bound_of"]


class Bound(NamedTuple):
    """Each resource is taken to be busy all the time; latency, occupancy and steps that wait for each other, as those
    of a GRU, are not modelled."""

    bytes: float
    flops: float
    microseconds: float
    binds: str  # memory, matrix units, fma or special functions

    @property
    def intensity(self) -> float:
        """Flops per byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """Flops a second at that time, in units of 10¹²."""
        return self.flops / self.microseconds / 1e6


def bound_of(work: Work, chip: Chip, dtype: str) -> Bound:
    needed = {
        "memory": work.bytes / chip.bandwidth,
        "matrix units": work.products / chip.products(dtype),
        "fma": work.flops / chip.fma,
        "special functions": work.special / chip.special,
    }
    binds = max(needed, key=lambda resource: needed[resource])
    return Bound(work.bytes, work.products + work.flops, needed[binds] / 1e6, binds)
