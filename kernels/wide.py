"""The scoring MLP where its layers are too wide for a program to keep their weights.

The first layer is *streamed*: a loop at run time takes a slab of its units at a time, with the weights that make it
and those that read it, and adds it to the sums of the second layer. These, and the layers behind, are *held*.

Tiles have tokens that follow each other, of whatever sequences. So W_eff(q) is never built; the two blocks of

    z1 = key·k + product·(q*k) + c(q)

are read by all tokens alike, and no tile is cut where a sequence ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import depth, get, params_loaded, width
from .dropout import drop_units, noise_of
from .mlp import params_of, places_of, score
from .primitives import (
    activate,
    columns,
    dot,
    load_rows,
    load_slab,
    load_vector,
    slab_inside,
)


@triton.constexpr_function
def held_slab(spec):
    """The widest slab of a layer that is held."""
    return spec.last_slab[0]


# ------------------------------------------------------------------------------------------------ tokens


@triton.jit
def owners_of(owners, batch, position, count):
    """Of each position below `count` its sequence, and whether it is of any: slack is of none."""
    owner = tl.load(owners + position, mask=position < count, other=batch)
    return owner.to(tl.int64), owner < batch


@triton.jit
def rows_of(data, position, valid, SPEC: tl.constexpr):
    """Where the keys and values of positions lie."""
    if get(SPEC, "indexed"):
        return tl.load(data.rows + position, mask=valid, other=0).to(tl.int64)
    else:
        return position


@triton.jit
def load_pairs(data, owner, row, valid, SPEC: tl.constexpr):
    """What the first layer reads of each token: the slabs of k and of q*k."""
    D: tl.constexpr = get(SPEC, "dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    k = load_rows(data.key, row, get(SPEC, "key_stride"), valid, D, SLAB)
    q = load_rows(data.query, owner, get(SPEC, "query_stride"), valid, D, SLAB)
    products = ()
    for i in tl.static_range(len(k)):
        product = q[i].to(tl.float32) * k[i].to(tl.float32)
        products = products + (product.to(k[i].dtype),)
    return k, products


# ------------------------------------------------------------------------------------------------ the streamed layer


@triton.jit
def load_unit_rows(pointer, unit, i: tl.constexpr, SPEC: tl.constexpr):
    """`[units, dims]`: slab i of the rows of the first layer's weight that make these units."""
    D: tl.constexpr = get(SPEC, "dim")
    H1: tl.constexpr = width(0, SPEC)
    column = columns(i, D, get(SPEC, "dim_slab"))[None, :]
    places = pointer + unit[:, None] * D + column
    if slab_inside(i, D, get(SPEC, "dim_slab")) and H1 % get(SPEC, "slab") == 0:
        return tl.load(places)
    else:
        return tl.load(places, mask=(unit < H1)[:, None] & (column < D), other=0.0)


@triton.jit
def load_unit_columns(pointer, unit, j: tl.constexpr, SPEC: tl.constexpr):
    """`[units of the second layer, units]`: slab j of those columns of its weight that read these units."""
    H1: tl.constexpr = width(0, SPEC)
    H2: tl.constexpr = width(1, SPEC)
    row = columns(j, H2, held_slab(SPEC))[:, None]
    places = pointer + row * H1 + unit[None, :]
    if slab_inside(j, H2, held_slab(SPEC)) and H1 % get(SPEC, "slab") == 0:
        return tl.load(places)
    else:
        return tl.load(places, mask=(row < H2) & (unit < H1)[None, :], other=0.0)


@triton.jit
def load_unit_vector(pointer, unit, SPEC: tl.constexpr):
    if width(0, SPEC) % get(SPEC, "slab") == 0:
        return tl.load(pointer + unit)
    else:
        return tl.load(pointer + unit, mask=unit < width(0, SPEC), other=0.0)


@triton.jit
def first_params(net, unit, SPEC: tl.constexpr):
    """The vectors that the activation of these units takes, as rows."""
    rows = ()
    for n in tl.static_range(params_loaded(0, len(net.params), SPEC)):
        rows = rows + (load_unit_vector(net.params[n], unit, SPEC)[None, :],)
    return rows


@triton.jit
def first_sums(net, pairs, owner, valid, unit, SPEC: tl.constexpr):
    """What goes into the activation of units of the first layer, `[tokens, units]`."""
    k, products = pairs
    H1: tl.constexpr = width(0, SPEC)
    PRECISION: tl.constexpr = get(SPEC, "precision")
    inside = valid[:, None]
    if H1 % get(SPEC, "slab") != 0:
        inside = inside & (unit < H1)[None, :]
    z = tl.load(net.first_bias + owner[:, None] * H1 + unit[None, :], mask=inside, other=0.0)
    for i in tl.static_range(len(k)):
        z = dot(k[i], tl.trans(load_unit_rows(net.key, unit, i, SPEC)), z, PRECISION)
        z = dot(products[i], tl.trans(load_unit_rows(net.product, unit, i, SPEC)), z, PRECISION)
    return z


@triton.jit
def activate_units(z, params, noise, unit, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """Some units of a layer. Where statistics are wanted, the last layer has none of its own."""
    if get(SPEC, "statistics") and LAYER == depth(SPEC) - 1:
        return z
    else:
        h = activate(z, params, get(SPEC, "activation"), get(SPEC, "approx"))
        return drop_units(h, noise, unit, LAYER, SPEC)


@triton.jit
def first_units(net, pairs, owner, valid, noise, unit, SPEC: tl.constexpr):
    """Units of the first layer, `[tokens, units]`, and what went into their activation."""
    z = first_sums(net, pairs, owner, valid, unit, SPEC)
    return activate_units(z, first_params(net, unit, SPEC), noise, unit, 0, SPEC), z


@triton.jit
def feed_units(sums, h, net, unit, SPEC: tl.constexpr):
    """The sums of the second layer with what some units of the first add to them."""
    out = ()
    for j in tl.static_range(len(sums)):
        weight = load_unit_columns(net.weights[0], unit, j, SPEC)
        out = out + (dot(h.to(weight.dtype), tl.trans(weight), sums[j], get(SPEC, "precision")),)
    return out


@triton.jit
def score_units(octets, h, net, unit, SPEC: tl.constexpr):
    """The same where the score reads the first layer: sums of columns that lie eight apart."""
    terms = h * load_unit_vector(net.last_weight, unit, SPEC)[None, :]
    return octets + tl.sum(tl.reshape(terms, [h.shape[0], h.shape[1] // 8, 8]), 1)


# ------------------------------------------------------------------------------------------------ held layers


@triton.jit
def load_held(pointer, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """A vector over the units of a held layer."""
    return load_vector(pointer, width(LAYER, SPEC), held_slab(SPEC))


@triton.jit
def held_params(net, LAYER: tl.constexpr, SPEC: tl.constexpr):
    vectors = ()
    for n in tl.static_range(params_loaded(LAYER, len(net.params), SPEC)):
        vector = net.params[LAYER * get(SPEC, "params_each") + n]
        vectors = vectors + (places_of(vector, width(LAYER, SPEC), held_slab(SPEC), 16),)
    return vectors


@triton.jit
def biases_as_sums(net, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """What the sums of a held layer begin with."""
    bias = load_held(net.biases[LAYER - 1], LAYER, SPEC)
    sums = ()
    for j in tl.static_range(len(bias)):
        sums = sums + (tl.broadcast_to(bias[j][None, :], [get(SPEC, "block"), bias[j].shape[0]]),)
    return sums


@triton.jit
def activate_held(zs, net, noise, LAYER: tl.constexpr, SPEC: tl.constexpr):
    params = held_params(net, LAYER, SPEC)
    out = ()
    for j in tl.static_range(len(zs)):
        unit = columns(j, width(LAYER, SPEC), held_slab(SPEC))
        out = out + (activate_units(zs[j], params_of(params, j), noise, unit, LAYER, SPEC),)
    return out


@triton.jit
def load_between(pointer, j: tl.constexpr, i: tl.constexpr, SPEC: tl.constexpr):
    """Slab (j, i) of a matrix between the third layer and the second. Just before it is read: all would not fit."""
    SLAB: tl.constexpr = held_slab(SPEC)
    return load_slab(pointer, j, i, width(2, SPEC), SLAB, 16, width(1, SPEC), SLAB)


@triton.jit
def third_layer(hs, net, SPEC: tl.constexpr):
    """What goes into the activation of the third layer."""
    sums = biases_as_sums(net, 2, SPEC)
    out = ()
    for j in tl.static_range(len(sums)):
        z = sums[j]
        for i in tl.static_range(len(hs)):
            weight = load_between(net.weights[1], j, i, SPEC)
            z = dot(hs[i].to(weight.dtype), tl.trans(weight), z, get(SPEC, "precision"))
        out = out + (z,)
    return out


# ------------------------------------------------------------------------------------------------ scores


@triton.jit
def load_tokens(data, batch, owners, net, begin, count, SPEC: tl.constexpr):
    """The tokens of a tile that begins at a position: their positions, whether they are any, what `first_units` takes
    of them, and their noise."""
    position = begin + tl.arange(0, get(SPEC, "block"))
    owner, valid = owners_of(owners, batch, position, count)
    pairs = load_pairs(data, owner, rows_of(data, position, valid, SPEC), valid, SPEC)
    return position, valid, pairs, owner, noise_of(net, position, SPEC)


@triton.jit
def second_sums(net, pairs, owner, valid, noise, SPEC: tl.constexpr):
    """What goes into the activation of the second layer, as slabs."""
    sums = biases_as_sums(net, 1, SPEC)
    for start in tl.range(0, width(0, SPEC), get(SPEC, "slab"), num_stages=get(SPEC, "stages")):
        unit = start + tl.arange(0, get(SPEC, "slab"))
        h, _z = first_units(net, pairs, owner, valid, noise, unit, SPEC)
        sums = feed_units(sums, h, net, unit, SPEC)
    return sums


@triton.jit
def last_sums(net, pairs, owner, valid, noise, SPEC: tl.constexpr):
    """What goes into the activation of the last layer, where that is held."""
    sums = second_sums(net, pairs, owner, valid, noise, SPEC)
    if depth(SPEC) == 3:
        return third_layer(activate_held(sums, net, noise, 1, SPEC), net, SPEC)
    else:
        return sums


@triton.jit
def score_tokens(data, batch, owners, net, begin, count, SPEC: tl.constexpr):
    """Of the tokens of a tile that begins at a position: their positions, whether they are any, and their scores."""
    LAST: tl.constexpr = depth(SPEC) - 1
    position, valid, pairs, owner, noise = load_tokens(data, batch, owners, net, begin, count, SPEC)
    last_bias = tl.load(net.last_bias)
    if depth(SPEC) == 1:
        octets = tl.zeros([get(SPEC, "block"), 8], tl.float32)
        for start in tl.range(0, width(0, SPEC), get(SPEC, "slab"), num_stages=get(SPEC, "stages")):
            unit = start + tl.arange(0, get(SPEC, "slab"))
            h, _z = first_units(net, pairs, owner, valid, noise, unit, SPEC)
            octets = score_units(octets, h, net, unit, SPEC)
        return position, valid, tl.sum(octets, 1) + last_bias
    else:
        hs = activate_held(last_sums(net, pairs, owner, valid, noise, SPEC), net, noise, LAST, SPEC)
        return position, valid, score(hs, (load_held(net.last_weight, LAST, SPEC), last_bias))
