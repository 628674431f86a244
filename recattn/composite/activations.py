"""The hidden activations and their derivatives, over storage that may be reused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# Their derivative is a function of their value, so the input need not be kept.
FROM_OUTPUT = frozenset({"sigmoid", "tanh", "relu", "identity"})
# Vectors over the units, or of one element: for prelu its slope; for dice alpha, and scale and shift of what its
# sigmoid takes. For leaky_relu the slope, a number.
Params = tuple[Any, ...]


def activate(z: Tensor, activation: str, params: Params) -> Tensor:
    """`act(z)`; overwrites z for the activations of `FROM_OUTPUT`."""
    match activation:
        case "sigmoid" | "tanh" | "relu":
            return getattr(z, activation + "_")()
        case "silu" | "gelu":
            return getattr(F, activation)(z)
        case "leaky_relu" | "prelu":
            return getattr(F, activation)(z, *params)
        case "dice":
            alpha, scale, shift = params
            gate = torch.addcmul(shift, z, scale).sigmoid_()
            return gate.mul_(1 - alpha).add_(alpha).mul_(z)
        case "identity":
            return z
    raise NotImplementedError(f"activation {activation!r}")


def activation_backward_(grad: Tensor, z: Tensor, activation: str, params: Params) -> tuple[Tensor, ...]:
    """dL/dh to dL/dz, in place; returns the gradients of those params that are tensors. `z` is h for those of
    `FROM_OUTPUT`."""
    match activation:
        case "relu":
            aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad)
        case "sigmoid" | "tanh" | "silu" | "gelu":
            getattr(aten, activation + "_backward").grad_input(grad, z, grad_input=grad)
        case "leaky_relu":
            aten.leaky_relu_backward.grad_input(grad, z, params[0], False, grad_input=grad)
        case "prelu":
            (slope,) = params
            grad_slope = (grad * z.clamp_max(0)).sum(0).sum_to_size(slope.shape)
            grad.mul_(torch.where(z > 0, 1, slope))
            return (grad_slope,)
        case "dice":
            return _dice_backward_(grad, z, params)
        case "identity":
            pass
        case _:
            raise NotImplementedError(f"activation {activation!r}")
    return ()


def _dice_backward_(grad: Tensor, z: Tensor, params: Params) -> tuple[Tensor, ...]:
    """Of `h = z·(alpha + (1 - alpha)·p)`, `p = sigmoid(scale·z + shift)`."""
    alpha, scale, shift = params
    gate = torch.addcmul(shift, z, scale).sigmoid_()
    through = grad * z
    grad_alpha = torch.addcmul(through, through, gate, value=-1).sum(0)
    through.mul_(gate).addcmul_(through, gate, value=-1).mul_(1 - alpha)  # dL/d(scale·z + shift)
    grad.mul_(gate.mul_(1 - alpha).add_(alpha)).addcmul_(through, scale)
    grad_shift = through.sum(0)
    grad_scale = through.mul_(z).sum(0)
    grads = (grad_alpha, grad_scale, grad_shift)
    return tuple(g.sum_to_size(p.shape) for g, p in zip(grads, params, strict=True))
