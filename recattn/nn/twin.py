"""Layers that compute the same thing two ways, from the same parameters."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound="Twin")

IMPLEMENTATIONS = ("fused", "eager")


class Twin(nn.Module):
    """A module whose fused layers have an eager twin: padded PyTorch code as ranking libraries write it."""

    implementation: str = "fused"

    def example(self, like: Tensor, offsets: Tensor) -> tuple[Any, ...] | None:  # noqa: ARG002
        """What this layer may be called with over histories that lie as `offsets` says, in the dtype and on the device
        of `like`; None for what is not a layer over histories."""
        return None

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
