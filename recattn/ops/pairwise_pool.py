"""pairwise_pool: schema, fake, autograd, and its implementations bound to the dispatcher."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from recattn.composite import pairwise_pool as composite
from recattn.ops.library import LIBRARY, choose, differentiable_once, implement

__all__ = ["backward_op", "forward_op"]

_ARGUMENTS = (
    "Tensor fields, Tensor weight, Tensor bias, Tensor projection, Tensor? seed, float dropout,"
    " bool return_weights, str backend"
)
LIBRARY.define(
    f"pairwise_pool({_ARGUMENTS}) -> (Tensor out, Tensor weights, Tensor peak_mass, Tensor exact_out,"
    " Tensor exact_weights)"
)
LIBRARY.define(
    "pairwise_pool_backward(Tensor grad_out, Tensor? grad_weights, Tensor peak_mass, Tensor exact_out,"
    f" Tensor exact_weights, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
forward_op = torch.ops.recattn.pairwise_pool.default
backward_op = torch.ops.recattn.pairwise_pool_backward.default


def _forward(*arguments: Any, on_gpu: bool) -> tuple[Tensor, ...]:
    *given, backend = arguments
    call = composite.Call(*given)

    def triton() -> tuple[Tensor, Tensor, Tensor]:
        from recattn.kernels.pairwise_pool import forward

        out, peak_mass, scores = forward(call)
        return (
            out,
            peak_mass,
            composite.weights_of(call, scores, peak_mass) if call.return_weights else scores,
        )

    exact_out, peak_mass, exact_weights = choose(
        "pairwise_pool", call, backend, on_gpu, triton, partial(composite.forward, call)
    )
    if call.fields.dtype == call.dtype:
        return exact_out, exact_weights, peak_mass, peak_mass.new_empty(0), peak_mass.new_empty(0)
    out, weights = (x.to(call.fields.dtype) for x in (exact_out, exact_weights))
    return out, weights, peak_mass, exact_out, exact_weights  # which backward needs before they were rounded


def _backward(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    peak_mass: Tensor,
    exact_out: Tensor,
    exact_weights: Tensor,
    *arguments: Any,
    on_gpu: bool,
) -> tuple[Tensor, ...]:
    *given, backend = arguments
    call = composite.Call(*given)
    grad_weights = grad_weights if call.return_weights else None

    def triton() -> tuple[Tensor, ...]:
        from recattn.kernels.pairwise_pool_backward import backward

        # Σ_p a_p dL/da_p, where Σ_p a_p v_i v_j is out.
        delta = torch.linalg.vecdot(grad_out.to(call.dtype), exact_out)
        if grad_weights is not None:
            delta += torch.linalg.vecdot(grad_weights.to(call.dtype), exact_weights)
        return backward(call, grad_out, grad_weights, delta, peak_mass)

    gradients = choose(
        "pairwise_pool",
        call,
        backend,
        on_gpu,
        triton,
        partial(composite.backward, call, grad_out, grad_weights, peak_mass),
    )
    return tuple(g.to(x.dtype) for g, x in zip(gradients, given, strict=False))


implement("pairwise_pool", _forward)
implement("pairwise_pool_backward", _backward)


@torch.library.register_fake("recattn::pairwise_pool", lib=LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    fields, return_weights = arguments[0], arguments[6]
    batch, count, width = fields.shape
    pairs = count * (count - 1) // 2 if return_weights else 0
    exact = torch.promote_types(fields.dtype, torch.float32)
    rounded = exact != fields.dtype
    peak_mass = fields.new_empty(batch, 2, dtype=exact)
    return (
        fields.new_empty(batch, width),
        fields.new_empty(batch, pairs),
        peak_mass,
        peak_mass.new_empty((batch, width) if rounded else 0),
        peak_mass.new_empty((batch, pairs) if rounded else 0),
    )


@torch.library.register_fake("recattn::pairwise_pool_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[5:9])


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out, weights, peak_mass, exact_out, exact_weights = forward_op(*arguments)
        exact = (exact_out, exact_weights) if peak_mass.dtype != out.dtype else (out, weights)
        ctx.save_for_backward(peak_mass, *exact, *arguments[:5])
        ctx.options = arguments[5:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak_mass, exact_out, exact_weights)
        return out, weights, peak_mass, exact_out, exact_weights

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, *_: Any) -> tuple[Any, ...]:
        peak_mass, exact_out, exact_weights, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(exact_out, dtype=tensors[0].dtype)
        gradients = backward_op(
            grad_out, grad_weights, peak_mass, exact_out, exact_weights, *tensors, *ctx.options
        )
        return *gradients, None, *(None for _ in ctx.options)


LIBRARY.impl("pairwise_pool", _Autograd.apply, "Autograd")
differentiable_once("pairwise_pool")
