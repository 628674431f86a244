"""activation_unit backward, the kernel of the weights behind the first layer and of all params.

Sums of several params and of the weights together are more than registers hold: a launch for each is less than what
leaves them costs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import depth, get, narrowest, widest, width
from .attend_backward import attend_backward, load_sequence
from .dropout import noise_of
from .histories import load_tile, part_at, position_of, share_of
from .mlp import hidden_zero, load_network, load_params, params_of, run_layers, score
from .mlp_backward import load_back, run_layers_backward, with_fresh_vectors
from .primitives import param_terms
from .schedule import find_sequence
from .sums import add_matrix, add_octets, in_dtype, outer_sum, store_octets, zero_matrix, zero_octets


@triton.jit
def zero_sums(SPEC: tl.constexpr):
    """Per hidden layer after the first, sums for its transposed weight and its bias; per hidden layer for its params;
    for the last weight."""
    sums = ()
    for i in tl.static_range(1, get(SPEC, "weight_layers") + 1):
        weight = zero_matrix(
            width(i - 1, SPEC), get(SPEC, "slab"), width(i, SPEC), widest(i, SPEC), 16, narrowest(i, SPEC)
        )
        sums = sums + (
            (weight, zero_octets(get(SPEC, "warps"), width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC))),
        )
    param_sums = ()
    for i in tl.static_range(get(SPEC, "param_layers")):
        layer = ()
        for _ in tl.static_range(get(SPEC, "params_each")):
            layer = layer + (
                zero_octets(get(SPEC, "warps"), width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC)),
            )
        param_sums = param_sums + (layer,)
    if get(SPEC, "last_layer"):
        last: tl.constexpr = depth(SPEC) - 1
        return (
            sums,
            param_sums,
            zero_octets(get(SPEC, "warps"), width(last, SPEC), widest(last, SPEC), narrowest(last, SPEC)),
        )
    else:
        return sums, param_sums, ()


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
def add_param_sums(param_sums, zs, dhs, params, SPEC: tl.constexpr):
    """Of dL/dh·dh/dparam, which of the last layer want the weight behind it."""
    out = ()
    for i in tl.static_range(len(param_sums)):
        layer = ()
        for n in tl.static_range(len(param_sums[i])):
            terms = ()
            for j in tl.static_range(len(zs[i])):
                by_param = param_terms(
                    zs[i][j], params_of(params[i], j), get(SPEC, "activation"), get(SPEC, "approx")
                )
                terms = terms + (dhs[depth(SPEC) - 1 - i][j] * by_param[n],)
            layer = layer + (add_octets(terms, param_sums[i][n]),)
        out = out + (layer,)
    return out


@triton.jit
def times_rows(rows, slabs):
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (rows[:, None] * slabs[i],)
    return out


@triton.jit(do_not_specialize=["batch"])
def weights_kernel(
    data,
    batch,
    net,
    upstream,
    grad_weights,
    grad_biases,
    grad_params,
    grad_last_weight,
    grad_last_bias,
    SPEC: tl.constexpr,
):
    """The gradients of the layers behind the first, and of all params, per program."""
    BLOCK: tl.constexpr = get(SPEC, "block")
    DTYPE: tl.constexpr = net.key.dtype.element_ty
    n: tl.constexpr = depth(SPEC)
    program = tl.program_id(0)
    begin, end = share_of(program, data, batch, SPEC)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, batch, begin)
    layers, _params, last = load_network(net, SPEC)
    back = load_back(upstream.back, 0 if get(SPEC, "param_layers") > 0 else 1, SPEC)
    token = tl.arange(0, BLOCK)
    sums, param_sums, last_sum = zero_sums(SPEC)
    last_bias_sum = tl.zeros([BLOCK], tl.float32)
    while begin < end:
        sequence, first_row, _last_row, stop = part_at(data, batch, sequence, begin, end)
        owner = sequence.to(tl.int64)
        _q, first, grads = load_sequence(data, net, upstream, owner, True, SPEC)
        position = position_of(data, owner, first_row, begin, SPEC)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            rest = (stop - start).to(tl.int32)
            k, v = load_tile(data, position, token < rest, SPEC)
            again = with_fresh_vectors(net, owner, first, layers, last, rest, SPEC)
            noise = noise_of(net, start + token, SPEC)
            zs, hs, outputs = run_layers(k, again[0], again[1], again[3], noise, DTYPE, SPEC)
            s = score(hs[n - 1], again[2])  # [BLOCK]
            _a, ds = attend_backward(s, v, grads, upstream.grad_scores + position, rest, SPEC)
            params = again[3]
            if get(SPEC, "sums") == "params":  # their sums leave no registers for what stays through a tile
                params = load_params(net, hidden_zero(rest, 2), SPEC)
            dhs, dzs = run_layers_backward(ds, zs, hs, outputs, back, params, noise, SPEC)
            sums = add_layer_sums(sums, outputs, dzs, SPEC)
            param_sums = add_param_sums(param_sums, zs, dhs, params, SPEC)
            if get(SPEC, "last_layer"):
                last_sum = add_octets(times_rows(ds, hs[n - 1]), last_sum)
                last_bias_sum += ds
            position += BLOCK
        begin = stop
        sequence += 1
    for i in tl.static_range(1, len(sums) + 1):
        target = grad_weights[i - 1] + program.to(tl.int64) * (width(i, SPEC) * width(i - 1, SPEC))
        store_matrix_of(target, sums[i - 1][0], i, SPEC)
        target = grad_biases[i - 1] + program * width(i, SPEC)
        store_octets(target, sums[i - 1][1], width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC))
    for i in tl.static_range(len(param_sums)):
        for j in tl.static_range(len(param_sums[i])):
            target = grad_params[i * get(SPEC, "params_each") + j] + program * width(i, SPEC)
            store_octets(target, param_sums[i][j], width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC))
    if get(SPEC, "last_layer"):
        target = grad_last_weight + program * width(n - 1, SPEC)
        store_octets(target, last_sum, width(n - 1, SPEC), widest(n - 1, SPEC), narrowest(n - 1, SPEC))
        tl.store(grad_last_bias + program, tl.sum(last_bias_sum))
