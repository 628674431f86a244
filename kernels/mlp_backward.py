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
from .dropout import drop_gradient, open_at_zero
from .mlp import hidden_zero, load_params, load_units, params_of
from .primitives import activate_backward, dot, load_matrix, times_tanh_slope


@triton.jit
def with_fresh_vectors(net, sequence, first, layers, last, rest, SPEC: tl.constexpr):
    """`(first, layers, last, params)` with their vectors loaded again; `rest` is how many rows are left."""
    zero = hidden_zero(rest)
    again = ()
    for i in tl.static_range(len(layers)):
        again = again + ((layers[i][0], load_units(net.biases[i] + zero, i + 1, SPEC)),)
    first_bias = load_units(net.first_bias + sequence * width(0, SPEC) + zero, 0, SPEC)
    last_weight = load_units(net.last_weight + zero, depth(SPEC) - 1, SPEC)
    return (first[0], first_bias), again, (last_weight, last[1]), load_params(net, zero, SPEC)


@triton.jit
def with_fresh_network(net, sequence, first, layers, rest, SPEC: tl.constexpr):
    """As with_fresh_vectors, with the last layer's bias loaded again too: one register less in the loop."""
    last = ((), tl.load(net.last_bias + hidden_zero(rest)))
    return with_fresh_vectors(net, sequence, first, layers, last, rest, SPEC)


@triton.jit
def layers_in_tile(net, sequence, first, layers, last, rest, SPEC: tl.constexpr):
    """`(first, layers, last, params)` as a tile reads them: their vectors loaded again if that is asked for, the
    params anyway."""
    if get(SPEC, "fresh"):
        return with_fresh_vectors(net, sequence, first, layers, last, rest, SPEC)
    else:
        return first, layers, last, load_params(net, hidden_zero(rest), SPEC)


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
def last_units_backward(ds, zs, hs, params, noise, SPEC: tl.constexpr):
    """dL/dh and `e = dL/ds·act'(z)` of the last hidden layer, which are its gradients but for the weight behind it.
    Where statistics are wanted, they are a linear function of z."""
    dhs = ()
    out = ()
    for j in tl.static_range(len(zs)):
        param = params_of(params, j)
        grad = tl.broadcast_to(ds[:, None], zs[j].shape)
        if get(SPEC, "statistics"):
            dz = grad * (param[0] + param[1] * zs[j])
        elif get(SPEC, "activation") == "tanh" and not open_at_zero(SPEC):
            turned = hs[j] * -ds[:, None]
            dz = turned * hs[j] + ds[:, None]
        else:
            grad = drop_gradient(grad, noise, j, depth(SPEC) - 1, SPEC)
            dz = activate_backward(grad, zs[j], hs[j], param, get(SPEC, "activation"), get(SPEC, "approx"))
        dhs = dhs + (grad,)
        out = out + (dz,)
    return dhs, out


@triton.jit
def units_backward(dh, zs, hs, outputs, params, SPEC: tl.constexpr):
    """dL/dz from dL/dh, the latter with the sign that the matrices of the way back have."""
    out = ()
    for j in tl.static_range(len(zs)):
        if get(SPEC, "activation") == "tanh":
            out = out + (times_tanh_slope(dh[j], outputs[j], get(SPEC, "approx")),)
        else:
            dz = activate_backward(
                dh[j], zs[j], hs[j], params_of(params, j), get(SPEC, "activation"), get(SPEC, "approx")
            )
            out = out + (dz,)
    return out


@triton.jit
def run_layers_backward(ds, zs, hs, outputs, back, params, noise, SPEC: tl.constexpr):
    """Of each hidden layer dL/dh and dL/dz, the last layer first, as far as `back` leads; of the last hidden
    layer those of `last_units_backward`."""
    n: tl.constexpr = depth(SPEC) - 1
    dh_last, dz_last = last_units_backward(ds, zs[n], hs[n], params[n], noise, SPEC)
    dhs = (dh_last,)
    dzs = (dz_last,)
    for i in tl.static_range(len(back)):
        zero = ()
        for j in tl.static_range(len(zs[n - 1 - i])):
            zero = zero + (tl.zeros(zs[n - 1 - i][j].shape, tl.float32),)
        dh = times_weight(dzs[i], back[i], zero, SPEC)
        kept = ()
        for j in tl.static_range(len(dh)):
            kept = kept + (drop_gradient(dh[j], noise, j, n - 1 - i, SPEC),)
        dhs = dhs + (kept,)
        dz = units_backward(kept, zs[n - 1 - i], hs[n - 1 - i], outputs[n - 1 - i], params[n - 1 - i], SPEC)
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
