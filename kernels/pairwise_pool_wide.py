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
    pair_place,
    pair_products,
    product,
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
def _part(pointer, rows, stride, k: tl.constexpr, SPEC: tl.constexpr):
    """Slab k of rows `stride` apart, `[ROWS, 16]`."""
    column = columns(k, get(SPEC, "dim"), 16)[None, :]
    inside = rows.valid[:, None] & (column < get(SPEC, "dim"))
    return tl.load(pointer + rows.place[:, None] * stride + column, mask=inside, other=0.0)


@triton.jit
def _spread(x, weight, k: tl.constexpr, SLABS: tl.constexpr, z, PRECISION: tl.constexpr):
    """All slabs of units, with what slab k of the products gives them added."""
    out = ()
    for a in tl.static_range(len(z)):
        out = out + (dot(x, weight[a * SLABS + k], z[a], PRECISION),)
    return out


@triton.jit
def _gather(x, weight, a: tl.constexpr, back, PRECISION: tl.constexpr):
    """All slabs of the products' gradient, with what slab a of the units gives them added."""
    out = ()
    for k in tl.static_range(len(back)):
        out = out + (dot(x, weight[a * len(back) + k], back[k], PRECISION),)
    return out


@triton.jit
def _fields_kernel(data, up, grad_scores, SPEC: tl.constexpr):
    """Writes the gradients of the fields, and dL/ds to `grad_scores [P, B]`. Programs along the second axis share the
    pairs. Fields and dL/dout are read slab by slab wherever they are needed, as registers have no room for them."""
    ROWS: tl.constexpr = get(SPEC, "rows")
    DIM: tl.constexpr = get(SPEC, "dim")
    HIDDEN: tl.constexpr = get(SPEC, "hidden")
    COUNT: tl.constexpr = get(SPEC, "count")
    STRIDE: tl.constexpr = get(SPEC, "batch_stride")
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
    rows = sample.rows
    if get(SPEC, "few"):
        sample = with_mean(sample, data, up, net, heads, SPEC)
    fields = up.fields + share.to(tl.int64) * data.batch * (COUNT * DIM)
    store_field(fields, zero_rows(ROWS, SLABS * 16, 16), sample, SPEC, False)
    for i in tl.range(1, COUNT, num_stages=1):
        own = data.fields + i * get(SPEC, "field_stride")
        own_grad = zero_rows(ROWS, SLABS * 16, 16)
        for j in tl.range(share, i, shares, num_stages=1):
            other = data.fields + j * get(SPEC, "field_stride")
            z = ()
            for a in tl.static_range(UNITS):
                z = z + (tl.zeros([ROWS, 16], tl.float32) + net.bias[a].to(tl.float32)[None, :],)
            upstream = tl.zeros([ROWS, 16], tl.float32)
            for k in tl.static_range(SLABS):
                x = _part(own, rows, STRIDE, k, SPEC)
                y = _part(other, rows, STRIDE, k, SPEC)
                z = _spread(product(x, y, get(SPEC, "approx")), weight, k, SLABS, z, PRECISION)
                wide = widened((x, y, _part(up.grad_out, rows, DIM, k, SPEC)))
                upstream += wide[0] * (wide[1] * wide[2])
            pair = pair_place(i, j, SPEC)
            factor, ds = score_gradient(z, upstream, sample, up, heads, pair, DTYPE, SPEC)
            place = grad_scores + tl.cast(pair, tl.int64) * data.batch + rows.place
            tl.store(place, tl.sum(ds, 1), mask=rows.valid)
            back = zero_rows(ROWS, SLABS * 16, 16)
            for a in tl.static_range(UNITS):
                back = _gather(tl.where(z[a] > 0, ds, 0.0).to(DTYPE), back_weight, a, back, PRECISION)
            grown = ()
            for k in tl.static_range(SLABS):
                x = _part(own, rows, STRIDE, k, SPEC)
                y = _part(other, rows, STRIDE, k, SPEC)
                wide = widened((x, y, _part(up.grad_out, rows, DIM, k, SPEC)))
                grad = back[k] + factor * wide[2]  # of the product
                grown = grown + (own_grad[k] + grad * wide[1],)
                _add_part(fields + j * DIM, grad * wide[0], rows, COUNT * DIM, k, SPEC)
            own_grad = grown
        store_field(fields + i * DIM, own_grad, sample, SPEC, False)
        tl.debug_barrier()  # other threads may add to it


@triton.jit
def _add_part(pointer, x, rows, stride, k: tl.constexpr, SPEC: tl.constexpr):
    """To what is there; see `_part`."""
    column = columns(k, get(SPEC, "dim"), 16)[None, :]
    inside = rows.valid[:, None] & (column < get(SPEC, "dim"))
    place = pointer + rows.place[:, None] * stride + column
    tl.store(place, tl.load(place, mask=inside, other=0.0) + x, mask=inside)


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
