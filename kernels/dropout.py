"""Which hidden units dropout keeps: `recattn.ops.dropout` in Triton, computed anew wherever it is needed."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get, narrowest, widest, width
from .primitives import columns

GAMMA = tl.constexpr(0x9E3779B9)
M1 = tl.constexpr(0x21F0AAAD)
M2 = tl.constexpr(0xD35A2D97)


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * M1
    x = (x ^ (x >> 15)) * M2
    return x ^ (x >> 15)


@triton.jit
def noise_of(net, row, SPEC: tl.constexpr):
    """`[tokens]`, uint32: a hash of each row of a tile, which `drop` takes; nothing without dropout."""
    if get(SPEC, "dropped") > 0:
        row = row.to(tl.int64)
        key = tl.load(net.noise).to(tl.uint32, bitcast=True)
        return mix(row.to(tl.uint32) ^ key) + (row >> 32).to(tl.uint32) * GAMMA
    else:
        return ()


@triton.jit
def drop(x, noise, j: tl.constexpr, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """Slab j of a hidden layer, `[tokens, units]`, zero where a unit is dropped. What kept units grow by is in the
    weights that read them."""
    if get(SPEC, "dropped") > 0:
        unit = columns(j, width(LAYER, SPEC), widest(LAYER, SPEC), narrowest(LAYER, SPEC)).to(tl.uint32)
        pair = ((unit >> 1) + LAYER * 65536) * GAMMA
        bits = (noise[:, None] ^ pair[None, :]) * M1
        bits = (bits ^ (bits >> 15)) * M2
        half = (bits << (16 - 16 * (unit & 1))[None, :]).to(tl.int32, bitcast=True)
        return tl.where(half >= (get(SPEC, "dropped") - 32768) * 65536, x, 0.0)
    else:
        return x


@triton.constexpr_function
def closed_at_zero(activation):
    """Whether the way back through an activation is a function of the unit, and multiplies by 0 where that is 0."""
    return activation in ("sigmoid", "twice_sigmoid", "logistic2", "relu")


@triton.jit
def drop_gradient(dh, noise, j: tl.constexpr, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """dL/dh likewise, as far as the activation's way back does not see to it."""
    if closed_at_zero(get(SPEC, "activation")):
        return dh
    else:
        return drop(dh, noise, j, LAYER, SPEC)
