"""attentional_gru: schema, fake, autograd, and its implementations bound to the dispatcher."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from recattn.composite import attentional_gru as composite
from recattn.ops.library import LIBRARY, choose, differentiable_once, implement

__all__ = ["KINDS", "UPDATES", "backward_op", "forward_op"]

KINDS = ("gru", "agru", "aigru", "augru")
UPDATES = ("paper", "official")

_ARGUMENTS = (
    "Tensor inputs, Tensor offsets, Tensor? scores, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih,"
    " Tensor bias_hh, Tensor? h0, str kind, str update, bool reset_after, str backend"
)
LIBRARY.define(f"attentional_gru({_ARGUMENTS}) -> (Tensor states, Tensor last)")
LIBRARY.define(
    f"attentional_gru_backward(Tensor? grad_states, Tensor? grad_last, Tensor states, {_ARGUMENTS}) -> Tensor[]"
)
forward_op = torch.ops.recattn.attentional_gru.default
backward_op = torch.ops.recattn.attentional_gru_backward.default


def _forward(*arguments: Any, on_gpu: bool) -> tuple[Tensor, Tensor]:
    *call, backend = arguments
    recurrence = composite.Recurrence(*call)

    def triton() -> tuple[Tensor, Tensor]:
        from recattn.kernels.attentional_gru import forward

        return forward(recurrence)

    return choose(
        "attentional_gru",
        recurrence,
        backend,
        on_gpu,
        triton,
        partial(composite.forward, recurrence),
    )


def _backward(
    grad_states: Tensor | None, grad_last: Tensor | None, states: Tensor, *arguments: Any, on_gpu: bool
) -> list[Tensor]:
    *call, backend = arguments
    recurrence = composite.Recurrence(*call)
    upstream = states, grad_states, grad_last

    def triton() -> tuple[Tensor | None, ...]:
        from recattn.kernels.attentional_gru_backward import backward

        return backward(recurrence, *upstream)

    gradients = choose(
        "attentional_gru",
        recurrence,
        backend,
        on_gpu,
        triton,
        partial(composite.backward, recurrence, *upstream),
    )
    return [gradient.to(states.dtype) for gradient in gradients if gradient is not None]


implement("attentional_gru", _forward)
implement("attentional_gru_backward", _backward)


@torch.library.register_fake("recattn::attentional_gru", lib=LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, offsets, _, _, weight_hh = arguments[:5]
    size = weight_hh.shape[1]
    return inputs.new_empty(inputs.shape[0], size), inputs.new_empty(offsets.shape[0] - 1, size)


@torch.library.register_fake("recattn::attentional_gru_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> list[Tensor]:
    inputs, _, *others = arguments[3:11]
    return [t.new_empty(t.shape) for t in (inputs, *others) if t is not None]


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            states, last = forward_op(*arguments)
        ctx.save_for_backward(states, *arguments[:8])
        ctx.options = arguments[8:]
        ctx.set_materialize_grads(False)
        return states, last

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
        states, *tensors = ctx.saved_tensors
        gradients = backward_op(grad_states, grad_last, states, *tensors, *ctx.options)
        optional = [None if tensor is None else gradients.pop(1) for tensor in tensors[2:]]
        return gradients[0], None, *optional, *[None] * len(ctx.options)


def _with_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _Autograd.apply(*arguments)


LIBRARY.impl("attentional_gru", _with_autograd, "Autograd")
differentiable_once("attentional_gru")
