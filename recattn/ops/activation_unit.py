"""activation_unit: schema, fake, autograd, and its implementations bound to the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from recattn.composite import activation_unit as composite
from recattn.composite.segments import Segments
from recattn.ops.candidates import Candidates
from recattn.ops.dropout import Dropout
from recattn.ops.fold import FEATURES, fold, unfold
from recattn.ops.library import LIBRARY, choose, differentiable_once, implement
from recattn.ops.rows import table_gradient

__all__ = ["ACTIVATIONS", "FEATURES", "NORMALIZATIONS", "backward_op", "forward_op"]

ACTIVATIONS = ("sigmoid", "relu", "leaky_relu", "prelu", "silu", "gelu", "tanh", "identity", "dice")
NORMALIZATIONS = ("softmax", "none", "exp", "sigmoid")

_ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor offsets, Tensor? values, Tensor? query_offsets, Tensor? rows, Tensor? seed,"
    " Tensor[] weights, Tensor[] biases, Tensor[] params, bool unique_rows, bool sparse_grad, str[] features,"
    " str activation, float negative_slope, float dropout, str normalize, float scale"
)
LIBRARY.define(
    f"activation_unit({_ARGUMENTS}, bool return_scores, str backend) "
    " -> (Tensor out, Tensor scores, Tensor peak_mass, Tensor exact_out)"
)
LIBRARY.define(
    f"activation_unit_backward(Tensor grad_out, Tensor? grad_scores, Tensor exact_out, Tensor scores, Tensor peak_mass,"
    f" {_ARGUMENTS}, str backend) -> Tensor[]"
)
forward_op = torch.ops.recattn.activation_unit.default
backward_op = torch.ops.recattn.activation_unit_backward.default


def unit_of(
    query: Tensor,
    keys: Tensor,
    offsets: Tensor,
    values: Tensor | None,
    query_offsets: Tensor | None,
    rows: Tensor | None,
    seed: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    params: Sequence[Tensor],
    unique_rows: bool,
    _sparse_grad: bool,
    features: Sequence[str],
    activation: str,
    negative_slope: float,
    dropout: float,
    normalize: str = "none",
    scale: float = 1.0,
) -> composite.Unit:
    """The call with its first layer folded, in fp32 at least."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    weights, biases, params = (
        [t.to(dtype).contiguous() for t in group] for group in (weights, biases, params)
    )
    candidates = None
    if query_offsets is not None:
        candidates, offsets = Candidates.of(query_offsets, offsets, query.shape[0])
    each = len(params) // max(len(weights) - 1, 1)  # params of a hidden layer
    return composite.Unit(
        query=query,
        keys=keys,
        values=keys if values is None else values,
        offsets=offsets,
        candidates=candidates,
        rows=rows,
        unique_rows=unique_rows and rows is not None and candidates is None,
        first=fold(weights[0], biases[0], query.to(dtype), features),
        weights=weights[1:],
        biases=biases[1:],
        params=[
            tuple(params[layer * each : (layer + 1) * each])
            or (negative_slope,) * (activation == "leaky_relu")
            for layer in range(len(weights) - 1)
        ],
        activation=activation,
        dropout=Dropout.of(dropout, seed),
        normalize=normalize,
        scale=scale,
    )


def _forward(*arguments: Any, on_gpu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *call, return_scores, backend = arguments
    unit = unit_of(*call)

    def triton() -> tuple[Tensor, Tensor, Tensor]:
        from recattn.kernels.activation_unit import forward

        return forward(unit, return_scores)

    out, scores, peak_mass = choose(
        "activation_unit", unit, backend, on_gpu, triton, partial(composite.forward, unit)
    )
    dtype = unit.values.dtype
    scores = scores.to(dtype) if return_scores else scores.new_empty(0, dtype=dtype)
    if dtype == out.dtype:
        return out, scores, peak_mass, out.new_empty(0)
    return out.to(dtype), scores, peak_mass, out  # which backward needs before it was rounded


def _backward(
    grad_out: Tensor,
    grad_scores: Tensor | None,
    exact_out: Tensor,
    scores: Tensor,
    peak_mass: Tensor,
    *arguments: Any,
    on_gpu: bool,
) -> list[Tensor]:
    *call, backend = arguments
    unit = unit_of(*call)
    delta = None
    if unit.normalize == "softmax":  # Σ_t a_t dL/da_t, where Σ_t a_t v_t is out
        delta = torch.linalg.vecdot(grad_out.to(unit.dtype), exact_out)
        if grad_scores is not None:
            products = scores.to(unit.dtype) * grad_scores
            delta += Segments.of(unit.offsets, unit.positions).sum(products.unsqueeze(1)).squeeze(1)

    def triton() -> tuple[Tensor, ...]:
        from recattn.kernels.activation_unit_backward import backward

        return backward(unit, grad_out, grad_scores, delta, peak_mass)

    query, keys, values, key, product, bias, weights, biases, params = choose(
        "activation_unit",
        unit,
        backend,
        on_gpu,
        triton,
        partial(composite.backward, unit, grad_out, grad_scores, delta, peak_mass),
    )
    if unit.normalize == "softmax":  # which the last bias shifts and does not change
        biases[-1] = torch.zeros_like(biases[-1])
    gradients = unfolded(unit, call[12], query, key, product, bias, weights, biases, params)
    return in_dtypes([gradients[0], keys, *([] if values is None else [values]), *gradients[1:]], call)


def unfolded(
    unit: composite.Unit,
    features: Sequence[str],
    query: Tensor,
    key: Tensor,
    product: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    params: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of the query, all weights, all biases and the params, from those of the folded call."""
    weight, first_bias, through_bias = unfold(
        key, product, bias, unit.first, unit.query.to(unit.dtype), features
    )
    return [query + through_bias, weight, *weights, first_bias, *biases, *params]


def in_dtypes(gradients: Sequence[Tensor], call: Sequence[Any]) -> list[Tensor]:
    """Of the query, the keys, the values if there are such, weights, biases and params: each in its tensor's."""
    query, keys, _, values, *_ = call
    tensors = [query, keys, *([] if values is None else [values]), *chain(*call[7:10])]
    return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, tensors, strict=True)]


implement("activation_unit", _forward)
implement("activation_unit_backward", _backward)


@torch.library.register_fake("recattn::activation_unit", lib=LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, keys, _, values, _, rows = arguments[:6]
    return_scores = arguments[-2]
    values = keys if values is None else values
    out = values.new_empty(query.shape[0], values.shape[1])
    positions = keys.shape[0] if rows is None else rows.numel()
    scores = values.new_empty(positions if return_scores else 0)
    peak_mass = query.new_empty(query.shape[0], 2, dtype=torch.promote_types(keys.dtype, torch.float32))
    return out, scores, peak_mass, peak_mass.new_empty(0 if peak_mass.dtype == out.dtype else out.shape)


@torch.library.register_fake("recattn::activation_unit_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> list[Tensor]:
    return fake_gradients(*arguments[5:16])


def fake_gradients(
    query: Tensor,
    keys: Tensor,
    _offsets: Tensor,
    values: Tensor | None,
    query_offsets: Tensor | None,
    rows: Tensor | None,
    _seed: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    params: Sequence[Tensor],
    unique_rows: bool,
) -> list[Tensor]:
    read = [keys, *([] if values is None else [values])]
    if rows is not None and not (unique_rows and query_offsets is None):
        read = [tensor.new_empty(rows.numel(), tensor.shape[1]) for tensor in read]
    return [tensor.new_empty(tensor.shape) for tensor in (query, *read, *weights, *biases, *params)]


class _Autograd(torch.autograd.Function):
    """Takes the tensors of all lists one by one: `register_autograd` would flatten lists by pytrees, which costs as
    much as a small batch."""

    @staticmethod
    def forward(ctx: Any, layers: int, options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        data, groups = tensors[:7], tensors[7:]
        with torch._C._AutoDispatchBelowAutograd():
            out, scores, peak_mass, exact_out = forward_op(*data, *grouped(groups, layers), *options)
        ctx.save_for_backward(out if exact_out.dtype == out.dtype else exact_out, scores, peak_mass, *tensors)
        ctx.layers, ctx.options = layers, options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak_mass, exact_out)
        return out, scores, peak_mass, exact_out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_scores: Tensor | None, *_: Any) -> tuple[Any, ...]:
        exact_out, scores, peak_mass, *tensors = ctx.saved_tensors
        data, groups = tensors[:7], tensors[7:]
        *options, return_scores, backend = ctx.options
        _, keys, _, values, *_ = data
        if grad_out is None:
            grad_out = torch.zeros_like(exact_out, dtype=keys.dtype)
        grad_query, *gradients = backward_op(
            grad_out,
            grad_scores if return_scores else None,
            exact_out,
            scores,
            peak_mass,
            *data,
            *grouped(groups, ctx.layers),
            *options,
            backend,
        )
        read = [of_table(gradients.pop(0), data, options) for tensor in (keys, values) if tensor is not None]
        grad_keys, grad_values = read if values is not None else (read[0], None)
        return None, None, grad_query, grad_keys, None, grad_values, None, None, None, *gradients


def of_table(gradient: Tensor, data: Sequence[Tensor], options: Sequence[Any]) -> Tensor:
    """The gradient of keys or values from that of the rows that were read, where they are different."""
    _, keys, offsets, _, query_offsets, rows, *_ = data
    unique_rows, sparse_grad, *_ = options
    if rows is None or (unique_rows and query_offsets is None):
        return gradient
    return table_gradient(gradient, rows, offsets[-1], keys.shape[0], sparse_grad)


def grouped(
    tensors: Sequence[Tensor], layers: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Weights, biases and params."""
    return tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]


def _with_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    *data, weights, biases, params = arguments[:10]  # AOTInductor has None for an empty list
    return _Autograd.apply(len(weights), arguments[10:], *data, *weights, *biases, *(params or ()))


LIBRARY.impl("activation_unit", _with_autograd, "Autograd")
differentiable_once("activation_unit")
