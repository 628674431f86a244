"""activation_unit backward for short sequences: tiles of tokens of several sequences.

The first kernel computes the scores again and goes all the way back. What gradients of weights are sums of, it leaves
behind: per hidden layer dL/dz, of all but the last the units too. The second adds them up. Both at once would take
more registers than there are, and to compute it all twice costs more than to write and read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .activation_unit_weights import add_param_sums, times_rows
from .arguments import Histories, depth, get, narrowest, widest, width
from .backward import Call, WeightSums, program_sums
from .dropout import noise_of
from .histories import load_tile, share_of, store_tile
from .mlp import hidden_zero, load_network, run_layers, score
from .mlp_backward import first_dz, load_back, run_layers_backward, times_weight, with_fresh_vectors
from .packed import (
    GROUP,
    add_rows,
    all_resident,
    first_layer,
    group_at,
    held_rows,
    load_members,
    load_queries,
    load_resident,
    member_of,
    multiply,
    multiply_slab,
    one_hot,
    one_hot_rows,
    store_held,
)
from .pooling import weigh, weigh_backward
from .primitives import LN_2, dot, exp2, load_rows, multiply_add, store_rows
from .schedule import find_sequence, merge
from .sums import (
    add_matrix,
    add_octets,
    column_sum,
    in_dtype,
    outer_sum,
    store_column,
    store_octets,
    zero_matrix,
    zero_octets,
)


@triton.constexpr_function
def row_stride(units):
    """Between rows of a hidden layer that are left behind, so that they are aligned."""
    return -(-units // 16) * 16


@triton.jit
def attend_backward(s, v, chosen, grad_out, upstream, row, owner, valid, SPEC: tl.constexpr):
    """The attention a and dL/ds, `[tokens]`, from the scores s; both zero where a token is not valid."""
    products = tl.zeros(chosen.shape, tl.float32)  # v·dL/dout of all members
    for i in tl.static_range(len(v)):
        products = dot(v[i], tl.trans(grad_out[i]), products, get(SPEC, "precision"))
    grad = tl.sum(products * chosen.to(tl.float32), 1)
    token = tl.arange(0, get(SPEC, "block"))
    if get(SPEC, "with_scores"):
        grad += tl.load(upstream.grad_scores + row + token, mask=valid, other=0.0).to(tl.float32)
    if get(SPEC, "softmax"):
        log_mass = tl.load(upstream.peak_mass + 2 * owner)
        log_mass += tl.log2(tl.load(upstream.peak_mass + 2 * owner + 1))
        delta = tl.load(upstream.delta + owner) * LN_2
        a = exp2(tl.where(valid, s - log_mass, float("-inf")), get(SPEC, "approx"))
        return a, a * (grad * LN_2 - delta)
    else:
        a = weigh(s, get(SPEC, "normalize"), get(SPEC, "approx"))
        ds = weigh_backward(grad, a, get(SPEC, "normalize"))
        return tl.where(valid, a, 0.0), tl.where(valid, ds, 0.0)


@triton.jit
def add_products(q, r, slabs, SPEC: tl.constexpr):
    """`slabs + q·r`, in the dtype of q."""
    out = ()
    for i in tl.static_range(len(q)):
        out = out + (multiply_add(q[i], r[i], slabs[i].to(q[i].dtype), get(SPEC, "approx"), PURE=True),)
    return out


@triton.jit
def zero_param_sums(SPEC: tl.constexpr):
    sums = ()
    for i in tl.static_range(get(SPEC, "param_layers")):
        layer = ()
        for _ in tl.static_range(get(SPEC, "params_each")):
            layer = layer + (
                zero_octets(get(SPEC, "warps"), width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC)),
            )
        sums = sums + (layer,)
    return sums


@triton.jit
def store_param_sums(pointers, sums, program, SPEC: tl.constexpr):
    for i in tl.static_range(len(sums)):
        for n in tl.static_range(len(sums[i])):
            target = pointers[i * get(SPEC, "params_each") + n] + program * width(i, SPEC)
            store_octets(target, sums[i][n], width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC))


@triton.jit
def leave(rows, slabs, row, valid, zero, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """Rows of a hidden layer, for the second kernel."""
    STRIDE: tl.constexpr = row_stride(width(LAYER, SPEC))
    token = tl.arange(0, get(SPEC, "block")) + zero
    store_rows(rows + row * STRIDE, slabs, token, STRIDE, valid, width(LAYER, SPEC), widest(LAYER, SPEC))


@triton.jit(do_not_specialize=["batch"])
def packed_tokens_kernel(
    data,
    batch,
    net,
    upstream,
    identity,
    grad_key,
    grad_value,
    grad_first,
    part,
    owners,
    units,
    grads,
    grad_params,
    grad_last_weight,
    grad_last_bias,
    SPEC: tl.constexpr,
):
    """dL/dk and dL/dv per token; dL/dq but for its way through c, and dL/dc, per sequence, side by side in
    `grad_first [B, D + H1]`; of the params and the last layer the gradients per program; and per token its sequence,
    `owners`, and per hidden layer its `units`, but of the last, and the gradient of its pre-activations, `grads`."""
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    BLOCK: tl.constexpr = get(SPEC, "block")
    APPROX: tl.constexpr = get(SPEC, "approx")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = net.key.dtype.element_ty
    H1: tl.constexpr = width(0, SPEC)
    H1_SLAB: tl.constexpr = widest(0, SPEC)
    n: tl.constexpr = depth(SPEC)
    program = tl.program_id(0)
    begin, end = share_of(program, data, batch, SPEC)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, batch, begin)
    layers, _params, last = load_network(net, SPEC)
    back = load_back(upstream.back, 0, SPEC)
    key, product = load_resident(net.key, False, SPEC), load_resident(net.product, False, SPEC)
    token = tl.arange(0, BLOCK)
    param_sums = zero_param_sums(SPEC)
    last_sum = zero_octets(
        get(SPEC, "warps"), width(n - 1, SPEC), widest(n - 1, SPEC), narrowest(n - 1, SPEC)
    )
    last_bias_sum = tl.zeros([BLOCK], tl.float32)
    while begin < end:
        sequence, count, stop = group_at(data, batch, sequence, begin, end, GROUP)
        zero = hidden_zero(stop - begin)
        first = first_layer(net, key, product, sequence, count, False, SPEC, zero)
        grad_out = load_members(upstream.grad_out + sequence.to(tl.int64) * DV, count, DV, SLAB, zero)
        grad_out = all_resident(grad_out, False, SPEC)
        # Sums per member, turned: of a product with few rows each warp would compute them all.
        grad_q = zero_matrix(D, SLAB, GROUP, GROUP)
        grad_c = zero_matrix(H1, H1_SLAB, GROUP, GROUP)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            row = tl.cast(start, tl.int64)  # which the interpreter has as a Python int
            rest = (stop - start).to(tl.int32)
            valid = token < rest
            tile_zero = hidden_zero(rest)
            member = member_of(data, start + token, sequence, count)  # [BLOCK]
            k, v = load_tile(data, row, valid, SPEC, tile_zero)
            q = load_queries(data, sequence, member, SPEC)
            chosen = one_hot(identity, tl.where(valid, member, GROUP))  # [BLOCK, GROUP]
            x = k + multiply(q, k, APPROX) + (chosen,)
            again = with_fresh_vectors(net, 0, first, layers, last, rest, SPEC)
            noise = noise_of(net, row + token, SPEC)
            zs, hs, outputs = run_layers(x, first, again[1], again[3], noise, DTYPE, SPEC)
            s = score(hs[n - 1], again[2])  # [BLOCK]
            owner = sequence + member
            a, ds = attend_backward(s, v, chosen, grad_out, upstream, row, owner, valid, SPEC)
            dhs, dzs = run_layers_backward(ds, zs, hs, outputs, back, again[3], noise, SPEC)
            param_sums = add_param_sums(param_sums, zs, dhs, again[3], SPEC)
            last_sum = add_octets(times_rows(ds, hs[n - 1]), last_sum)
            last_bias_sum += ds
            dz = in_dtype(first_dz(dzs, again[2], SPEC), DTYPE)
            tl.store(owners + row + (token + tile_zero), owner, mask=valid)
            leave(grads[0], dz, row, valid, tile_zero, 0, SPEC)
            for i in tl.static_range(1, n):
                leave(units[i - 1], outputs[i - 1], row, valid, tile_zero, i - 1, SPEC)
                leave(grads[i], dzs[n - 1 - i], row, valid, tile_zero, i, SPEC)
            r = in_dtype(times_weight(dz, product, zero_matrix(BLOCK, BLOCK, D, SLAB), SPEC), DTYPE)
            weights = multiply_slab(a.to(DTYPE)[:, None], chosen, APPROX)  # [BLOCK, GROUP]
            if get(SPEC, "separate_values"):
                dv = add_rows(weights, grad_out, zero_matrix(BLOCK, BLOCK, DV, SLAB), PRECISION)
                store_tile(grad_value, dv, data, row, valid, DV, SPEC)
                dk = zero_matrix(BLOCK, BLOCK, D, SLAB)
            else:
                dk = add_rows(weights, grad_out, zero_matrix(BLOCK, BLOCK, D, SLAB), PRECISION)
            dk = add_products(q, r, times_weight(dz, key, dk, SPEC), SPEC)
            store_tile(grad_key, dk, data, row, valid, D, SPEC)
            grad_q = outer_sum(multiply(k, r, APPROX), (chosen,), grad_q, PRECISION)
            grad_c = outer_sum(dz, (chosen,), grad_c, PRECISION)
        held = held_rows(data, sequence, count, begin, stop, program)
        store_held(grad_first, part, held, grad_q, D, SLAB, D + H1)
        store_held(grad_first + D, part + D, held, grad_c, H1, H1_SLAB, D + H1)
        begin = stop
        sequence += count
    store_param_sums(grad_params, param_sums, program, SPEC)
    target = grad_last_weight + program * width(n - 1, SPEC)
    store_octets(target, last_sum, width(n - 1, SPEC), widest(n - 1, SPEC), narrowest(n - 1, SPEC))
    tl.store(grad_last_bias + program, tl.sum(last_bias_sum))


@triton.jit
def pick_up(rows, row, valid, LAYER: tl.constexpr, SPEC: tl.constexpr):
    STRIDE: tl.constexpr = row_stride(width(LAYER, SPEC))
    token = tl.arange(0, get(SPEC, "block"))
    return load_rows(rows + row * STRIDE, token, STRIDE, valid, width(LAYER, SPEC), widest(LAYER, SPEC))


@triton.jit
def load_owners_queries(data, owner, SPEC: tl.constexpr):
    """Of each token its query."""
    valid = owner >= 0
    query = owner.to(tl.int64)
    return load_rows(
        data.query, query, get(SPEC, "query_stride"), valid, get(SPEC, "dim"), get(SPEC, "dim_slab")
    )


@triton.jit(do_not_specialize=["batch"])
def packed_weights_kernel(
    data,
    batch,
    owners,
    units,
    grads,
    grad_key_weight,
    grad_product_weight,
    grad_weights,
    grad_biases,
    SPEC: tl.constexpr,
):
    """The gradients of the first layer's key and product, and of the hidden layers behind it, per program."""
    D: tl.constexpr = get(SPEC, "dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    BLOCK: tl.constexpr = get(SPEC, "block")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = data.key.dtype.element_ty
    H1: tl.constexpr = width(0, SPEC)
    H1_SLAB: tl.constexpr = widest(0, SPEC)
    n: tl.constexpr = depth(SPEC)
    program = tl.program_id(0)
    begin, end = share_of(program, data, batch, SPEC)
    if begin >= end:
        return
    token = tl.arange(0, BLOCK)
    by_key = zero_matrix(D, SLAB, H1, H1_SLAB)
    by_product = zero_matrix(D, SLAB, H1, H1_SLAB)
    sums = ()
    for i in tl.static_range(1, n):
        by_weight = zero_matrix(width(i - 1, SPEC), widest(i - 1, SPEC), width(i, SPEC), widest(i, SPEC))
        sums = sums + ((by_weight, zero_matrix(width(i, SPEC), widest(i, SPEC), 8, 8, 16, 8)),)
    for start in tl.range(begin, end, BLOCK, num_stages=get(SPEC, "stages")):
        row = tl.cast(start, tl.int64)  # which the interpreter has as a Python int
        valid = token < (end - start)
        owner = tl.load(owners + row + token, mask=valid, other=0)
        k, _v = load_tile(data, row, valid, SPEC)
        q = load_owners_queries(data, owner, SPEC)
        dz = pick_up(grads[0], row, valid, 0, SPEC)
        by_key = outer_sum(k, dz, by_key, PRECISION)
        by_product = outer_sum(multiply(q, k, get(SPEC, "approx")), dz, by_product, PRECISION)
        more = ()
        for i in tl.static_range(1, n):
            dz = pick_up(grads[i], row, valid, i, SPEC)
            h = pick_up(units[i - 1], row, valid, i - 1, SPEC)
            by_weight = outer_sum(h, dz, sums[i - 1][0], PRECISION)
            more = more + ((by_weight, column_sum(dz, sums[i - 1][1], DTYPE, PRECISION)),)
        sums = more
    own = program.to(tl.int64) * (H1 * D)
    add_matrix(grad_key_weight + own, by_key, 1, D, SLAB, H1, H1_SLAB)
    add_matrix(grad_product_weight + own, by_product, 1, D, SLAB, H1, H1_SLAB)
    for i in tl.static_range(1, n):
        target = grad_weights[i - 1] + program.to(tl.int64) * (width(i, SPEC) * width(i - 1, SPEC))
        add_matrix(
            target,
            sums[i - 1][0],
            1,
            width(i - 1, SPEC),
            widest(i - 1, SPEC),
            width(i, SPEC),
            widest(i, SPEC),
        )
        target = grad_biases[i - 1] + program * width(i, SPEC)
        store_column(target, sums[i - 1][1], width(i, SPEC), widest(i, SPEC))


def packed_backward(call: Call) -> WeightSums:
    """Where tiles have tokens of several sequences."""
    data, batch, peak_mass = call.data, call.unit.query.shape[0], call.upstream.peak_mass
    row, device = call.net.precision, peak_mass.device
    tokens = call.tuned("packed tokens", row, settings.choose(settings.PACKED_BACKWARD, row, device))
    weights = call.tuned("packed weights", row, settings.choose(settings.PACKED_WEIGHTS, row, device))
    programs, weight_programs = call.programs(tokens), call.programs(weights)
    part = peak_mass.new_empty(2 * programs, call.grad_first.shape[1])
    sums = program_sums(call, weight_programs, weight_programs, programs)
    left = left_behind(data, call.unit.positions, call.net.hidden)
    packed_tokens_kernel[(programs,)](
        data,
        batch,
        call.net.network,
        call.upstream,
        one_hot_rows(data.key),
        call.grad_key,
        call.grad_key if call.grad_value is None else call.grad_value,
        call.grad_first,
        part,
        *left,
        sums["params"],
        sums["last_weight"],
        sums["last_bias"],
        SPEC=call.spec(tokens),
        num_warps=tokens.num_warps,
    )
    merge(part, None, data.offsets, call.grad_first, peak_mass, programs, tokens.least_rows)
    packed_weights_kernel[(weight_programs,)](
        data,
        batch,
        *left,
        sums["key"],
        sums["product"],
        sums["weights"],
        sums["biases"],
        SPEC=call.spec(weights),
        num_warps=weights.num_warps,
    )
    return WeightSums.of_programs(**sums)


def left_behind(
    data: Histories, total: int, hidden: tuple[int, ...]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the first kernel leaves for the second: owners, units and grads."""
    grads = tuple(data.key.new_empty(total, row_stride(n)) for n in hidden)
    units = tuple(data.key.new_empty(total, row_stride(n)) for n in hidden[:-1])
    return data.offsets.new_empty(total, dtype=torch.int32), units, grads
