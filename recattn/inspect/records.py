"""What is told of each kernel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from recattn.inspect.roofline import Bound

__all__ = ["Record"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one kernel of a call came to. Figures are None where it did not compile."""

    op: str
    kernel: str
    arch: str
    dtype: str
    shape: str
    config: dict[str, Any]
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    occupancy: float | None = None
    ok: bool  # compiled, fits the chip, and nothing spilled
    error: str | None
    step: str  # forward or backward
    module: str  # of `recattn.kernels`, that has the kernel
    instructions: dict[str, Any] | None = None  # static counts, see `disassembly.Instructions`
    matrix_units: bool | None = None
    roofline: Bound  # of the operator's forward or backward as a whole

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "roofline": self.roofline._asdict()}
