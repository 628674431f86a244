"""The way back through a wide network, on tiles of tokens. What the weights are, `mlp_backward` says.

The units of the streamed layer do not stay on chip between the way there and the way back; they lie in the chunk, and
where their derivative needs what went into the activation, that lies where dL/dz will.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import depth, get, width
from .dropout import drop_unit_gradients
from .mlp import params_of, score
from .mlp_backward import last_units_backward, units_backward
from .pooling import weigh, weigh_backward
from .primitives import (
    LN_2,
    activate_backward,
    columns,
    dot,
    exp2,
    load_rows,
    param_terms,
    store_rows,
    times_tanh_slope,
)
from .sums import in_dtype
from .wide import (
    activate_held,
    activate_units,
    biases_as_sums,
    feed_units,
    first_params,
    first_units,
    held_params,
    held_slab,
    load_between,
    load_held,
    load_unit_columns,
    load_unit_vector,
    score_units,
    third_layer,
)

FROM_UNITS = ("tanh", "sigmoid", "relu", "identity")  # activations whose units tell their derivative


@triton.constexpr_function
def from_units(layer, spec):
    """Whether the way back through a layer needs its units alone. Statistics need what would go into the last one's."""
    return spec.activation in FROM_UNITS and not (spec.statistics and layer == len(spec.hidden) - 1)


@triton.jit
def needed(z, h, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """What stands for z on the way back. Units do where they can, so that z leaves the registers."""
    if from_units(LAYER, SPEC):
        return h
    else:
        return z


# ------------------------------------------------------------------------------------------------ the chunk


@triton.jit
def load_chunk(pointer, row, unit, inside, SPEC: tl.constexpr):
    """`[tokens, units]` of a `[rows, H1]`."""
    mask = inside[:, None] & (unit < width(0, SPEC))[None, :]
    return tl.load(pointer + row[:, None] * width(0, SPEC) + unit[None, :], mask=mask, other=0.0)


@triton.jit
def store_chunk(pointer, x, row, unit, inside, SPEC: tl.constexpr):
    mask = inside[:, None] & (unit < width(0, SPEC))[None, :]
    tl.store(
        pointer + row[:, None] * width(0, SPEC) + unit[None, :], x.to(pointer.dtype.element_ty), mask=mask
    )


@triton.jit
def store_layer(pointer, slabs, row, inside, LAYER: tl.constexpr, SPEC: tl.constexpr):
    WIDTH: tl.constexpr = width(LAYER, SPEC)
    store_rows(pointer, slabs, row, WIDTH, inside, WIDTH, held_slab(SPEC))


@triton.jit
def keep_units(chunk, h, z, row, unit, inside, SPEC: tl.constexpr):
    if not from_units(0, SPEC) or depth(SPEC) == 1:
        store_chunk(chunk.grads[0], z, row, unit, inside, SPEC)
    if depth(SPEC) > 1:
        store_chunk(chunk.units[0], h, row, unit, inside, SPEC)


@triton.jit
def kept_units(chunk, params, noise, row, unit, inside, SPEC: tl.constexpr):
    """What keep_units has kept: units, and what went into their activation as far as its derivative needs it."""
    if depth(SPEC) == 1:
        z = load_chunk(chunk.grads[0], row, unit, inside, SPEC).to(tl.float32)
        return activate_units(z, params, noise, unit, 0, SPEC), z
    elif from_units(0, SPEC):
        h = load_chunk(chunk.units[0], row, unit, inside, SPEC)
        return h, h
    else:
        h = load_chunk(chunk.units[0], row, unit, inside, SPEC)
        return h, load_chunk(chunk.grads[0], row, unit, inside, SPEC).to(tl.float32)


# ------------------------------------------------------------------------------------------------ there


@triton.jit
def run_forward(pairs, owner, noise, net, chunk, row, valid, inside, SPEC: tl.constexpr):
    """Scores, `[tokens]`; of the held layers what went into their activations, and their units, but for those that
    the chunk keeps."""
    H1: tl.constexpr = width(0, SPEC)
    SLAB: tl.constexpr = get(SPEC, "slab")
    STAGES: tl.constexpr = get(SPEC, "stages")
    last_bias = tl.load(net.last_bias)
    if depth(SPEC) == 1:
        octets = tl.zeros([get(SPEC, "block"), 8], tl.float32)
        for start in tl.range(0, H1, SLAB, num_stages=STAGES):
            unit = start + tl.arange(0, SLAB)
            h, z = first_units(net, pairs, owner, valid, noise, unit, SPEC)
            keep_units(chunk, h, z, row, unit, inside, SPEC)
            octets = score_units(octets, h, net, unit, SPEC)
        return tl.sum(octets, 1) + last_bias, (), ()
    else:
        sums = biases_as_sums(net, 1, SPEC)
        for start in tl.range(0, H1, SLAB, num_stages=STAGES):
            unit = start + tl.arange(0, SLAB)
            h, z = first_units(net, pairs, owner, valid, noise, unit, SPEC)
            keep_units(chunk, h, z, row, unit, inside, SPEC)
            sums = feed_units(sums, h, net, unit, SPEC)
        hs = (activate_held(sums, net, noise, 1, SPEC),)
        zs = (needed(sums, hs[0], 1, SPEC),)
        if depth(SPEC) == 3:
            store_layer(chunk.units[1], hs[0], row, inside, 1, SPEC)
            third = third_layer(hs[0], net, SPEC)
            hs = hs + (activate_held(third, net, noise, 2, SPEC),)
            zs = zs + (needed(third, hs[len(hs) - 1], 2, SPEC),)
        last_weight = load_held(net.last_weight, depth(SPEC) - 1, SPEC)
        return score(hs[len(hs) - 1], (last_weight, last_bias)), zs, hs


# ------------------------------------------------------------------------------------------------ and back


@triton.jit
def attention_gradient(data, upstream, owner, row, position, valid, SPEC: tl.constexpr):
    """dL/da of tokens of several histories, `[tokens]`."""
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    grad = tl.zeros([get(SPEC, "block")], tl.float32)
    if not get(SPEC, "statistics"):
        v = load_rows(data.value, row, get(SPEC, "value_stride"), valid, DV, SLAB)
        grad_out = load_rows(upstream.grad_out, owner, DV, valid, DV, SLAB)
        for i in tl.static_range(len(v)):
            grad += tl.sum(v[i].to(tl.float32) * grad_out[i].to(tl.float32), 1)
    if get(SPEC, "with_scores"):
        grad += tl.load(upstream.grad_scores + position, mask=valid, other=0.0).to(tl.float32)
    return grad


@triton.jit
def attend_rows_backward(s, grad, upstream, owner, valid, SPEC: tl.constexpr):
    """The attention a and dL/ds from the scores s and dL/da, `[tokens]`; zero for slack. Where statistics are wanted,
    the sum over all tokens is differentiated."""
    if get(SPEC, "statistics"):
        return valid.to(tl.float32), valid.to(tl.float32)
    elif get(SPEC, "softmax"):
        log_mass = tl.load(upstream.peak_mass + 2 * owner, mask=valid, other=0.0)
        log_mass += tl.log2(tl.load(upstream.peak_mass + 2 * owner + 1, mask=valid, other=1.0))
        delta = tl.load(upstream.delta + owner, mask=valid, other=0.0)
        a = exp2(tl.where(valid, s - log_mass, float("-inf")), get(SPEC, "approx"))
        return a, a * (grad - delta) * LN_2
    else:
        a = weigh(s, get(SPEC, "normalize"), get(SPEC, "approx"))
        ds = weigh_backward(grad, a, get(SPEC, "normalize"))
        return tl.where(valid, a, 0.0), tl.where(valid, ds, 0.0)


@triton.jit
def store_param_sums(sums, dh, z, params, tile, unit, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """Of a tile, for the params of some units: dL/dh·dh/dparam, which of the last layer wants the weight behind it."""
    if LAYER < get(SPEC, "param_layers"):
        terms = param_terms(z, params, get(SPEC, "activation"), get(SPEC, "approx"))
        for n in tl.static_range(get(SPEC, "params_each")):
            target = sums.params[LAYER * get(SPEC, "params_each") + n] + tile * width(LAYER, SPEC) + unit
            tl.store(target, tl.sum(dh * terms[n], 0), mask=unit < width(LAYER, SPEC))


@triton.jit
def last_back(ds, z, h, noise, net, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """From dL/ds to e of the last layer, where that is held; stored too."""
    LAST: tl.constexpr = depth(SPEC) - 1
    H: tl.constexpr = width(LAST, SPEC)
    params = held_params(net, LAST, SPEC)
    dh, e = last_units_backward(ds, z, h, params, noise, SPEC)
    for j in tl.static_range(len(z)):
        unit = columns(j, H, held_slab(SPEC))
        if get(SPEC, "last_layer"):
            tl.store(sums.last_weight + tile * H + unit, tl.sum(ds[:, None] * h[j], 0), mask=unit < H)
        store_param_sums(sums, dh[j], z[j], params_of(params, j), tile, unit, LAST, SPEC)
    e = in_dtype(e, chunk.grads[LAST].dtype.element_ty)
    store_layer(chunk.grads[LAST], e, row, inside, LAST, SPEC)
    return e


@triton.jit
def second_back(e, z, h, noise, net, back, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """From e of the third layer to dL/dz of the second; stored too."""
    params = held_params(net, 1, SPEC)
    dh = ()
    outputs = ()
    for i in tl.static_range(len(h)):
        grad = tl.zeros(z[i].shape, tl.float32)
        for j in tl.static_range(len(e)):
            weight = load_between(back[1], j, i, SPEC)
            grad = dot(e[j].to(weight.dtype), weight, grad, get(SPEC, "precision"))
        unit = columns(i, width(1, SPEC), held_slab(SPEC))
        grad = drop_unit_gradients(grad, noise, unit, 1, SPEC)
        store_param_sums(sums, grad, z[i], params_of(params, i), tile, unit, 1, SPEC)
        dh = dh + (grad,)
        outputs = outputs + (h[i].to(back[1].dtype.element_ty),)
    dz = units_backward(dh, z, h, outputs, params, SPEC)
    store_layer(chunk.grads[1], dz, row, inside, 1, SPEC)
    return dz


@triton.jit
def first_back(dz, noise, net, back, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """From dL/dz of the second layer to that of the first, a slab of units at a time."""
    H1: tl.constexpr = width(0, SPEC)
    SLAB: tl.constexpr = get(SPEC, "slab")
    for start in tl.range(0, H1, SLAB, num_stages=get(SPEC, "stages")):
        unit = start + tl.arange(0, SLAB)
        dh = tl.zeros([get(SPEC, "block"), SLAB], tl.float32)
        for j in tl.static_range(len(dz)):
            weight = load_unit_columns(back[0], unit, j, SPEC)
            dh = dot(dz[j].to(weight.dtype), weight, dh, get(SPEC, "precision"))
        dh = drop_unit_gradients(dh, noise, unit, 0, SPEC)
        params = first_params(net, unit, SPEC)
        h, z = kept_units(chunk, params, noise, row, unit, inside, SPEC)
        store_param_sums(sums, dh, z, params, tile, unit, 0, SPEC)
        store_chunk(chunk.grads[0], unit_back(dh, z, h, params, SPEC), row, unit, inside, SPEC)


@triton.jit
def only_back(ds, noise, net, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """From dL/ds to dL/dz of the first layer where there is no other."""
    H1: tl.constexpr = width(0, SPEC)
    SLAB: tl.constexpr = get(SPEC, "slab")
    for start in tl.range(0, H1, SLAB, num_stages=get(SPEC, "stages")):
        unit = start + tl.arange(0, SLAB)
        params = first_params(net, unit, SPEC)
        h, z = kept_units(chunk, params, noise, row, unit, inside, SPEC)
        weight = load_unit_vector(net.last_weight, unit, SPEC)[None, :]
        if get(SPEC, "statistics"):
            grad = ds[:, None] * weight * (params[0] + params[1] * z)
        else:
            tl.store(sums.last_weight + tile * H1 + unit, tl.sum(ds[:, None] * h, 0), mask=unit < H1)
            dh = drop_unit_gradients(tl.broadcast_to(ds[:, None], z.shape), noise, unit, 0, SPEC)
            store_param_sums(sums, dh, z, params, tile, unit, 0, SPEC)
            grad = activate_backward(dh * weight, z, h, params, get(SPEC, "activation"), get(SPEC, "approx"))
        store_chunk(chunk.grads[0], grad, row, unit, inside, SPEC)


@triton.jit
def unit_back(dh, z, h, params, SPEC: tl.constexpr):
    """dL/dz from dL/dh of the streamed layer, the latter with the sign that the matrices of the way back have."""
    if get(SPEC, "activation") == "tanh":
        return times_tanh_slope(dh, h, get(SPEC, "approx"))
    else:
        return activate_backward(
            dh, z, h.to(tl.float32), params, get(SPEC, "activation"), get(SPEC, "approx")
        )


@triton.jit
def run_back(ds, zs, hs, noise, net, back, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """dL/dz of all layers into the chunk, and the sums of the tile."""
    tl.store(sums.last_bias + tile, tl.sum(ds, 0))
    if depth(SPEC) == 1:
        tl.debug_barrier()  # other threads may read what keep_units has stored
        only_back(ds, noise, net, chunk, sums, tile, row, inside, SPEC)
    else:
        LAST: tl.constexpr = depth(SPEC) - 2  # of the held layers
        dz = last_back(ds, zs[LAST], hs[LAST], noise, net, chunk, sums, tile, row, inside, SPEC)
        if depth(SPEC) == 3:
            dz = second_back(dz, zs[0], hs[0], noise, net, back, chunk, sums, tile, row, inside, SPEC)
        tl.debug_barrier()
        first_back(dz, noise, net, back, chunk, sums, tile, row, inside, SPEC)
