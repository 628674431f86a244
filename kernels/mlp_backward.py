"""The way back through the scoring MLP on tiles of tokens.

The weights that gradients are multiplied by are not those of the way forward. The weight of the layer
behind the last hidden one is a vector w; instead of dL/dz = w·e the last hidden layer has e, and w goes into
the matrix that reads e, and into the sums of e over tokens. Where a kernel computes tanh, the matrices have
the sign of tanh' = -(h² - 1) too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import depth, get, narrowest, widest, width
from .mlp import load_units
from .primitives import activate_backward, dot, load_matrix, times_tanh_slope


@triton.jit
def with_fresh_vectors(net, sequence, first, layers, last, rest, SPEC: tl.constexpr):
    """`(first, layers, last)` with their vectors loaded again: held over all tiles of a sequence they would
    take registers that a tile needs more. `rest`, the rows left, is positive, so that its sign, which is added
    to the addresses, is zero; but the compiler does not know, and cannot load ahead of the loop."""
    zero = (rest >> 31) * 16  # keeps them aligned
    again = ()
    for i in tl.static_range(len(layers)):
        again = again + ((layers[i][0], load_units(net.biases[i] + zero, i + 1, SPEC)),)
    first_bias = load_units(net.first_bias + sequence * width(0, SPEC) + zero, 0, SPEC)
    last_weight = load_units(net.last_weight + zero, depth(SPEC) - 1, SPEC)
    return (first[0], first_bias), again, (last_weight, last[1])


@triton.jit
def load_matrix_of(back, LAYER: tl.constexpr, SPEC: tl.constexpr):
    return load_matrix(
        back[LAYER - 1],
        width(LAYER, SPEC),
        widest(LAYER, SPEC),
        narrowest(LAYER, SPEC),
        width(LAYER - 1, SPEC),
        get(SPEC, "slab"),
    )


@triton.jit
def load_back(back, FIRST: tl.constexpr, SPEC: tl.constexpr):
    """The matrices of the way back, from the last hidden layer to layer FIRST."""
    matrices = ()
    for i in tl.static_range(depth(SPEC) - 1 - FIRST):
        matrices = matrices + (load_matrix_of(back, depth(SPEC) - 1 - i, SPEC),)
    return matrices


@triton.jit
def times_weight(dz, weight, acc, SPEC: tl.constexpr):
    """`acc + dz W`: from dL/dz of a layer to the gradient of what it read."""
    out = ()
    for i in tl.static_range(len(acc)):
        grad = acc[i]
        for j in tl.static_range(len(dz)):
            w = weight[j * len(acc) + i]
            grad = dot(dz[j].to(w.dtype), w, grad, get(SPEC, "precision"))
        out = out + (grad,)
    return out


@triton.jit
def last_units_backward(ds, zs, hs, slopes, SPEC: tl.constexpr):
    """`e = dL/ds·act'(z)` of the last hidden layer: its dL/dz but for the weight behind it."""
    out = ()
    for j in tl.static_range(len(zs)):
        if get(SPEC, "activation") == "tanh":
            turned = hs[j] * -ds[:, None]
            out = out + (turned * hs[j] + ds[:, None],)
        else:
            slope = slopes[j][None, :] if len(slopes) > 0 else 0.0
            grad = tl.broadcast_to(ds[:, None], zs[j].shape)
            dz = activate_backward(grad, zs[j], hs[j], slope, get(SPEC, "activation"), get(SPEC, "approx"))
            out = out + (dz,)
    return out


@triton.jit
def units_backward(dh, zs, hs, outputs, slopes, SPEC: tl.constexpr):
    """dL/dz from dL/dh, the latter with the sign that the matrices of the way back have."""
    out = ()
    for j in tl.static_range(len(zs)):
        if get(SPEC, "activation") == "tanh":
            out = out + (times_tanh_slope(dh[j], outputs[j], get(SPEC, "approx")),)
        else:
            slope = slopes[j][None, :] if len(slopes) > 0 else 0.0
            dz = activate_backward(dh[j], zs[j], hs[j], slope, get(SPEC, "activation"), get(SPEC, "approx"))
            out = out + (dz,)
    return out


@triton.jit
def run_layers_backward(ds, zs, hs, outputs, back, slopes, SPEC: tl.constexpr):
    """Of each hidden layer dL/dh and dL/dz, the last layer first, as far as `back` leads; of the last hidden
    layer ds for the former and e for the latter."""
    n: tl.constexpr = depth(SPEC) - 1
    dhs = (ds,)
    dzs = (last_units_backward(ds, zs[n], hs[n], slopes[n], SPEC),)
    for i in tl.static_range(len(back)):
        zero = ()
        for j in tl.static_range(len(zs[n - 1 - i])):
            zero = zero + (tl.zeros(zs[n - 1 - i][j].shape, tl.float32),)
        dh = times_weight(dzs[i], back[i], zero, SPEC)
        dhs = dhs + (dh,)
        dz = units_backward(dh, zs[n - 1 - i], hs[n - 1 - i], outputs[n - 1 - i], slopes[n - 1 - i], SPEC)
        dzs = dzs + (dz,)
    return dhs, dzs


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
