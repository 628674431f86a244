"""target_attention: schema, fake, autograd, and its implementations bound to the dispatcher."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from recattn.composite import target_attention as composite
from recattn.ops.library import LIBRARY, choose, differentiable_once, implement

__all__ = ["NORMALIZATIONS", "backward_op", "forward_op"]

NORMALIZATIONS = ("softmax", "none", "exp", "sigmoid")

_ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor values, Tensor offsets, Tensor? query_offsets, Tensor? rows, Tensor? bias,"
    " int num_heads, float scale, str normalize, bool return_lse"
)
LIBRARY.define(
    f"target_attention({_ARGUMENTS}, str backend) -> (Tensor out, Tensor lse, Tensor peak_mass, Tensor exact_out)"
)
LIBRARY.define(
    "target_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor exact_out, Tensor peak_mass,"
    f" {_ARGUMENTS}, str backend) -> Tensor[]"
)
forward_op = torch.ops.recattn.target_attention.default
backward_op = torch.ops.recattn.target_attention_backward.default


def _call(*arguments: Any) -> composite.Call:
    call = composite.Call(*arguments)
    bias = call.bias
    return call if bias is None or bias.dim() == 2 else call._replace(bias=bias.unsqueeze(1))


def _forward(*arguments: Any, on_gpu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, backend = arguments
    call = _call(*given)

    def triton() -> tuple[Tensor, Tensor, Tensor]:
        from recattn.kernels.target_attention import forward

        return forward(call)

    out, lse, peak_mass = choose(
        "target_attention", call, backend, on_gpu, triton, partial(composite.forward, call)
    )
    if call.values.dtype == out.dtype:
        return out, lse, peak_mass, out.new_empty(0)
    return out.to(call.values.dtype), lse, peak_mass, out  # which backward needs before it was rounded


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    exact_out: Tensor,
    peak_mass: Tensor,
    *arguments: Any,
    on_gpu: bool,
) -> list[Tensor]:
    *given, backend = arguments
    call = _call(*given)
    # Σ_t a_t dL/da_t, where Σ_t a_t v_t is out; and what dL/dlse passes to the scores is a_t times it.
    delta = torch.linalg.vecdot(
        *(x.to(call.dtype).unflatten(1, (call.heads, -1)) for x in (grad_out, exact_out))
    )
    if call.return_lse and grad_lse is not None:
        delta -= grad_lse

    def triton() -> tuple[Tensor, ...]:
        from recattn.kernels.target_attention_backward import backward

        return backward(call, grad_out, delta, peak_mass)

    query, keys, values, bias = choose(
        "target_attention",
        call,
        backend,
        on_gpu,
        triton,
        partial(composite.backward, call, grad_out, delta, peak_mass),
    )
    gradients = [g.to(x.dtype) for g, x in zip((query, keys, values), given[:3], strict=True)]
    shift = given[6]
    return gradients if shift is None else [*gradients, bias.to(shift.dtype).view_as(shift)]


implement("target_attention", _forward)
implement("target_attention_backward", _backward)


@torch.library.register_fake("recattn::target_attention", lib=LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, keys, values = arguments[:3]
    out = values.new_empty(query.shape[0], values.shape[1])
    exact = torch.promote_types(keys.dtype, torch.float32)
    peak_mass = query.new_empty(query.shape[0], arguments[7], 2, dtype=exact)
    lse = peak_mass.new_empty(peak_mass.shape[:2] if arguments[10] else 0)
    return out, lse, peak_mass, lse.new_empty(0 if exact == out.dtype else out.shape)


@torch.library.register_fake("recattn::target_attention_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> list[Tensor]:
    query, keys, values, *_, bias = arguments[4:11]
    return [x.new_empty(x.shape) for x in (query, keys, values, bias) if x is not None]


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, peak_mass, exact_out = forward_op(*arguments)
        ctx.save_for_backward(out if exact_out.dtype == out.dtype else exact_out, peak_mass, *arguments[:7])
        ctx.options = arguments[7:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak_mass, exact_out)
        return out, lse, peak_mass, exact_out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
        exact_out, peak_mass, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(exact_out, dtype=tensors[0].dtype)
        query, keys, values, *bias = backward_op(
            grad_out, grad_lse, exact_out, peak_mass, *tensors, *ctx.options
        )
        return query, keys, values, None, None, None, *(bias or [None]), *(None for _ in ctx.options)


def _with_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    return _Autograd.apply(*arguments)


LIBRARY.impl("target_attention", _with_autograd, "Autograd")
differentiable_once("target_attention")
