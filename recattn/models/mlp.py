"""The dense head of a ranking model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def mlp(width: int, hidden: Sequence[int], *, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers from `width` over the widths of `hidden` to one logit; PReLU, one slope per unit, and
    then dropout behind each hidden one.

    Raises:
        ValueError: for a width below 1, or a dropout outside [0, 1).
    """
    if width < 1 or any(size < 1 for size in hidden):
        raise ValueError(f"hidden: expected positive widths, got {tuple(hidden)} after {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.PReLU(size), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, 1))
