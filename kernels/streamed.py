"""The scoring MLP where only scores are wanted: each slab of units goes straight into the sums of the next layer.

So no layer is ever held as a whole, and registers that would hold it are free for the loop around it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get, narrowest, widest, width
from .mlp import load_units, score
from .primitives import activate, dot, load_slab, multiply_add, slab_count


@triton.jit
def first_layer(net, q, sequence, SPEC: tl.constexpr):
    """The first layer as the query of a sequence makes it: (W_eff = key + product·diag(q), c).

    Slab after slab, so that each leaves the registers before the next is loaded.
    """
    H1: tl.constexpr = width(0, SPEC)
    H1_SLAB: tl.constexpr = widest(0, SPEC)
    LEAST: tl.constexpr = narrowest(0, SPEC)
    D: tl.constexpr = get(SPEC, "dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    weight = ()
    for j in tl.static_range(slab_count(H1, H1_SLAB, LEAST)):
        for i in tl.static_range(len(q)):
            key = load_slab(net.key, j, i, H1, H1_SLAB, LEAST, D, SLAB)
            product = load_slab(net.product, j, i, H1, H1_SLAB, LEAST, D, SLAB)
            weight = weight + (multiply_add(product, q[i][None, :], key, get(SPEC, "approx"), PURE=True),)
    return weight, load_units(net.first_bias + sequence * H1, 0, SPEC)


@triton.jit
def spread(bias, ROWS: tl.constexpr):
    """The biases of a layer as what its sums begin with, slabs `[ROWS, units]`."""
    slabs = ()
    for j in tl.static_range(len(bias)):
        slabs = slabs + (tl.broadcast_to(bias[j][None, :], [ROWS, bias[j].shape[0]]),)
    return slabs


@triton.jit
def add_products(sums, x, weight, INDEX: tl.constexpr, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """The sums of a layer with what slab INDEX of its COUNT slabs of inputs adds to them."""
    out = ()
    for j in tl.static_range(len(sums)):
        w = weight[j * COUNT + INDEX]
        out = out + (dot(x.to(w.dtype), tl.trans(w), sums[j], get(SPEC, "precision")),)
    return out


@triton.jit
def activate_slab(z, slopes, j: tl.constexpr, SPEC: tl.constexpr):
    slope = slopes[j][None, :] if len(slopes) > 0 else 0.0
    return activate(z, slope, get(SPEC, "activation"), get(SPEC, "approx"))


@triton.jit
def first_units(k, first, slopes, j: tl.constexpr, SPEC: tl.constexpr):
    """Slab j of the first hidden layer."""
    weight, bias = first
    z = tl.broadcast_to(bias[j][None, :], [k[0].shape[0], bias[j].shape[0]])
    for i in tl.static_range(len(k)):
        z = dot(k[i], tl.trans(weight[j * len(k) + i]), z, get(SPEC, "precision"))
    return activate_slab(z, slopes, j, SPEC)


@triton.jit
def score_tokens(k, first, layers, slopes, last, SPEC: tl.constexpr):
    """`[tokens]`."""
    COUNT: tl.constexpr = len(first[1])
    if len(layers) == 0:
        h = ()
        for j in tl.static_range(COUNT):
            h = h + (first_units(k, first, slopes[0], j, SPEC),)
        return score(h, last)
    else:
        sums = spread(layers[0][1], k[0].shape[0])
        for j in tl.static_range(COUNT):
            units = first_units(k, first, slopes[0], j, SPEC)
            sums = add_products(sums, units, layers[0][0], j, COUNT, SPEC)
        return score(later_units(sums, layers, slopes, SPEC), last)


@triton.jit
def later_units(sums, layers, slopes, SPEC: tl.constexpr):
    """The units of the last hidden layer, from the sums of the second."""
    if len(layers) == 2:
        count: tl.constexpr = len(sums)
        third = spread(layers[1][1], sums[0].shape[0])
        for j in tl.static_range(count):
            third = add_products(third, activate_slab(sums[j], slopes[1], j, SPEC), layers[1][0], j, count, SPEC)
        return activate_layer(third, slopes[2], SPEC)
    else:
        return activate_layer(sums, slopes[1], SPEC)


@triton.jit
def activate_layer(sums, slopes, SPEC: tl.constexpr):
    units = ()
    for j in tl.static_range(len(sums)):
        units = units + (activate_slab(sums[j], slopes, j, SPEC),)
    return units
