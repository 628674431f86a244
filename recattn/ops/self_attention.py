"""self_attention: schema, fake, autograd, and its implementations bound to the dispatcher."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from recattn.composite import self_attention as composite
from recattn.ops.library import LIBRARY, Variant, choose, differentiable_once, implement

__all__ = ["backward_op", "forward_op"]

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? table, Tensor? positions, Tensor? seed, int heads,"
    " float scale, bool causal, bool hide_self, float dropout, str backend"
)
LIBRARY.define(f"self_attention({_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor exact_out)")
LIBRARY.define(
    f"self_attention_backward(Tensor grad_out, Tensor out, Tensor lse, Tensor exact_out, {_ARGUMENTS}) -> Tensor[]"
)
PADDED = Variant("padded groups", "to pad short sequences costs less than a call for each length")
forward_op = torch.ops.recattn.self_attention.default
backward_op = torch.ops.recattn.self_attention_backward.default


def _forward(*arguments: Any, on_gpu: bool) -> tuple[Tensor, Tensor, Tensor]:
    *options, backend = arguments
    call = composite.Attention(*options)

    def triton() -> tuple[Tensor, Tensor, Tensor]:
        from recattn.kernels.self_attention import forward

        return forward(call)

    def variant() -> Variant | None:
        return PADDED if composite.pads(call) else None

    return choose("self_attention", call, backend, on_gpu, triton, partial(composite.forward, call), variant)


def _backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, exact_out: Tensor, *arguments: Any, on_gpu: bool
) -> list[Tensor]:
    *options, backend = arguments
    call = composite.Attention(*options)
    if exact_out.numel():
        out = exact_out

    def triton() -> tuple[Tensor, ...]:
        from recattn.kernels.self_attention_backward import backward

        return backward(call, grad_out, out, lse)

    *gradients, table = choose(
        "self_attention",
        call,
        backend,
        on_gpu,
        triton,
        partial(composite.backward, call, grad_out, out, lse),
    )
    return [*gradients, *([] if call.table is None else [table.to(call.table.dtype)])]


implement("self_attention", _forward)
implement("self_attention_backward", _backward)


@torch.library.register_fake("recattn::self_attention", lib=LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, _, v, _, table, _, _, heads = arguments[:8]
    lse = q.new_empty(heads, q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    rounded = table is not None and lse.dtype != v.dtype
    return v.new_empty(v.shape), lse, lse.new_empty(v.shape if rounded else 0)


@torch.library.register_fake("recattn::self_attention_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> list[Tensor]:
    q, k, v, _, table = arguments[4:9]
    return [x.new_empty(x.shape) for x in (q, k, v, *([] if table is None else [table]))]


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, exact_out = forward_op(*arguments)
        ctx.save_for_backward(out, lse, exact_out, *arguments[:7])
        ctx.options = arguments[7:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, exact_out)
        return out, lse, exact_out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 13
        grad_q, grad_k, grad_v, *table = backward_op(grad_out, *ctx.saved_tensors, *ctx.options)
        return grad_q, grad_k, grad_v, None, *(table or [None]), *(None,) * 8


def _with_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*arguments)
    return _Autograd.apply(*arguments)


LIBRARY.impl("self_attention", _with_autograd, "Autograd")
differentiable_once("self_attention")
