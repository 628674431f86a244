"""activation_unit: schema, fake, autograd, and its implementations bound to the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from recattn.composite import activation_unit as composite
from recattn.composite import activation_unit_few as few
from recattn.composite.segments import Segments
from recattn.ops.candidates import Candidates
from recattn.ops.dropout import Dropout
from recattn.ops.fold import FEATURES, fold, unfold
from recattn.ops.library import LIBRARY, Variant, choose, differentiable_once, implement
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
    f"activation_unit({_ARGUMENTS}, bool return_scores, str backend, bool keep) "
    " -> (Tensor out, Tensor scores, Tensor peak_mass, Tensor exact_out, Tensor[] kept)"
)
LIBRARY.define(
    f"activation_unit_backward(Tensor grad_out, Tensor? grad_scores, Tensor exact_out, Tensor scores, Tensor peak_mass,"
    f" Tensor[] kept, {_ARGUMENTS}, str backend) -> Tensor[]"
)
FEW_ROWS = Variant("few rows", f"the hidden units of all rows fit in {few.KEPT_BYTES >> 20} MiB")
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
    *,
    constant: bool = True,
) -> composite.Unit:
    """The call with its first layer folded, in fp32 at least; without c(q) if its `constant` is not wanted."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    weights, biases, params = (
        [t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous() for t in group]
        for group in (weights, biases, params)
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
        first=fold(weights[0], biases[0], query.to(dtype), features, constant),
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


def keeps(
    keys: Tensor,
    query_offsets: Tensor | None,
    rows: Tensor | None,
    weights: Sequence[Tensor],
    dropout: float,
    backend: str,
) -> bool:
    """Whether forward is to keep hidden units for backward; not in a compiled graph, which would depend on sizes."""
    if backend == "triton" or not keys.is_cpu or query_offsets is not None or dropout:
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    positions = keys.shape[0] if rows is None else rows.shape[0]
    if not isinstance(positions, int):  # as a tracer has it
        return False
    dtype = torch.promote_types(keys.dtype, torch.float32)
    return few.fits(positions, [weight.shape[0] for weight in weights[:-1]], dtype)


def _forward(*arguments: Any, on_gpu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *call, return_scores, backend, keep = arguments
    unit = unit_of(*call)
    kept: list[Tensor] = []
    few_rows = few.covers(unit)

    def triton() -> tuple[Tensor, Tensor, Tensor]:
        from recattn.kernels.activation_unit import forward

        return forward(unit, return_scores)

    def torch_() -> tuple[Tensor, Tensor, Tensor]:
        nonlocal kept
        if not few_rows:
            return composite.forward(unit)
        out, scores, peak_mass, kept = few.forward(unit, keep)
        return out, scores, peak_mass

    out, scores, peak_mass = choose(
        "activation_unit", unit, backend, on_gpu, triton, torch_, FEW_ROWS if few_rows else None
    )
    dtype = unit.values.dtype
    # A copy of what is kept, as no two outputs of an operator may share memory.
    scores = scores.to(dtype, copy=bool(kept)) if return_scores else scores.new_empty(0, dtype=dtype)
    if dtype == out.dtype:
        return out, scores, peak_mass, out.new_empty(0), kept
    return out.to(dtype), scores, peak_mass, out, kept  # which backward needs before it was rounded


def _backward(
    grad_out: Tensor,
    grad_scores: Tensor | None,
    exact_out: Tensor,
    scores: Tensor,
    peak_mass: Tensor,
    kept: Sequence[Tensor],
    *arguments: Any,
    on_gpu: bool,
) -> list[Tensor]:
    *call, backend = arguments
    unit = unit_of(*call, constant=not kept)
    delta = None
    if unit.normalize == "softmax" and not kept:  # Σ_t a_t dL/da_t, where Σ_t a_t v_t is out
        delta = torch.linalg.vecdot(grad_out.to(unit.dtype), exact_out)
        if grad_scores is not None:
            products = scores.to(unit.dtype) * grad_scores
            delta += Segments.of(unit.offsets, unit.positions).sum(products.unsqueeze(1)).squeeze(1)

    def triton() -> tuple[Tensor, ...]:
        from recattn.kernels.activation_unit_backward import backward

        return backward(unit, grad_out, grad_scores, delta, peak_mass)

    def torch_() -> tuple[Any, ...]:
        if kept:
            return few.backward(unit, grad_out, grad_scores, kept)
        return composite.backward(unit, grad_out, grad_scores, delta, peak_mass)

    query, keys, values, key, product, bias, weights, biases, params = choose(
        "activation_unit", unit, backend, on_gpu, triton, torch_
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
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    query, keys, _, values, _, rows, _, weights = arguments[:8]
    return_scores, _, keep = arguments[-3:]
    values = keys if values is None else values
    out = values.new_empty(query.shape[0], values.shape[1])
    positions = keys.shape[0] if rows is None else rows.numel()
    scores = values.new_empty(positions if return_scores else 0)
    peak_mass = query.new_empty(query.shape[0], 2, dtype=torch.promote_types(keys.dtype, torch.float32))
    exact_out = peak_mass.new_empty(0 if peak_mass.dtype == out.dtype else out.shape)
    kept = [peak_mass.new_empty(positions, weight.shape[0]) for weight in weights[:-1]] if keep else []
    return out, scores, peak_mass, exact_out, [*kept, peak_mass.new_empty(positions)] if keep else []


@torch.library.register_fake("recattn::activation_unit_backward", lib=LIBRARY)
def _fake_backward(*arguments: Any) -> list[Tensor]:
    return fake_gradients(*arguments[6:17])


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
            out, scores, peak_mass, exact_out, kept = forward_op(*data, *grouped(groups, layers), *options)
        exact = out if exact_out.dtype == out.dtype else exact_out
        ctx.save_for_backward(exact, scores, peak_mass, *tensors, *kept)
        ctx.layers, ctx.options, ctx.kept = layers, options, len(kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak_mass, exact_out, *kept)
        return out, scores, peak_mass, exact_out, *kept

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_scores: Tensor | None, *_: Any) -> tuple[Any, ...]:
        exact_out, scores, peak_mass, *tensors = ctx.saved_tensors
        end = len(tensors) - ctx.kept
        data, groups, kept = tensors[:7], tensors[7:end], tensors[end:]
        *options, return_scores, backend, _ = ctx.options
        _, keys, _, values, *_ = data
        if grad_out is None:
            grad_out = torch.zeros_like(exact_out, dtype=keys.dtype)
        grad_query, *gradients = backward_op(
            grad_out,
            grad_scores if return_scores else None,
            exact_out,
            scores,
            peak_mass,
            kept,
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


def _with_autograd(*arguments: Any) -> tuple[Any, ...]:
    *data, weights, biases, params = arguments[:10]  # AOTInductor has None for an empty list
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*data, weights, biases, params or (), *arguments[10:])
    out, scores, peak_mass, exact_out, *kept = _Autograd.apply(
        len(weights), arguments[10:], *data, *weights, *biases, *(params or ())
    )
    return out, scores, peak_mass, exact_out, kept


LIBRARY.impl("activation_unit", _with_autograd, "Autograd")
differentiable_once("activation_unit")
