"""activation_unit_statistics: what kernels cover."""

from __future__ import annotations

from typing import Any


def uncovered(_unit: Any) -> str | None:
    """Why no kernel here takes this call, or None if one does."""
    return "no kernel takes the statistics of hidden layers"
