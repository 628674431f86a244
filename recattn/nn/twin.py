"""Layers that compute the same thing two ways, from the same parameters."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

T = TypeVar("T", bound="Twin")

IMPLEMENTATIONS = ("fused", "eager")


class Twin(nn.Module):
    """A module whose fused layers have an eager twin: padded PyTorch code as ranking libraries write it."""

    implementation: str = "fused"

    def use(self: T, implementation: str) -> T:
        """Switches this module and all below it to `"fused"` or `"eager"`; parameters stay where they are.

        Raises:
            ValueError: for another name.
        """
        if implementation not in IMPLEMENTATIONS:
            expected = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"implementation: expected one of {expected}, got {implementation!r}")
        for module in self.modules():
            if isinstance(module, Twin):
                module.implementation = implementation
        return self
