"""activation_unit backward: a kernel for the gradients of the tokens, one for those of the weights.

Both compute the scores again. Given the log-sum-exp of a sequence its tokens are independent, so nothing passes
from tile to tile but sums. Weight gradients are summed per program, then over programs in a fixed order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .activation_unit import histories, specialize
from .arguments import Histories, Spec, Upstream, depth, get, narrowest, widest, width
from .mlp import first_layer, load_network, run_layers, score
from .mlp_backward import load_back, run_layers_backward, times_weight, with_fresh_vectors
from .normal_form import NormalForm, backward_weights, gradients, normal_form
from .primitives import (
    LN_2,
    LOG2_E,
    columns,
    dot,
    exp2,
    load_matrix,
    load_rows,
    load_vector,
    slab_count,
    store_rows,
)
from .schedule import find_sequence, merge, rows_per_program, slot_of
from .sums import (
    add_matrix,
    add_octets,
    column_sum,
    load_padded,
    outer_product,
    outer_sum,
    store_column,
    store_octets,
    zero_matrix,
    zero_octets,
)


@triton.jit
def load_sequence(data, net, upstream, sequence, SPEC: tl.constexpr):
    """What all tiles of a sequence share: its query, its first layer, and dL/dout, Σ a dL/da, log2-sum-exp2."""
    q = load_vector(data.query + sequence * data.query_stride, get(SPEC, "dim"), get(SPEC, "dim_slab"))
    first = first_layer(net, q, sequence, SPEC)
    DV: tl.constexpr = get(SPEC, "value_dim")
    grad_out = upstream.grad_out + sequence * DV
    across = load_padded(grad_out, DV, get(SPEC, "dim_slab"), 8, False)  # [DV, 8]
    along = load_padded(grad_out, DV, get(SPEC, "dim_slab"), 16, True)  # [16, DV]
    delta = tl.load(upstream.delta + sequence) * LN_2
    log_mass = tl.load(upstream.lse + sequence) * LOG2_E
    return q, first, (across, along, delta, log_mass)


@triton.jit
def load_tile(data, row, rest, SPEC: tl.constexpr):
    """The keys and values of a tile that begins at `row`, of which `rest` rows are left."""
    token = tl.arange(0, get(SPEC, "block"))
    valid = token < rest
    key, value = data.key + row * get(SPEC, "key_stride"), data.value + row * get(SPEC, "value_stride")
    k = load_rows(key, token, get(SPEC, "key_stride"), valid, get(SPEC, "dim"), get(SPEC, "dim_slab"))
    if get(SPEC, "separate_values"):
        return k, load_rows(value, token, get(SPEC, "value_stride"), valid, get(SPEC, "value_dim"), get(SPEC, "dim_slab"))
    else:
        return k, k


@triton.jit
def attend_backward(s, v, grads, grad_scores, rest, SPEC: tl.constexpr):
    """The attention a and dL/ds, `[tokens]`, from the scores s; both zero past the end of the sequence."""
    across, _along, delta, log_mass = grads
    token = tl.arange(0, get(SPEC, "block"))
    valid = token < rest
    products = tl.zeros([get(SPEC, "block"), 8], tl.float32)
    for i in tl.static_range(len(v)):
        products = dot(v[i], across[i], products, get(SPEC, "precision"))
    grad = tl.sum(products, 1)
    if get(SPEC, "with_scores"):
        grad += tl.load(grad_scores + token, mask=valid, other=0.0).to(tl.float32)
    if get(SPEC, "softmax"):
        a = exp2(tl.where(valid, s - log_mass, float("-inf")), get(SPEC, "approx"))
        return a, a * (grad * LN_2 - delta)
    else:
        return tl.where(valid, s, 0.0), tl.where(valid, grad, 0.0)


@triton.jit
def spread(a, grads, acc, SPEC: tl.constexpr):
    """`acc + a·dL/dout`, `[tokens, DV]`: what the pooling passes to its values."""
    along = grads[1]
    out = ()
    for i in tl.static_range(len(along)):
        rows = tl.broadcast_to(a.to(along[i].dtype)[:, None], [a.shape[0], 16])
        out = out + (dot(rows, along[i], acc[i], get(SPEC, "precision")),)
    return out


@triton.jit
def first_dz(dzs, last, SPEC: tl.constexpr):
    """dL/dz of the first hidden layer."""
    if depth(SPEC) > 1:
        return dzs[len(dzs) - 1]
    else:
        out = ()
        for j in tl.static_range(len(dzs[0])):
            out = out + (dzs[0][j] * last[0][j][None, :],)
        return out


@triton.jit
def in_dtype(slabs, DTYPE: tl.constexpr):
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (slabs[i].to(DTYPE),)
    return out


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
    back = load_back(upstream.back, 0, SPEC)
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
        moment = zero_matrix(D, SLAB, H1, H1_SLAB)  # Σ_t k_t dL/dz1_tᵀ, the gradient of W_effᵀ
        grad_c = zero_matrix(H1, H1_SLAB, 8, 8, 16, 8)
        row = begin.to(tl.int64)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            rest = (stop - start).to(tl.int32)
            valid = token < rest
            k, v = load_tile(data, row, rest, SPEC)
            first_again, layers_again, last_again = with_fresh_vectors(net, owner, first, layers, last, rest, SPEC)
            zs, hs, outputs = run_layers(k, first_again, layers_again, slopes, DTYPE, SPEC)
            s = score(hs[len(hs) - 1], last_again)  # [BLOCK]
            a, ds = attend_backward(s, v, grads, upstream.grad_scores + row, rest, SPEC)
            _dhs, dzs = run_layers_backward(ds, zs, hs, outputs, back, slopes, SPEC)
            dz = in_dtype(first_dz(dzs, last_again, SPEC), DTYPE)
            if get(SPEC, "separate_values"):
                grad_v = spread(a, grads, zero_matrix(BLOCK, BLOCK, DV, SLAB), SPEC)
                store_rows(grad_value + row * DV, grad_v, token, DV, valid, DV, SLAB)
                dk = times_weight(dz, first[0], zero_matrix(BLOCK, BLOCK, D, SLAB), SPEC)
            else:
                dk = spread(a, grads, zero_matrix(BLOCK, BLOCK, D, SLAB), SPEC)
                dk = times_weight(dz, first[0], dk, SPEC)
            store_rows(grad_key + row * D, dk, token, D, valid, D, SLAB)
            moment = outer_sum(k, dz, moment, PRECISION)
            grad_c = column_sum(dz, grad_c, DTYPE, PRECISION)
            row += BLOCK
        slot = slot_of(program, begin, stop, first_row, last_row)
        target = grad_first + owner * (D + H1)
        if slot >= 0:
            target = part + slot * (D + H1)
        product = load_matrix(upstream.product, D, SLAB, 16, H1, H1_SLAB)
        by_query = ()
        COUNT: tl.constexpr = slab_count(H1, H1_SLAB)
        for i in tl.static_range(len(q)):
            grad_q = tl.zeros([q[i].shape[0]], tl.float32)
            for j in tl.static_range(COUNT):
                grad_q += tl.sum(product[i * COUNT + j].to(tl.float32) * moment[i * COUNT + j], 1)
                by_query = by_query + (moment[i * COUNT + j] * q[i].to(tl.float32)[:, None],)
            column = columns(i, D, SLAB)
            tl.store(target + column, grad_q, mask=column < D)
        store_column(target + D, grad_c, H1, H1_SLAB)
        add_matrix(grad_key_weight + own, moment, fresh, D, SLAB, H1, H1_SLAB)
        add_matrix(grad_product_weight + own, by_query, fresh, D, SLAB, H1, H1_SLAB)
        fresh = 0
        begin = stop
        sequence += 1


@triton.jit
def zero_sums(SPEC: tl.constexpr):
    """Per hidden layer after the first, sums for its weight, transposed, and its bias; per hidden layer, for its
    slopes."""
    sums = ()
    for i in tl.static_range(1, depth(SPEC)):
        weight = zero_matrix(
            width(i - 1, SPEC), get(SPEC, "slab"), width(i, SPEC), widest(i, SPEC), 16, narrowest(i, SPEC)
        )
        sums = sums + ((weight, zero_octets(get(SPEC, "warps"), width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC))),)
    slope_sums = ()
    for i in tl.static_range(depth(SPEC)):
        if get(SPEC, "activation") == "leaky_relu":
            slope_sums = slope_sums + (zero_octets(get(SPEC, "warps"), width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC)),)
        else:
            slope_sums = slope_sums + ((),)
    return sums, slope_sums


@triton.jit
def store_matrix_of(pointer, slabs, LAYER: tl.constexpr, SPEC: tl.constexpr):
    inputs: tl.constexpr = width(LAYER - 1, SPEC)
    outputs: tl.constexpr = width(LAYER, SPEC)
    slab: tl.constexpr = get(SPEC, "slab")
    add_matrix(pointer, slabs, 1, inputs, slab, outputs, widest(LAYER, SPEC), 16, narrowest(LAYER, SPEC))


@triton.jit
def add_layer_sums(sums, outputs, dzs, SPEC: tl.constexpr):
    out = ()
    for i in tl.static_range(len(sums)):
        weight, bias = sums[i]
        dz = dzs[len(sums) - 1 - i]  # of hidden layer i + 1; dzs begins with the last
        weight = outer_sum(outputs[i], in_dtype(dz, outputs[i][0].dtype), weight, get(SPEC, "precision"))
        out = out + ((weight, add_octets(dz, bias)),)
    return out


@triton.jit
def add_slope_sums(slope_sums, zs, dhs, SPEC: tl.constexpr):
    """Σ_t dL/dh·min(z, 0), as a row. Rare enough for a plain reduction."""
    out = ()
    for i in tl.static_range(len(slope_sums)):
        layer = ()
        for j in tl.static_range(len(slope_sums[i])):
            if i == len(slope_sums) - 1:
                layer = layer + (dhs[0][:, None] * tl.minimum(zs[i][j], 0.0),)
            else:
                layer = layer + (dhs[len(slope_sums) - 1 - i][j] * tl.minimum(zs[i][j], 0.0),)
        out = out + (add_octets(layer, slope_sums[i]),)
    return out


@triton.jit
def times_rows(rows, slabs):
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (rows[:, None] * slabs[i],)
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
    back = load_back(upstream.back, 0 if get(SPEC, "activation") == "leaky_relu" else 1, SPEC)
    sums, slope_sums = zero_sums(SPEC)
    last_sum = zero_octets(get(SPEC, "warps"), width(n - 1, SPEC), widest(n - 1, SPEC), narrowest(n - 1, SPEC))
    last_bias_sum = tl.zeros([BLOCK], tl.float32)
    while begin < end:
        if tl.load(data.offsets + sequence + 1) <= begin:  # empty
            sequence = find_sequence(data.offsets, data.batch, begin)
        last_row = tl.load(data.offsets + sequence + 1)
        stop = tl.minimum(last_row, end)
        owner = sequence.to(tl.int64)
        _q, first, grads = load_sequence(data, net, upstream, owner, SPEC)
        row = begin.to(tl.int64)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            rest = (stop - start).to(tl.int32)
            k, v = load_tile(data, row, rest, SPEC)
            first_again, layers_again, last_again = with_fresh_vectors(net, owner, first, layers, last, rest, SPEC)
            zs, hs, outputs = run_layers(k, first_again, layers_again, slopes, DTYPE, SPEC)
            s = score(hs[n - 1], last_again)  # [BLOCK]
            _a, ds = attend_backward(s, v, grads, upstream.grad_scores + row, rest, SPEC)
            dhs, dzs = run_layers_backward(ds, zs, hs, outputs, back, slopes, SPEC)
            sums = add_layer_sums(sums, outputs, dzs, SPEC)
            slope_sums = add_slope_sums(slope_sums, zs, dhs, SPEC)
            last_sum = add_octets(times_rows(ds, hs[n - 1]), last_sum)
            last_bias_sum += ds
            row += BLOCK
        begin = stop
        sequence += 1
    for i in tl.static_range(1, n):
        target = grad_weights[i - 1] + program.to(tl.int64) * (width(i, SPEC) * width(i - 1, SPEC))
        store_matrix_of(target, sums[i - 1][0], i, SPEC)
        target = grad_biases[i - 1] + program * width(i, SPEC)
        store_octets(target, sums[i - 1][1], width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC))
    if get(SPEC, "activation") == "leaky_relu":
        for i in tl.static_range(n):
            target = grad_slopes[i] + program * width(i, SPEC)
            store_octets(target, slope_sums[i], width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC))
    target = grad_last_weight + program * width(n - 1, SPEC)
    store_octets(target, last_sum, width(n - 1, SPEC), widest(n - 1, SPEC), narrowest(n - 1, SPEC))
    tl.store(grad_last_bias + program, tl.sum(last_bias_sum))


def _spec(
    unit: Any, data: Histories, net: NormalForm, launch: settings.Launch, with_scores: bool, split: str | None
) -> Spec:
    spec = specialize(unit, data, net, launch, with_scores)
    widest_last, narrowest_last = spec.last_slab
    if len(spec.hidden) > 2 or spec.activation == "leaky_relu":  # then products read the last layer's gradient
        narrowest_last = max(narrowest_last, 16)
    return replace(
        spec,
        warps=launch.num_warps,
        last_slab=(widest_last, narrowest_last),
        precision=split or spec.precision,
    )


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
        backward_weights(unit, net),
        net.network.product.t().contiguous(),
    )
    split = net.precision == "ieee" and settings.can_split(dim, net.hidden, data.key.device)
    row = "split" if split else net.precision
    tokens, weights = settings.BACKWARD_TOKENS[row], settings.BACKWARD_WEIGHTS[row]
    token_programs = settings.programs(tokens, total, data.key.device)
    weight_programs = settings.programs(weights, total, data.key.device)
    with_scores = grad_scores is not None

    by_program = {
        "key": zeros(token_programs, *net.network.key.t().shape),
        "product": zeros(token_programs, *net.network.product.t().shape),
    }
    grad_weights = tuple(zeros(weight_programs, *w.t().shape) for w in net.network.weights)
    grad_biases = tuple(zeros(weight_programs, *b.shape) for b in net.network.biases)
    grad_slopes = tuple(zeros(weight_programs, *s.shape) for s in net.network.slopes)
    grad_last_weight = zeros(weight_programs, net.hidden[-1])
    grad_last_bias = zeros(weight_programs, 1)
    if data.batch and total:
        spec = _spec(unit, data, net, tokens, with_scores, settings.SPLIT_TOKENS if split else None)
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
            SPEC=_spec(unit, data, net, weights, with_scores, settings.SPLIT_WEIGHTS if split else None),
            num_warps=weights.num_warps,
        )
    weight_sums = [w.sum(0).t() for w in grad_weights]
    bias_sums = [b.sum(0) for b in grad_biases]
    slope_sums = [g.sum(0) for g in grad_slopes]
    if weight_sums:  # their sums are of e, see mlp_backward
        weight_sums[-1] = weight_sums[-1] * net.network.last_weight[:, None]
        bias_sums[-1] = bias_sums[-1] * net.network.last_weight
    if slope_sums:
        slope_sums[-1] = slope_sums[-1] * net.network.last_weight
    grads = gradients(
        net,
        by_program["key"].sum(0).t(),
        by_program["product"].sum(0).t(),
        grad_first[:, dim:],
        weight_sums,
        bias_sums,
        grad_last_weight.sum(0),
        grad_last_bias.sum(0),
    )
    slopes = [
        g.sum_to_size(s.shape) for g, s in zip(slope_sums, unit.slopes, strict=False) if isinstance(s, Tensor)
    ]
    return grad_first[:, :dim], grad_key, grad_value, *grads, slopes
