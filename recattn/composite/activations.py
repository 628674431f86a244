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


def activation_backward(
    grad: Tensor, z: Tensor, activation: str, slope: Tensor | float
) -> tuple[Tensor, Tensor | None]:
    """dL/dz from dL/dh, and dL/dslope for prelu. `z` is h for the activations of `FROM_OUTPUT`."""
    match activation:
        case "sigmoid":
            return aten.sigmoid_backward(grad, z), None
        case "tanh":
            return aten.tanh_backward(grad, z), None
        case "relu":
            return aten.threshold_backward(grad, z, 0), None
        case "silu":
            return aten.silu_backward(grad, z), None
        case "gelu":
            return aten.gelu_backward(grad, z), None
        case "leaky_relu":
            return aten.leaky_relu_backward(grad, z, slope, False), None
        case "prelu":
            assert isinstance(slope, Tensor)
            grad_slope = (grad * z.clamp_max(0)).sum(0)
            return grad * torch.where(z > 0, 1, slope), grad_slope.sum_to_size(slope.shape)
        case "identity":
            return grad, None
    raise NotImplementedError(f"activation {activation!r}")
