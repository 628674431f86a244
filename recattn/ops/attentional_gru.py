"""attentional_gru: schema, fake, autograd, and its implementations bound to the dispatcher."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from recattn.composite import attentional_gru as composite
from recattn.ops.library import LIBRARY, choose, differentiable_once, implement
from recattn.ops.rows import table_gradient

__all__ = ["KINDS", "UPDATES", "backward_op", "forward_op"]

KINDS = ("gru", "agru", "aigru", "augru")
UPDATES = ("paper", "official")

_ARGUMENTS = (
    "Tensor inputs, Tensor offsets, Tensor? scores, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih,"
    " Tensor bias_hh, Tensor? h0, Tensor? rows, bool unique_rows, bool row_scores, bool sparse_grad, str kind,"
    " str update, bool reset_after, str backend"
)
LIBRARY.define(f"attentional_gru({_ARGUMENTS}) -> (Tensor states, Tensor last)")
LIBRARY.define(
    f"attentional_gru_backward(Tensor? grad_states, Tensor? grad_last, Tensor states, {_ARGUMENTS}) -> Tensor[]"
)
forward_op = torch.ops.recattn.attentional_gru.default
backward_op = torch.ops.recattn.attentional_gru_backward.default


def recurrence_of(*arguments: Any) -> composite.Recurrence:
    *sequences, unique_rows, row_scores, _sparse_grad, kind, update, reset_after = arguments
    indexed = sequences[-1] is not None  # the rows
    options = (unique_rows and indexed, row_scores and indexed, kind, update, reset_after)
    return composite.Recurrence._make([*sequences, *options])


def _forward(*arguments: Any, on_gpu: bool) -> tuple[Tensor, Tensor]:
    *call, backend = arguments
    recurrence = recurrence_of(*call)

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
    recurrence = recurrence_of(*call)
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
    inputs, offsets, _, _, weight_hh, _, _, _, rows = arguments[:9]
    size = weight_hh.shape[1]
    positions = inputs.shape[0] if rows is None else rows.numel()
    return inputs.new_empty(positions, size), inputs.new_empty(offsets.shape[0] - 1, size)


@torch.library.register_fake("recattn::attentional_gru_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> list[Tensor]:
    inputs, _, scores, *others = arguments[3:11]
    rows, unique_rows, row_scores = arguments[11:14]
    if rows is not None and not unique_rows:
        inputs = inputs.new_empty(rows.numel(), inputs.shape[1])
    if rows is not None and not unique_rows and row_scores and scores is not None:
        scores = scores.new_empty(rows.numel())
    return [t.new_empty(t.shape) for t in (inputs, scores, *others) if t is not None]


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            states, last = forward_op(*arguments)
        ctx.save_for_backward(states, *arguments[:9])
        ctx.options = arguments[9:]
        ctx.set_materialize_grads(False)
        return states, last

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
        states, *tensors = ctx.saved_tensors
        gradients = backward_op(grad_states, grad_last, states, *tensors, *ctx.options)
        inputs, offsets, scores, *others, rows = tensors
        unique_rows, row_scores, sparse_grad, *_ = ctx.options
        grad_inputs = gradients.pop(0)
        grad_scores = None if scores is None else gradients.pop(0)
        if rows is not None and not unique_rows:
            grad_inputs = table_gradient(grad_inputs, rows, offsets[-1], inputs.shape[0], sparse_grad)
            if grad_scores is not None and row_scores:
                grad_scores = grad_scores.unsqueeze(1)
                grad_scores = table_gradient(grad_scores, rows, offsets[-1], scores.shape[0], False).squeeze(
                    1
                )
        optional = [None if tensor is None else gradients.pop(0) for tensor in others]
        return grad_inputs, None, grad_scores, *optional, None, *[None] * len(ctx.options)


def _with_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _Autograd.apply(*arguments)


LIBRARY.impl("attentional_gru", _with_autograd, "Autograd")
differentiable_once("attentional_gru")
