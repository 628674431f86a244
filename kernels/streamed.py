"""The scoring MLP where only scores are wanted: each slab of units goes straight into the sums of the next layer.

So no layer is ever held as a whole, and registers that would hold it are free for the loop around it.

An operand of a product is a tuple of parts whose sum it is, each a tuple of slabs. Products of fp32 at its full
accuracy take parts that a matrix unit multiplies exactly, two in tf32 or three in bf16; all others take one part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import depth, get, narrowest, widest, width
from .dropout import drop
from .mlp import load_network, load_units, params_of, score
from .primitives import (
    activate,
    dot,
    load_matrix,
    load_slab,
    multiply_add,
    slab_count,
    split_bfloat16,
    split_tf32,
)


@triton.jit
def load_layers(net, SPEC: tl.constexpr):
    """As load_network, with the weights as parts. Parts of one weight lie behind each other."""
    whole, params, last = load_network(net, SPEC)
    layers = ()
    for i in tl.static_range(1, depth(SPEC)):
        parts = ()
        for part in tl.static_range(3 if get(SPEC, "split") else 1):
            weight = load_matrix(
                net.weights[i - 1] + part * (width(i, SPEC) * width(i - 1, SPEC)),
                width(i, SPEC),
                widest(i, SPEC),
                narrowest(i, SPEC),
                width(i - 1, SPEC),
                get(SPEC, "slab"),
            )
            parts = parts + (weight,)
        layers = layers + ((parts, whole[i - 1][1]),)
    return layers, params, last


@triton.jit
def split_keys(slabs, SPEC: tl.constexpr):
    """What the first layer multiplies, as parts."""
    if get(SPEC, "split"):
        high = ()
        low = ()
        for i in tl.static_range(len(slabs)):
            h, rest = split_tf32(slabs[i])
            high = high + (h,)
            low = low + (rest,)
        return high, low
    else:
        return (slabs,)


@triton.jit
def first_layer(net, q, sequence, SPEC: tl.constexpr):
    """The first layer as the query of a sequence makes it: (W_eff = key + product·diag(q) as parts, c).

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
    return split_keys(weight, SPEC), load_units(net.first_bias + sequence * H1, 0, SPEC)


@triton.jit
def split_units(h, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """A slab of units as parts that a weight in DTYPE multiplies."""
    if get(SPEC, "split"):
        return split_bfloat16(h)
    else:
        return (h.to(DTYPE),)


@triton.jit
def add_product(z, x, weight, j: tl.constexpr, SPEC: tl.constexpr):
    """`z + x Wᵀ` of a slab x, given as parts, and slab j of the weight. The least products come first; those
    that are less than what fp32 holds are left out."""
    LAST: tl.constexpr = len(x) - 1
    for order in tl.static_range(len(x)):
        for part in tl.static_range(len(x) - order):
            z = dot(x[part], tl.trans(weight[LAST - order - part][j]), z, get(SPEC, "precision"))
    return z


@triton.jit
def activate_slab(z, params, noise, j: tl.constexpr, LAYER: tl.constexpr, SPEC: tl.constexpr):
    h = activate(z, params_of(params[LAYER], j), get(SPEC, "activation"), get(SPEC, "approx"))
    return drop(h, noise, j, LAYER, SPEC)


@triton.jit
def spread(bias, ROWS: tl.constexpr):
    """The biases of a layer as what its sums begin with, slabs `[ROWS, units]`."""
    slabs = ()
    for j in tl.static_range(len(bias)):
        slabs = slabs + (tl.broadcast_to(bias[j][None, :], [ROWS, bias[j].shape[0]]),)
    return slabs


@triton.jit
def feed(sums, units, weight, INDEX: tl.constexpr, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """The sums of a layer with what slab INDEX of its COUNT slabs of inputs adds to them."""
    x = split_units(units, weight[0][0].dtype, SPEC)
    out = ()
    for j in tl.static_range(len(sums)):
        out = out + (add_product(sums[j], x, weight, j * COUNT + INDEX, SPEC),)
    return out


@triton.jit
def first_sums(k, first, j: tl.constexpr, SPEC: tl.constexpr):
    """Slab j of the first hidden layer, before its activation."""
    weight, bias = first
    COUNT: tl.constexpr = len(k[0])
    z = tl.broadcast_to(bias[j][None, :], [k[0][0].shape[0], bias[j].shape[0]])
    for i in tl.static_range(COUNT):
        x = ()
        for part in tl.static_range(len(k)):
            x = x + (k[part][i],)
        z = add_product(z, x, weight, j * COUNT + i, SPEC)
    return z


@triton.jit
def last_sums(keys, first, layers, params, noise, SPEC: tl.constexpr):
    """The last hidden layer before its activation, slabs `[tokens, units]`."""
    COUNT: tl.constexpr = len(first[1])
    k = split_keys(keys, SPEC)
    if len(layers) == 0:
        sums = ()
        for j in tl.static_range(COUNT):
            sums = sums + (first_sums(k, first, j, SPEC),)
        return sums
    else:
        sums = spread(layers[0][1], keys[0].shape[0])
        for j in tl.static_range(COUNT):
            h = activate_slab(first_sums(k, first, j, SPEC), params, noise, j, 0, SPEC)
            sums = feed(sums, h, layers[0][0], j, COUNT, SPEC)
        if len(layers) == 1:
            return sums
        else:
            third = spread(layers[1][1], keys[0].shape[0])
            for j in tl.static_range(len(sums)):
                h = activate_slab(sums[j], params, noise, j, 1, SPEC)
                third = feed(third, h, layers[1][0], j, len(sums), SPEC)
            return third


@triton.jit
def score_tokens(keys, first, layers, params, last, SPEC: tl.constexpr, noise=()):
    """`[tokens]`. `noise` is that of `noise_of`."""
    sums = last_sums(keys, first, layers, params, noise, SPEC)
    units = ()
    for j in tl.static_range(len(sums)):
        units = units + (activate_slab(sums[j], params, noise, j, len(layers), SPEC),)
    return score(units, last)
