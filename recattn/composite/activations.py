"""The hidden activations and their derivatives, over storage that may be reused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# Their derivative is a function of their value, so the input need not be kept.
FROM_OUTPUT = frozenset({"sigmoid", "tanh", "relu", "identity"})


def activate(z: Tensor, activation: str, slope: Tensor | float) -> Tensor:
    """`act(z)`; overwrites z for the activations of `FROM_OUTPUT`."""
    match activation:
        case "sigmoid" | "tanh" | "relu":
            return getattr(z, activation + "_")()
        case "silu" | "gelu":
            return getattr(F, activation)(z)
        case "leaky_relu":
            assert isinstance(slope, float)
            return F.leaky_relu(z, slope)
        case "prelu":
            assert isinstance(slope, Tensor)
            return F.prelu(z, slope)
        case "identity":
            return z
    raise NotImplementedError(f"activation {activation!r}")


def activation_backward_(grad: Tensor, z: Tensor, activation: str, slope: Tensor | float) -> Tensor | None:
    """dL/dh to dL/dz, in place; returns dL/dslope for prelu. `z` is h for those of `FROM_OUTPUT`."""
    match activation:
        case "relu":
            aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad)
        case "sigmoid" | "tanh" | "silu" | "gelu":
            getattr(aten, activation + "_backward").grad_input(grad, z, grad_input=grad)
        case "leaky_relu":
            aten.leaky_relu_backward.grad_input(grad, z, slope, False, grad_input=grad)
        case "prelu":
            assert isinstance(slope, Tensor)
            grad_slope = (grad * z.clamp_max(0)).sum(0).sum_to_size(slope.shape)
            grad.mul_(torch.where(z > 0, 1, slope))
            return grad_slope
        case "identity":
            pass
        case _:
            raise NotImplementedError(f"activation {activation!r}")
    return None
