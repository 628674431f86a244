"""Which hidden units dropout keeps: `recattn.ops.dropout` in Triton, computed anew wherever it is needed."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get, narrowest, widest, width
from .primitives import columns

GAMMA = tl.constexpr(0x9E3779B9)
M1 = tl.constexpr(0x21F0AAAD)
M2 = tl.constexpr(0xD35A2D97)
E1 = tl.constexpr(0x43E1555A)
E2 = tl.constexpr(0xA6B45B2E)


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * M1
    x = (x ^ (x >> 15)) * M2
    return x ^ (x >> 15)


@triton.jit
def noise_of(net, row, SPEC: tl.constexpr):
    """Two hashes of each row of a tile, `[tokens]`, uint32, which `drop` takes; nothing without dropout."""
    if get(SPEC, "dropped") > 0:
        row = row.to(tl.int64)
        key = tl.load(net.noise).to(tl.uint32, bitcast=True)
        hashed = mix(row.to(tl.uint32) ^ key) + (row >> 32).to(tl.uint32) * GAMMA
        return hashed, mix(hashed ^ GAMMA) | 1
    else:
        return ()


@triton.jit
def where_kept(x, other, noise, unit, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """Some units of a hidden layer, `[tokens, units]`, but `other` where they are dropped."""
    if get(SPEC, "dropped") > 0:
        unit = unit.to(tl.uint32)
        add = ((unit >> 1) + LAYER * 65537) * GAMMA
        lane = ((unit >> 1) & 3) * E1
        turn = ((unit >> 3) + LAYER * 8193) * E2
        bits = (noise[0][:, None] + add[None, :]) * ((noise[1][:, None] ^ lane[None, :]) ^ turn[None, :])
        half = (bits * (1 + 65536 * (unit & 1))[None, :]).to(tl.int32, bitcast=True)
        return tl.where(half >= (get(SPEC, "dropped") - 32768) * 65536, x, other)
    else:
        return x


@triton.jit
def drop_units(x, noise, unit, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """Some units of a hidden layer with dropout. What kept units grow by is in the weights that read them."""
    return where_kept(x, get(SPEC, "zero"), noise, unit, LAYER, SPEC)


@triton.jit
def slab_units(j: tl.constexpr, LAYER: tl.constexpr, SPEC: tl.constexpr):
    return columns(j, width(LAYER, SPEC), widest(LAYER, SPEC), narrowest(LAYER, SPEC))


@triton.jit
def drop(x, noise, j: tl.constexpr, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """Slab j of a hidden layer with dropout."""
    return drop_units(x, noise, slab_units(j, LAYER, SPEC), LAYER, SPEC)


@triton.constexpr_function
def open_at_zero(spec):
    """Whether the way back through dropped units has to be closed: it is not a function of the unit, or one that is
    not 0 where the unit is."""
    closed = spec.activation in ("sigmoid", "relu") or (spec.activation == "tanh" and spec.zero == -1)
    return spec.dropped > 0 and not closed


@triton.jit
def drop_unit_gradients(dh, noise, unit, LAYER: tl.constexpr, SPEC: tl.constexpr):
    """dL/dh likewise, as far as the activation's way back does not see to it."""
    if open_at_zero(SPEC):
        return where_kept(dh, 0.0, noise, unit, LAYER, SPEC)
    else:
        return dh


@triton.jit
def drop_gradient(dh, noise, j: tl.constexpr, LAYER: tl.constexpr, SPEC: tl.constexpr):
    return drop_unit_gradients(dh, noise, slab_units(j, LAYER, SPEC), LAYER, SPEC)
