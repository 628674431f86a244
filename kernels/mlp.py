"""The scoring MLP on tiles of tokens: layers are tuples of slabs `[tokens, units]`."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import depth, get, narrowest, params_loaded, widest, width
from .dropout import drop
from .primitives import (
    activate,
    columns,
    dot,
    load_matrix,
    load_vector,
    multiply_add,
    slab_count,
    slab_inside,
)


@triton.jit
def load_units(pointer, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """A vector over the units of a hidden layer."""
    return load_vector(pointer, width(LAYER, SPEC), widest(LAYER, SPEC), narrowest(LAYER, SPEC))


@triton.jit
def places_of(pointer, WIDTH: tl.constexpr, WIDEST: tl.constexpr, NARROWEST: tl.constexpr):
    """Where a vector lies, per slab, and a mask where the slab reaches past it."""
    slabs = ()
    for j in tl.static_range(slab_count(WIDTH, WIDEST, NARROWEST)):
        column = columns(j, WIDTH, WIDEST, NARROWEST)
        if slab_inside(j, WIDTH, WIDEST, NARROWEST):
            slabs = slabs + ((pointer + column, ()),)
        else:
            slabs = slabs + ((pointer + column, (column < WIDTH,)),)
    return slabs


@triton.jit
def load_params(net, zero, SPEC: tl.constexpr):
    """Per hidden layer the vectors that its activation takes, for `params_of`. `zero` is added to their addresses."""
    params = ()
    for i in tl.static_range(depth(SPEC)):
        vectors = ()
        for j in tl.static_range(params_loaded(i, len(net.params), SPEC)):
            vector = net.params[i * get(SPEC, "params_each") + j] + zero
            vectors = vectors + (places_of(vector, width(i, SPEC), widest(i, SPEC), narrowest(i, SPEC)),)
        params = params + (vectors,)
    return params


@triton.jit
def hidden_zero(rest, TIME: tl.constexpr = 1):
    """0, as `rest` is positive; but the compiler does not know, and cannot load ahead of the loop what lies at an
    address that it is added to: held over all tiles of a sequence, vectors would take registers that a tile needs more.
    Of what only the prologue of a sequence reads, the addresses of each thread would.
    """
    return (rest.to(tl.int32) >> 31) * (16 * TIME)  # keeps addresses aligned


@triton.jit
def params_of(params, j: tl.constexpr):
    """For slab j of a layer, as rows that broadcast over its tokens. Loaded where they are read: three vectors over all
    units, held through a tile, are more registers than the tile has left."""
    rows = ()
    for i in tl.static_range(len(params)):
        place, mask = params[i][j]
        if len(mask) == 0:
            row = tl.load(place)
        else:
            row = tl.load(place, mask=mask[0], other=0.0)
        rows = rows + (row[None, :],)
    return rows


@triton.jit
def load_network(net, SPEC: tl.constexpr):
    """What all sequences share: per hidden layer after the first its (weight, bias), the params, and the last
    layer's (weight, bias)."""
    layers = ()
    for i in tl.static_range(1, depth(SPEC)):
        weight = load_matrix(
            net.weights[i - 1],
            width(i, SPEC),
            widest(i, SPEC),
            narrowest(i, SPEC),
            width(i - 1, SPEC),
            get(SPEC, "slab"),
        )
        layers = layers + ((weight, load_units(net.biases[i - 1], i, SPEC)),)
    params = load_params(net, 0, SPEC)
    last = (load_units(net.last_weight, depth(SPEC) - 1, SPEC), tl.load(net.last_bias))
    return layers, params, last


@triton.jit
def first_layer(net, q, sequence, PURE: tl.constexpr, SPEC: tl.constexpr):
    """The first layer as the query of a sequence makes it: (W_eff = key + product·diag(q), c)."""
    H1: tl.constexpr = width(0, SPEC)
    D: tl.constexpr = get(SPEC, "dim")
    key = load_matrix(net.key, H1, widest(0, SPEC), narrowest(0, SPEC), D, get(SPEC, "dim_slab"))
    product = load_matrix(net.product, H1, widest(0, SPEC), narrowest(0, SPEC), D, get(SPEC, "dim_slab"))
    weight = ()
    for i in tl.static_range(len(key)):
        diagonal = q[i % len(q)][None, :]
        weight = weight + (multiply_add(product[i], diagonal, key[i], get(SPEC, "approx"), PURE),)
    return weight, load_units(net.first_bias + sequence * H1, 0, SPEC)


@triton.jit
def hidden_layer(inputs, layer, params, noise, LAYER: tl.constexpr, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """The pre-activations of a layer, its units, and these as the inputs of the next, in DTYPE. Where statistics are
    wanted, the last layer has no units of its own.

    Slab after slab, so that each leaves the registers as soon as possible.
    """
    weight, bias = layer
    zs = ()
    hs = ()
    outputs = ()
    for j in tl.static_range(len(bias)):
        z = tl.broadcast_to(bias[j][None, :], [inputs[0].shape[0], bias[j].shape[0]])
        for i in tl.static_range(len(inputs)):
            z = dot(inputs[i], tl.trans(weight[j * len(inputs) + i]), z, get(SPEC, "precision"))
        if get(SPEC, "statistics") and LAYER == depth(SPEC) - 1:
            h = z
        else:
            h = activate(z, params_of(params, j), get(SPEC, "activation"), get(SPEC, "approx"))
            h = drop(h, noise, j, LAYER, SPEC)
        zs = zs + (z,)
        hs = hs + (h,)
        outputs = outputs + (h.to(DTYPE),)
    return zs, hs, outputs


@triton.jit
def run_layers(k, first, layers, params, noise, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """The hidden layers over a tile of keys: per layer its pre-activations, its units, and these in DTYPE."""
    z, h, inputs = hidden_layer(k, first, params[0], noise, 0, DTYPE, SPEC)
    zs = (z,)
    hs = (h,)
    outputs = (inputs,)
    for i in tl.static_range(len(layers)):
        z_next, h_next, output = hidden_layer(outputs[i], layers[i], params[i + 1], noise, i + 1, DTYPE, SPEC)
        zs = zs + (z_next,)
        hs = hs + (h_next,)
        outputs = outputs + (output,)
    return zs, hs, outputs


@triton.jit
def score(h, last):
    """`[tokens]`: the last, linear layer. Columns are summed eight apart first, which stays within a thread."""
    weight, bias = last
    octets = tl.zeros([h[0].shape[0], 8], tl.float32)
    for j in tl.static_range(len(h)):
        terms = h[j] * weight[j][None, :]
        octets += tl.sum(tl.reshape(terms, [h[j].shape[0], h[j].shape[1] // 8, 8]), 1)
    return tl.sum(octets, 1) + bias
