"""Ranking models out of fused layers."""

from recattn.models.din import DIN

__all__ = ["DIN"]
