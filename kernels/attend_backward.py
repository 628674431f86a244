"""Jit functions that both backward kernels begin with: loads, and the way back through the attention."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get
from .mlp import first_layer
from .pooling import weigh, weigh_backward
from .primitives import LN_2, dot, exp2, load_vector
from .sums import load_padded


@triton.jit
def load_sequence(data, net, upstream, sequence, PURE: tl.constexpr, SPEC: tl.constexpr):
    """What all tiles of a sequence share: its query, its first layer, and dL/dout twice as an operand, Σ a dL/da,
    log2-sum-exp2, or at full accuracy its maximum and one over its sum. PURE is how W_eff is made, see
    `multiply_add`: what is best differs between kernels."""
    q = load_vector(
        data.query + sequence * get(SPEC, "query_stride"), get(SPEC, "dim"), get(SPEC, "dim_slab")
    )
    first = first_layer(net, q, sequence, PURE, SPEC)
    if get(SPEC, "statistics"):
        return q, first, ()
    else:
        return q, first, load_upstream(upstream, sequence, SPEC)


@triton.jit
def load_upstream(upstream, sequence, SPEC: tl.constexpr):
    DV: tl.constexpr = get(SPEC, "value_dim")
    grad_out = upstream.grad_out + sequence * DV
    across = load_padded(grad_out, DV, get(SPEC, "dim_slab"), 8, False)  # [DV, 8]
    along = load_padded(grad_out, DV, get(SPEC, "dim_slab"), 16, True)  # [16, DV]
    delta = tl.load(upstream.delta + sequence) * LN_2
    peak = tl.load(upstream.peak_mass + 2 * sequence)
    mass = tl.load(upstream.peak_mass + 2 * sequence + 1)
    if get(SPEC, "approx"):
        return across, along, delta, peak + tl.log2(mass)
    else:
        return across, along, delta, peak, 1 / mass


@triton.jit
def attend_backward(s, v, grads, grad_scores, rest, SPEC: tl.constexpr):
    """The attention a and dL/ds, `[tokens]`, from the scores s; both zero past the end of the sequence. Where
    statistics are wanted, the sum over all tokens is differentiated."""
    token = tl.arange(0, get(SPEC, "block"))
    valid = token < rest
    if get(SPEC, "statistics"):
        return valid.to(tl.float32), valid.to(tl.float32)
    else:
        return weights_backward(s, v, grads, grad_scores, token, valid, SPEC)


@triton.jit
def weights_backward(s, v, grads, grad_scores, token, valid, SPEC: tl.constexpr):
    across, _along, delta, peak = grads[:4]
    products = tl.zeros([get(SPEC, "block"), 8], tl.float32)
    for i in tl.static_range(len(v)):
        products = dot(v[i], across[i], products, get(SPEC, "precision"))
    grad = tl.sum(products, 1)
    if get(SPEC, "with_scores"):
        grad += tl.load(grad_scores + token, mask=valid, other=0.0).to(tl.float32)
    if get(SPEC, "softmax"):
        a = exp2(tl.where(valid, s - peak, float("-inf")), get(SPEC, "approx"))
        # In one exponent with it the sum would cost a as many bits as its logarithm has before the point.
        if not get(SPEC, "approx"):
            a *= grads[4]
        return a, a * (grad * LN_2 - delta)
    else:
        a = weigh(s, get(SPEC, "normalize"), get(SPEC, "approx"))
        ds = weigh_backward(grad, a, get(SPEC, "normalize"))
        return tl.where(valid, a, 0.0), tl.where(valid, ds, 0.0)


@triton.jit
def spread(a, grads, acc, SPEC: tl.constexpr):
    """`acc + a·dL/dout`, `[tokens, DV]`: what the pooling passes to its values."""
    along = grads[1]
    out = ()
    for i in tl.static_range(len(along)):
        rows = tl.broadcast_to(a.to(along[i].dtype)[:, None], [a.shape[0], 16])
        out = out + (dot(rows, along[i], acc[i], get(SPEC, "precision")),)
    return out
