"""pairwise_pool backward of wide networks, whose weight and its gradient do not fit into registers together.

A first kernel computes the gradients of the fields, and leaves dL/ds of every pair, one number, in memory. A second
one, whose programs have some of the units each, makes them again for the gradients of the network.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .arguments import get
from .pairs import (
    Network,
    load_field,
    load_vector_slabs,
    load_weight,
    multiplied,
    pair_place,
    pair_products,
    rows_of,
    units,
    widened,
)
from .pairwise_pool_sample import (
    Sums,
    load_back_weight,
    load_sample,
    one_column,
    score_gradient,
    store_field,
    store_sums,
    with_mean,
)
from .pairwise_pool_settings import PairsLaunch
from .primitives import columns, dot, slab_count, zero_rows


@triton.jit
def _slab_in_memory(x, APPROX: tl.constexpr):
    """A slab that products read from shared memory each time: as operands all would fill the registers."""
    if APPROX and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    elif APPROX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def _in_memory(slabs, APPROX: tl.constexpr):
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (_slab_in_memory(slabs[i], APPROX),)
    return out


@triton.jit
def _load_units(data, first, UNITS: tl.constexpr, SPEC: tl.constexpr):
    """The network's UNITS slabs of 16 units from unit `first` on, without their projection."""
    DIM: tl.constexpr = get(SPEC, "dim")
    HIDDEN: tl.constexpr = get(SPEC, "hidden")
    weight = ()
    bias = ()
    for a in tl.static_range(UNITS):
        unit = first + a * 16 + tl.arange(0, 16)
        for k in tl.static_range(slab_count(DIM, 16)):
            column = columns(k, DIM, 16)[:, None]
            inside = (unit < HIDDEN)[None, :] & (column < DIM)
            weight = weight + (tl.load(data.weight + unit[None, :] * DIM + column, mask=inside, other=0.0),)
        bias = bias + (tl.load(data.bias + unit, mask=unit < HIDDEN, other=0.0),)
    return Network(weight, bias, ())


@triton.jit
def _fields_kernel(data, up, grad_scores, SPEC: tl.constexpr):
    """Writes the gradients of the fields, and dL/ds to `grad_scores [P, B]`. Programs along the second axis share the
    pairs."""
    ROWS: tl.constexpr = get(SPEC, "rows")
    DIM: tl.constexpr = get(SPEC, "dim")
    HIDDEN: tl.constexpr = get(SPEC, "hidden")
    COUNT: tl.constexpr = get(SPEC, "count")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = data.fields.dtype.element_ty
    SLABS: tl.constexpr = slab_count(DIM, 16)
    UNITS: tl.constexpr = slab_count(HIDDEN, 16)
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    projection = load_vector_slabs(data.projection, HIDDEN)
    weight = _in_memory(load_weight(data, False, SPEC), get(SPEC, "approx"))
    back_weight = _in_memory(load_back_weight(data, projection, DTYPE, SPEC), get(SPEC, "approx"))
    net = Network(weight, load_vector_slabs(data.bias, HIDDEN), ())
    heads = one_column(projection, DTYPE)
    sample = load_sample(data, up, tl.program_id(0), SPEC)
    if get(SPEC, "few"):
        sample = with_mean(sample, data, up, net, heads, SPEC)
    fields = up.fields + share.to(tl.int64) * data.batch * (COUNT * DIM)
    store_field(fields, zero_rows(ROWS, SLABS * 16, 16), sample, SPEC, False)
    for i in tl.range(1, COUNT, num_stages=1):
        own = load_field(data, sample.rows, i, SPEC)
        wide = widened(own)
        own_grad = zero_rows(ROWS, SLABS * 16, 16)
        for j in tl.range(share, i, shares, num_stages=1):
            v = load_field(data, sample.rows, j, SPEC)
            v_wide = widened(v)
            pair = pair_place(i, j, SPEC)
            z = units(pair_products(own, 0, v, SPEC), net, SPEC)
            factor, ds = score_gradient(
                z, wide, multiplied(v_wide, sample.wide), sample, up, heads, pair, DTYPE, SPEC
            )
            place = grad_scores + tl.cast(pair, tl.int64) * data.batch + sample.rows.place
            tl.store(place, tl.sum(ds, 1), mask=sample.rows.valid)
            x = ()
            for a in tl.static_range(UNITS):
                x = x + (tl.where(z[a] > 0, ds, 0.0).to(DTYPE),)
            grown = ()
            v_grad = ()
            for k in tl.static_range(SLABS):
                back = factor * sample.wide[k]  # dL/d(product)
                for a in tl.static_range(UNITS):
                    back = dot(x[a], back_weight[a * SLABS + k], back, PRECISION)
                grown = grown + (own_grad[k] + back * v_wide[k],)
                v_grad = v_grad + (back * wide[k],)
            own_grad = grown
            store_field(fields + j * DIM, v_grad, sample, SPEC, True)
        store_field(fields + i * DIM, own_grad, sample, SPEC, False)
        tl.debug_barrier()  # other threads may add to it


@triton.jit
def _network_kernel(data, up, grad_scores, UNITS: tl.constexpr, SPEC: tl.constexpr):
    """Sums over samples and pairs for UNITS slabs of 16 units, by program along the third axis; those along the first
    take turns at tiles of samples, those along the second share the pairs."""
    ROWS: tl.constexpr = get(SPEC, "rows")
    COUNT: tl.constexpr = get(SPEC, "count")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = data.fields.dtype.element_ty
    SLABS: tl.constexpr = slab_count(get(SPEC, "dim"), 16)
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    first = tl.program_id(2) * (16 * UNITS)
    net = _load_units(data, first, UNITS, SPEC)
    sums = Sums(
        zero_rows(16, UNITS * SLABS * 16, 16),
        zero_rows(ROWS, UNITS * 16, 16),
        zero_rows(ROWS, UNITS * 16, 16),
    )
    for tile in tl.range(tl.program_id(0), tl.cdiv(data.batch, ROWS), tl.num_programs(0), num_stages=1):
        rows = rows_of(data, tile, ROWS)
        for i in tl.range(1, COUNT, num_stages=1):
            own = load_field(data, rows, i, SPEC)
            for j in tl.range(share, i, shares, num_stages=1):
                products = pair_products(own, 0, load_field(data, rows, j, SPEC), SPEC)
                z = units(products, net, SPEC)
                place = grad_scores + tl.cast(pair_place(i, j, SPEC), tl.int64) * data.batch + rows.place
                ds = tl.load(place, mask=rows.valid, other=0.0)[:, None]
                weight_sums = ()
                bias_sums = ()
                projection_sums = ()
                for a in tl.static_range(UNITS):
                    x = tl.where(z[a] > 0, ds, 0.0)
                    bias_sums = bias_sums + (sums.bias[a] + x,)
                    projection_sums = projection_sums + (sums.projection[a] + x * z[a],)
                    x = tl.trans(x.to(DTYPE))
                    for k in tl.static_range(SLABS):
                        before = sums.weight[a * SLABS + k]
                        weight_sums = weight_sums + (dot(x, products[k], before, PRECISION),)
                sums = Sums(weight_sums, bias_sums, projection_sums)
    store_sums(up, sums, tl.program_id(0) * shares + share, first, SPEC)


def backward(data: Any, up: Any, spec: Any, launch: PairsLaunch, programs: int, shares: int) -> None:
    """Into what `up` has room for; `programs` take turns at the samples for the network's gradients."""
    grad_scores = up.delta.new_empty(spec.pairs, data.batch)
    tiles = triton.cdiv(data.batch, spec.rows)
    _fields_kernel[(tiles, shares)](data, up, grad_scores, SPEC=spec, num_warps=launch.num_warps)
    slabs = min(launch.wide_slabs, triton.cdiv(spec.hidden, 16))
    grid = (programs, shares, triton.cdiv(spec.hidden, 16 * slabs))
    _network_kernel[grid](data, up, grad_scores, UNITS=slabs, SPEC=spec, num_warps=launch.num_warps)
