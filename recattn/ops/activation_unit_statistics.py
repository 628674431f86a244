"""activation_unit_statistics: mean and variance of the pre-activations of a hidden layer of activation_unit.

Nothing is stored but these: they are computed from the histories, and backward computes the layers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recattn.composite import activation_unit_statistics as composite
from recattn.composite.network import Unit
from recattn.ops.activation_unit import (
    fake_gradients,
    grouped,
    in_dtypes,
    of_table,
    unfolded,
    unit_of,
)
from recattn.ops.library import LIBRARY, choose, differentiable_once, implement

__all__ = ["backward_op", "forward_op"]

_ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor offsets, Tensor? values, Tensor? query_offsets, Tensor? rows, Tensor? seed,"
    " Tensor[] weights, Tensor[] biases, Tensor[] params, bool unique_rows, bool sparse_grad, str[] features,"
    " str activation, float negative_slope, float dropout, str backend"
)
LIBRARY.define(f"activation_unit_statistics({_ARGUMENTS}) -> (Tensor mean, Tensor variance, Tensor count)")
LIBRARY.define(
    "activation_unit_statistics_backward("
    f"Tensor grad_mean, Tensor grad_variance, Tensor mean, Tensor count, {_ARGUMENTS}) -> Tensor[]"
)
forward_op = torch.ops.recattn.activation_unit_statistics.default
backward_op = torch.ops.recattn.activation_unit_statistics_backward.default


def _forward(*arguments: Any, on_gpu: bool) -> tuple[Tensor, Tensor, Tensor]:
    *call, backend = arguments
    unit = unit_of(*call)

    def triton() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from recattn.kernels.activation_unit_statistics import forward

        return forward(unit)

    parts = choose(
        "activation_unit_statistics", unit, backend, on_gpu, triton, partial(composite.forward, unit)
    )
    return *_joined(*parts), unit.offsets[-1].to(torch.int64, copy=True)


def _joined(counts: Tensor, centres: Tensor, totals: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all rows from the sums of parts, without a difference of large numbers; 0 of no rows."""
    dtype = centres.dtype
    rows, centres, totals, squares = (x.double() for x in (counts.unsqueeze(1), centres, totals, squares))
    count = rows.sum().clamp_min(1)
    offsets = totals / rows.clamp_min(1)  # of the parts' means from their centres
    means = centres + offsets
    mean = (rows * means).sum(0) / count
    within = (squares - totals * offsets).sum(0)
    variance = (within + (rows * (means - mean).square()).sum(0)) / count
    return mean.to(dtype), variance.clamp_min(0).to(dtype)


def _backward(
    grad_mean: Tensor, grad_variance: Tensor, mean: Tensor, count: Tensor, *arguments: Any, on_gpu: bool
) -> list[Tensor]:
    *call, backend = arguments
    unit = _centred(unit_of(*call), mean)
    total = count.clamp_min(1)
    linear, quadratic = grad_mean / total, 2 * grad_variance / total

    def triton() -> tuple[Any, ...]:
        from recattn.kernels.activation_unit_statistics import backward

        return backward(unit, linear, quadratic)

    query, keys, *folded = choose(
        "activation_unit_statistics",
        unit,
        backend,
        on_gpu,
        triton,
        partial(composite.backward, unit, linear, quadratic),
    )
    grad_query, *gradients = unfolded(unit, call[12], query, *folded)
    return in_dtypes([grad_query, keys, *gradients], call)


def _centred(unit: Unit, mean: Tensor) -> Unit:
    """The call whose pre-activations are less by their mean: sums of their products lose nothing to it."""
    if unit.biases:
        return unit._replace(biases=[*unit.biases[:-1], unit.biases[-1] - mean])
    return unit._replace(first=unit.first._replace(bias=unit.first.bias - mean))


implement("activation_unit_statistics", _forward)
implement("activation_unit_statistics_backward", _backward)


@torch.library.register_fake("recattn::activation_unit_statistics", lib=LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, keys, offsets = arguments[:3]
    dtype = torch.promote_types(keys.dtype, torch.float32)
    mean = query.new_empty(arguments[7][-1].shape[0], dtype=dtype)
    return mean, torch.empty_like(mean), offsets.new_empty((), dtype=torch.int64)


@torch.library.register_fake("recattn::activation_unit_statistics_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> list[Tensor]:
    return fake_gradients(*arguments[4:15])


class _Autograd(torch.autograd.Function):
    """As that of activation_unit."""

    @staticmethod
    def forward(ctx: Any, layers: int, options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        data, groups = tensors[:7], tensors[7:]
        with torch._C._AutoDispatchBelowAutograd():
            mean, variance, count = forward_op(*data, *grouped(groups, layers), *options)
        ctx.save_for_backward(mean, count, *tensors)
        ctx.layers, ctx.options = layers, options
        ctx.mark_non_differentiable(count)
        return mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor, _: Tensor) -> tuple[Any, ...]:
        mean, count, *tensors = ctx.saved_tensors
        data, groups = tensors[:7], tensors[7:]
        grad_query, keys, *gradients = backward_op(
            grad_mean, grad_variance, mean, count, *data, *grouped(groups, ctx.layers), *ctx.options
        )
        grad_keys = of_table(keys, data, ctx.options)
        return None, None, grad_query, grad_keys, None, None, None, None, None, *gradients


def _with_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    data: Sequence[Any] = arguments[:7]
    weights, biases, params = arguments[7:10]
    return _Autograd.apply(len(weights), arguments[10:], *data, *weights, *biases, *(params or ()))


LIBRARY.impl("activation_unit_statistics", _with_autograd, "Autograd")
differentiable_once("activation_unit_statistics")
