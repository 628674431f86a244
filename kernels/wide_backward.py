"""The way back through a wide network, on tiles of tokens. What the weights are, `mlp_backward` says.

The units of the streamed layer do not stay on chip between the way there and the way back; they lie in the chunk, and
where their derivative needs what went into the activation, that lies where dL/dz will.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import depth, get, width
from .mlp import score
from .mlp_backward import last_units_backward, units_backward
from .pooling import weigh, weigh_backward
from .primitives import (
    LN_2,
    activate,
    activate_backward,
    columns,
    dot,
    exp2,
    load_rows,
    store_rows,
    times_tanh_slope,
)
from .wide import (
    activate_held,
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
def from_units(activation):
    return activation in FROM_UNITS


@triton.jit
def needed(z, h, SPEC: tl.constexpr):
    """What stands for z on the way back. Units do where they can, so that z leaves the registers."""
    if from_units(get(SPEC, "activation")):
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
    if not from_units(get(SPEC, "activation")) or depth(SPEC) == 1:
        store_chunk(chunk.grads[0], z, row, unit, inside, SPEC)
    if depth(SPEC) > 1:
        store_chunk(chunk.units[0], h, row, unit, inside, SPEC)


@triton.jit
def kept_units(chunk, params, row, unit, inside, SPEC: tl.constexpr):
    """What keep_units has kept: units, and what went into their activation as far as its derivative needs it."""
    if depth(SPEC) == 1:
        z = load_chunk(chunk.grads[0], row, unit, inside, SPEC).to(tl.float32)
        return activate(z, params, get(SPEC, "activation"), get(SPEC, "approx")), z
    elif from_units(get(SPEC, "activation")):
        h = load_chunk(chunk.units[0], row, unit, inside, SPEC)
        return h, h
    else:
        h = load_chunk(chunk.units[0], row, unit, inside, SPEC)
        return h, load_chunk(chunk.grads[0], row, unit, inside, SPEC).to(tl.float32)


# ------------------------------------------------------------------------------------------------ there


@triton.jit
def run_forward(pairs, owner, net, chunk, row, valid, inside, SPEC: tl.constexpr):
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
            h, z = first_units(net, pairs, owner, valid, unit, SPEC)
            keep_units(chunk, h, z, row, unit, inside, SPEC)
            octets = score_units(octets, h, net, unit, SPEC)
        return tl.sum(octets, 1) + last_bias, (), ()
    else:
        sums = biases_as_sums(net, 1, SPEC)
        for start in tl.range(0, H1, SLAB, num_stages=STAGES):
            unit = start + tl.arange(0, SLAB)
            h, z = first_units(net, pairs, owner, valid, unit, SPEC)
            keep_units(chunk, h, z, row, unit, inside, SPEC)
            sums = feed_units(sums, h, net, unit, SPEC)
        hs = (activate_held(sums, held_params(net, 1, SPEC), SPEC),)
        zs = (needed(sums, hs[0], SPEC),)
        if depth(SPEC) == 3:
            store_layer(chunk.units[1], hs[0], row, inside, 1, SPEC)
            third = third_layer(hs[0], net, SPEC)
            hs = hs + (activate_held(third, held_params(net, 2, SPEC), SPEC),)
            zs = zs + (needed(third, hs[len(hs) - 1], SPEC),)
        last_weight = load_held(net.last_weight, depth(SPEC) - 1, SPEC)
        return score(hs[len(hs) - 1], (last_weight, last_bias)), zs, hs


# ------------------------------------------------------------------------------------------------ and back


@triton.jit
def attention_gradient(data, upstream, owner, row, position, valid, SPEC: tl.constexpr):
    """dL/da of tokens of several histories, `[tokens]`."""
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    v = load_rows(data.value, row, get(SPEC, "value_stride"), valid, DV, SLAB)
    grad_out = load_rows(upstream.grad_out, owner, DV, valid, DV, SLAB)
    grad = tl.zeros([get(SPEC, "block")], tl.float32)
    for i in tl.static_range(len(v)):
        grad += tl.sum(v[i].to(tl.float32) * grad_out[i].to(tl.float32), 1)
    if get(SPEC, "with_scores"):
        grad += tl.load(upstream.grad_scores + position, mask=valid, other=0.0).to(tl.float32)
    return grad


@triton.jit
def attend_rows_backward(s, grad, upstream, owner, valid, SPEC: tl.constexpr):
    """The attention a and dL/ds from the scores s and dL/da, `[tokens]`; zero for slack."""
    if get(SPEC, "softmax"):
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
def slope_terms(dh, z):
    return tl.sum(dh * tl.minimum(z, 0.0), 0)


@triton.jit
def store_sums(pointer, slabs, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """Of a tile, vectors over the units of a held layer."""
    for j in tl.static_range(len(slabs)):
        column = columns(j, width(LAYER, SPEC), held_slab(SPEC))
        tl.store(pointer + column, slabs[j], mask=column < width(LAYER, SPEC))


@triton.jit
def last_back(ds, z, h, net, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """From dL/ds to e of the last layer, where that is held; stored too."""
    LAST: tl.constexpr = depth(SPEC) - 1
    H: tl.constexpr = width(LAST, SPEC)
    for_weight = ()
    for_slope = ()
    for j in tl.static_range(len(h)):
        for_weight = for_weight + (tl.sum(ds[:, None] * h[j], 0),)
        if get(SPEC, "activation") == "leaky_relu":
            for_slope = for_slope + (slope_terms(ds[:, None], z[j]),)
    store_sums(sums.last_weight + tile * H, for_weight, LAST, SPEC)
    if get(SPEC, "activation") == "leaky_relu":
        store_sums(sums.slopes[LAST] + tile * H, for_slope, LAST, SPEC)
    _dh, e = last_units_backward(ds, z, h, held_params(net, LAST, SPEC), (), SPEC)
    store_layer(chunk.grads[LAST], e, row, inside, LAST, SPEC)
    return e


@triton.jit
def second_back(e, z, h, net, back, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """From e of the third layer to dL/dz of the second; stored too."""
    H2: tl.constexpr = width(1, SPEC)
    dh = ()
    outputs = ()
    for_slope = ()
    for i in tl.static_range(len(h)):
        grad = tl.zeros(z[i].shape, tl.float32)
        for j in tl.static_range(len(e)):
            weight = load_between(back[1], j, i, SPEC)
            grad = dot(e[j].to(weight.dtype), weight, grad, get(SPEC, "precision"))
        dh = dh + (grad,)
        outputs = outputs + (h[i].to(back[1].dtype.element_ty),)
        if get(SPEC, "activation") == "leaky_relu":
            for_slope = for_slope + (slope_terms(grad, z[i]),)
    dz = units_backward(dh, z, h, outputs, held_params(net, 1, SPEC), SPEC)
    store_layer(chunk.grads[1], dz, row, inside, 1, SPEC)
    if get(SPEC, "activation") == "leaky_relu":
        store_sums(sums.slopes[1] + tile * H2, for_slope, 1, SPEC)
    return dz


@triton.jit
def first_back(dz, net, back, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """From dL/dz of the second layer to that of the first, a slab of units at a time."""
    H1: tl.constexpr = width(0, SPEC)
    SLAB: tl.constexpr = get(SPEC, "slab")
    for start in tl.range(0, H1, SLAB, num_stages=get(SPEC, "stages")):
        unit = start + tl.arange(0, SLAB)
        dh = tl.zeros([get(SPEC, "block"), SLAB], tl.float32)
        for j in tl.static_range(len(dz)):
            weight = load_unit_columns(back[0], unit, j, SPEC)
            dh = dot(dz[j].to(weight.dtype), weight, dh, get(SPEC, "precision"))
        params = first_params(net, unit, SPEC)
        h, z = kept_units(chunk, params, row, unit, inside, SPEC)
        if get(SPEC, "activation") == "leaky_relu":
            store_slopes(sums, slope_terms(dh, z), tile, unit, SPEC)
        grad = unit_back(dh, z, h, params, SPEC)
        store_chunk(chunk.grads[0], grad, row, unit, inside, SPEC)


@triton.jit
def only_back(ds, net, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """From dL/ds to dL/dz of the first layer where there is no other."""
    H1: tl.constexpr = width(0, SPEC)
    SLAB: tl.constexpr = get(SPEC, "slab")
    for start in tl.range(0, H1, SLAB, num_stages=get(SPEC, "stages")):
        unit = start + tl.arange(0, SLAB)
        params = first_params(net, unit, SPEC)
        h, z = kept_units(chunk, params, row, unit, inside, SPEC)
        if get(SPEC, "activation") == "leaky_relu":
            store_slopes(sums, slope_terms(ds[:, None], z), tile, unit, SPEC)
        tl.store(sums.last_weight + tile * H1 + unit, tl.sum(ds[:, None] * h, 0), mask=unit < H1)
        dh = ds[:, None] * load_unit_vector(net.last_weight, unit, SPEC)[None, :]
        grad = activate_backward(dh, z, h, params, get(SPEC, "activation"), get(SPEC, "approx"))
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
def store_slopes(sums, x, tile, unit, SPEC: tl.constexpr):
    tl.store(sums.slopes[0] + tile * width(0, SPEC) + unit, x, mask=unit < width(0, SPEC))


@triton.jit
def run_back(ds, zs, hs, net, back, chunk, sums, tile, row, inside, SPEC: tl.constexpr):
    """dL/dz of all layers into the chunk, and the sums of the tile."""
    tl.store(sums.last_bias + tile, tl.sum(ds, 0))
    if depth(SPEC) == 1:
        tl.debug_barrier()  # other threads may read what keep_units has stored
        only_back(ds, net, chunk, sums, tile, row, inside, SPEC)
    else:
        LAST: tl.constexpr = depth(SPEC) - 2  # of the held layers
        dz = last_back(ds, zs[LAST], hs[LAST], net, chunk, sums, tile, row, inside, SPEC)
        if depth(SPEC) == 3:
            dz = second_back(dz, zs[0], hs[0], net, back, chunk, sums, tile, row, inside, SPEC)
        tl.debug_barrier()
        first_back(dz, net, back, chunk, sums, tile, row, inside, SPEC)
