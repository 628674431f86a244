"""activation_unit backward: a kernel for the gradients of the tokens, one for those of the weights.

Both compute the scores again. Given the log-sum-exp of a sequence its tokens are independent, so nothing passes
from tile to tile but sums. Weight gradients are summed per program, then over programs in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .activation_unit import histories, specialize
from .arguments import Upstream, depth, get, widest, width
from .mlp import first_layer, load_network, run_layers, run_layers_backward, score, times_weight
from .normal_form import gradients, normal_form
from .primitives import (
    LN_2,
    LOG2_E,
    add_matrix,
    column_sum,
    columns,
    exp2,
    load_matrix,
    load_rows,
    load_vector,
    outer_product,
    outer_sum,
    slab_count,
    store_column,
    store_row,
    store_rows,
    zero_matrix,
    zero_rows,
)
from .schedule import find_sequence, merge, rows_per_program, slot_of


@triton.jit
def load_sequence(data, net, upstream, sequence, SPEC: tl.constexpr):
    """What all tiles of a sequence share: its query, its first layer, and dL/dout, Σ a dL/da, log2-sum-exp2."""
    q = load_vector(data.query + sequence * data.query_stride, get(SPEC, "dim"), get(SPEC, "dim_slab"))
    first = first_layer(net, q, sequence, SPEC)
    DV: tl.constexpr = get(SPEC, "value_dim")
    grad_out = load_vector(upstream.grad_out + sequence * DV, DV, get(SPEC, "dim_slab"))
    delta = tl.load(upstream.delta + sequence)
    log_mass = tl.load(upstream.lse + sequence) * LOG2_E
    return q, first, (grad_out, delta, log_mass)


@triton.jit
def load_tile(data, row, rest, SPEC: tl.constexpr):
    """The keys and values of a tile that begins at `row`, of which `rest` rows are left."""
    token = tl.arange(0, get(SPEC, "block"))
    valid = token < rest
    key, value = data.key + row * get(SPEC, "key_stride"), data.value + row * get(SPEC, "value_stride")
    k = load_rows(key, token, get(SPEC, "key_stride"), valid, get(SPEC, "dim"), get(SPEC, "dim_slab"))
    if get(SPEC, "separate_values"):
        return k, load_rows(
            value, token, get(SPEC, "value_stride"), valid, get(SPEC, "value_dim"), get(SPEC, "dim_slab")
        )
    else:
        return k, k


@triton.jit
def attend_backward(s, v, grads, grad_scores, rest, SPEC: tl.constexpr):
    """The attention a and dL/ds, `[tokens]`, from the scores s; both zero past the end of the sequence."""
    grad_out, delta, log_mass = grads
    token = tl.arange(0, get(SPEC, "block"))
    valid = token < rest
    grad = tl.zeros([get(SPEC, "block")], tl.float32)
    if get(SPEC, "with_scores"):
        grad += tl.load(grad_scores + token, mask=valid, other=0.0).to(tl.float32)
    for i in tl.static_range(len(v)):
        grad += tl.sum(v[i].to(tl.float32) * grad_out[i].to(tl.float32)[None, :], 1)
    if get(SPEC, "softmax"):
        a = tl.where(valid, exp2(s - log_mass, get(SPEC, "approx")), 0.0)
        return a, a * (grad - delta) * LN_2
    else:
        return tl.where(valid, s, 0.0), tl.where(valid, grad, 0.0)


@triton.jit
def _tokens_kernel(
    data,
    net,
    upstream,
    grad_key,
    grad_value,
    grad_first,
    part,
    grad_key_weight,
    grad_product_weight,
    SPEC: tl.constexpr,
):
    """dL/dk and dL/dv per token; dL/dq but for its way through c, and dL/dc, per sequence, side by side in
    `grad_first [B, D + H1]`; the gradients of the first layer's key and product per program."""
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    BLOCK: tl.constexpr = get(SPEC, "block")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = net.key.dtype.element_ty
    H1: tl.constexpr = width(0, SPEC)
    H1_SLAB: tl.constexpr = widest(0, SPEC)
    program = tl.program_id(0)
    total = tl.load(data.offsets + data.batch)
    share = rows_per_program(total, tl.num_programs(0), get(SPEC, "least_rows"))
    begin = tl.minimum(program.to(tl.int64) * share, total).to(total.dtype)
    end = tl.minimum(begin + share, total)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, data.batch, begin)
    layers, slopes, last = load_network(net, SPEC)
    token = tl.arange(0, BLOCK)
    own = program.to(tl.int64) * (H1 * D)
    fresh = 1
    while begin < end:
        if tl.load(data.offsets + sequence + 1) <= begin:  # empty
            sequence = find_sequence(data.offsets, data.batch, begin)
        first_row = tl.load(data.offsets + sequence)
        last_row = tl.load(data.offsets + sequence + 1)
        stop = tl.minimum(last_row, end)
        owner = sequence.to(tl.int64)
        q, first, grads = load_sequence(data, net, upstream, owner, SPEC)
        moment = zero_matrix(H1, H1_SLAB, D, SLAB)  # Σ_t dL/dz1_t k_tᵀ, the gradient of W_eff
        grad_c = zero_matrix(H1, H1_SLAB, 8, 8)
        row = begin.to(tl.int64)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            rest = (stop - start).to(tl.int32)
            valid = token < rest
            k, v = load_tile(data, row, rest, SPEC)
            zs, hs, _outputs = run_layers(k, first, layers, slopes, DTYPE, SPEC)
            s = score(hs[len(hs) - 1], last)  # [BLOCK]
            a, ds = attend_backward(s, v, grads, upstream.grad_scores + row, rest, SPEC)
            _dhs, dzs = run_layers_backward(ds, zs, hs, layers, slopes, last, SPEC)
            dz = dzs[len(dzs) - 1]
            pooled = outer_product(a, grads[0])
            if get(SPEC, "separate_values"):
                store_rows(grad_value + row * DV, pooled, token, DV, valid, DV, SLAB)
                dk = times_weight(dz, first[0], zero_matrix(BLOCK, BLOCK, D, SLAB), SPEC)
            else:
                dk = times_weight(dz, first[0], pooled, SPEC)
            store_rows(grad_key + row * D, dk, token, D, valid, D, SLAB)
            moment = outer_sum(dz, k, moment, PRECISION)
            grad_c = column_sum(dz, grad_c, DTYPE, PRECISION)
            row += BLOCK
        slot = slot_of(program, begin, stop, first_row, last_row)
        target = grad_first + owner * (D + H1)
        if slot >= 0:
            target = part + slot * (D + H1)
        product = load_matrix(net.product, H1, H1_SLAB, 16, D, SLAB)
        by_query = ()
        for i in tl.static_range(len(q)):
            grad_q = tl.zeros([q[i].shape[0]], tl.float32)
            for j in tl.static_range(slab_count(H1, H1_SLAB)):
                grad_q += tl.sum(product[j * len(q) + i].to(tl.float32) * moment[j * len(q) + i], 0)
            column = columns(i, D, SLAB)
            tl.store(target + column, grad_q, mask=column < D)
        for m in tl.static_range(len(moment)):
            by_query = by_query + (moment[m] * q[m % len(q)].to(tl.float32)[None, :],)
        store_column(target + D, grad_c, H1, H1_SLAB)
        add_matrix(grad_key_weight + own, moment, fresh, H1, H1_SLAB, D, SLAB)
        add_matrix(grad_product_weight + own, by_query, fresh, H1, H1_SLAB, D, SLAB)
        fresh = 0
        begin = stop
        sequence += 1


@triton.jit
def zero_sums(SPEC: tl.constexpr):
    """Per hidden layer after the first, sums for its weight and its bias; per hidden layer, for its slopes."""
    sums = ()
    for i in tl.static_range(1, depth(SPEC)):
        weight = zero_matrix(width(i, SPEC), widest(i, SPEC), width(i - 1, SPEC), widest(i - 1, SPEC))
        sums = sums + ((weight, zero_matrix(width(i, SPEC), widest(i, SPEC), 8, 8)),)
    slope_sums = ()
    for i in tl.static_range(depth(SPEC)):
        if get(SPEC, "activation") == "leaky_relu":
            slope_sums = slope_sums + (zero_rows(1, width(i, SPEC), widest(i, SPEC)),)
        else:
            slope_sums = slope_sums + ((),)
    return sums, slope_sums


@triton.jit
def add_layer_sums(sums, outputs, dzs, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    out = ()
    for i in tl.static_range(len(sums)):
        weight, bias = sums[i]
        dz = dzs[len(sums) - 1 - i]  # of hidden layer i + 1; dzs begins with the last
        weight = outer_sum(dz, outputs[i], weight, get(SPEC, "precision"))
        out = out + ((weight, column_sum(dz, bias, DTYPE, get(SPEC, "precision"))),)
    return out


@triton.jit
def add_slope_sums(slope_sums, zs, dhs):
    """Σ_t dL/dh·min(z, 0), as a row. Rare enough for a plain reduction."""
    out = ()
    for i in tl.static_range(len(slope_sums)):
        layer = ()
        for j in tl.static_range(len(slope_sums[i])):
            term = tl.sum(dhs[len(slope_sums) - 1 - i][j] * tl.minimum(zs[i][j], 0.0), 0)
            layer = layer + (slope_sums[i][j] + term[None, :],)
        out = out + (layer,)
    return out


@triton.jit
def _weights_kernel(
    data,
    net,
    upstream,
    grad_weights,
    grad_biases,
    grad_slopes,
    grad_last_weight,
    grad_last_bias,
    SPEC: tl.constexpr,
):
    """The gradients of the layers behind the first, and of all slopes, per program."""
    BLOCK: tl.constexpr = get(SPEC, "block")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = net.key.dtype.element_ty
    n: tl.constexpr = depth(SPEC)
    program = tl.program_id(0)
    total = tl.load(data.offsets + data.batch)
    share = rows_per_program(total, tl.num_programs(0), get(SPEC, "least_rows"))
    begin = tl.minimum(program.to(tl.int64) * share, total).to(total.dtype)
    end = tl.minimum(begin + share, total)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, data.batch, begin)
    layers, slopes, last = load_network(net, SPEC)
    sums, slope_sums = zero_sums(SPEC)
    last_sum = zero_matrix(width(n - 1, SPEC), widest(n - 1, SPEC), 8, 8)
    last_bias_sum = tl.zeros([BLOCK], tl.float32)
    while begin < end:
        if tl.load(data.offsets + sequence + 1) <= begin:  # empty
            sequence = find_sequence(data.offsets, data.batch, begin)
        last_row = tl.load(data.offsets + sequence + 1)
        stop = tl.minimum(last_row, end)
        _q, first, grads = load_sequence(data, net, upstream, sequence.to(tl.int64), SPEC)
        row = begin.to(tl.int64)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            rest = (stop - start).to(tl.int32)
            k, v = load_tile(data, row, rest, SPEC)
            zs, hs, outputs = run_layers(k, first, layers, slopes, DTYPE, SPEC)
            s = score(hs[n - 1], last)  # [BLOCK]
            _a, ds = attend_backward(s, v, grads, upstream.grad_scores + row, rest, SPEC)
            dhs, dzs = run_layers_backward(ds, zs, hs, layers, slopes, last, SPEC)
            sums = add_layer_sums(sums, outputs, dzs, DTYPE, SPEC)
            slope_sums = add_slope_sums(slope_sums, zs, dhs)
            scored = tl.broadcast_to(ds[:, None], [BLOCK, 8]).to(DTYPE)
            last_sum = outer_sum(outputs[n - 1], (scored,), last_sum, PRECISION)
            last_bias_sum += ds
            row += BLOCK
        begin = stop
        sequence += 1
    for i in tl.static_range(1, n):
        size = width(i, SPEC) * width(i - 1, SPEC)
        target = grad_weights[i - 1] + program.to(tl.int64) * size
        add_matrix(
            target,
            sums[i - 1][0],
            1,
            width(i, SPEC),
            widest(i, SPEC),
            width(i - 1, SPEC),
            widest(i - 1, SPEC),
        )
        store_column(
            grad_biases[i - 1] + program * width(i, SPEC), sums[i - 1][1], width(i, SPEC), widest(i, SPEC)
        )
    if get(SPEC, "activation") == "leaky_relu":
        for i in tl.static_range(n):
            target = grad_slopes[i] + program * width(i, SPEC)
            store_row(target, slope_sums[i], width(i, SPEC), widest(i, SPEC))
    store_column(
        grad_last_weight + program * width(n - 1, SPEC), last_sum, width(n - 1, SPEC), widest(n - 1, SPEC)
    )
    tl.store(grad_last_bias + program, tl.sum(last_bias_sum))


def backward(
    unit: Any, grad_out: Tensor, grad_scores: Tensor | None, delta: Tensor | None, lse: Tensor
) -> tuple[Any, ...]:
    """As `recattn.composite.activation_unit.backward`."""
    net = normal_form(unit)
    data = histories(unit)
    dim, value_dim, total = data.key.shape[1], data.value.shape[1], data.key.shape[0]
    zeros = net.network.first_bias.new_zeros  # float32
    grad_key = data.key.new_zeros(total, dim)
    separate = unit.values is not unit.keys
    grad_value = data.value.new_zeros(total, value_dim) if separate else None
    grad_first = zeros(data.batch, dim + net.hidden[0])
    upstream = Upstream(
        grad_out.contiguous(),
        lse if grad_scores is None else grad_scores.contiguous(),
        lse if delta is None else delta,
        lse,
    )
    tokens, weights = settings.BACKWARD_TOKENS[net.precision], settings.BACKWARD_WEIGHTS[net.precision]
    token_programs = settings.programs(tokens, total, data.key.device)
    weight_programs = settings.programs(weights, total, data.key.device)
    with_scores = grad_scores is not None

    by_program = {
        "key": zeros(token_programs, *net.network.key.shape),
        "product": zeros(token_programs, *net.network.product.shape),
    }
    grad_weights = tuple(zeros(weight_programs, *w.shape) for w in net.network.weights)
    grad_biases = tuple(zeros(weight_programs, *b.shape) for b in net.network.biases)
    grad_slopes = tuple(zeros(weight_programs, *s.shape) for s in net.network.slopes)
    grad_last_weight = zeros(weight_programs, net.hidden[-1])
    grad_last_bias = zeros(weight_programs, 1)
    if data.batch and total:
        spec = specialize(unit, data, net, tokens, with_scores)
        part = torch.empty_like(grad_first, memory_format=torch.contiguous_format).new_empty(
            2 * token_programs, grad_first.shape[1]
        )
        _tokens_kernel[(token_programs,)](
            data,
            net.network,
            upstream,
            grad_key,
            grad_key if grad_value is None else grad_value,
            grad_first,
            part,
            by_program["key"],
            by_program["product"],
            SPEC=spec,
            num_warps=tokens.num_warps,
        )
        merge(part, None, data.offsets, grad_first, lse, token_programs, tokens.least_rows)
        _weights_kernel[(weight_programs,)](
            data,
            net.network,
            upstream,
            grad_weights,
            grad_biases,
            grad_slopes,
            grad_last_weight,
            grad_last_bias,
            SPEC=specialize(unit, data, net, weights, with_scores),
            num_warps=weights.num_warps,
        )
    grads = gradients(
        net,
        by_program["key"].sum(0),
        by_program["product"].sum(0),
        grad_first[:, dim:],
        [w.sum(0) for w in grad_weights],
        [b.sum(0) for b in grad_biases],
        grad_last_weight.sum(0),
        grad_last_bias.sum(0),
    )
    slopes = [
        g.sum(0).sum_to_size(s.shape)
        for g, s in zip(grad_slopes, unit.slopes, strict=False)
        if isinstance(s, Tensor)
    ]
    return grad_first[:, :dim], grad_key, grad_value, *grads, slopes
