"""What the kernels of pairwise_pool's backward share: a tile of samples, and the gradient of a pair's score."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arguments import get
from .pairs import (
    Rows,
    load_field,
    load_weight,
    multiplied,
    narrow_relu,
    pair_place,
    pair_products,
    rows_of,
    units,
    widened,
)
from .primitives import LOG2_E, columns, dot, exp2, load_rows, slab_count, store_rows
from .score_dropout import kept, row_keys


class Upstream(NamedTuple):
    """What backward begins with, and whereto."""

    grad_out: Tensor  # [B, K]
    grad_weights: Tensor  # [B, P]
    delta: Tensor  # [B], Σ_p a_p dL/da_p
    peak_mass: Tensor  # [B, 2], of the softmax the maximum in base 2 and the sum
    fields: Tensor  # [shares, B, F, K], float32
    weight: Tensor  # [programs, A, K], float32, and so the next; all but the last over the projection
    bias: Tensor  # [programs, A]
    projection: Tensor  # [programs, A]


class Sample(NamedTuple):
    """A tile of samples."""

    rows: Rows
    keys: Any  # of dropout
    grad: Any  # slabs [ROWS, 16] of dL/dout
    wide: Any  # and in float32
    delta: Any  # [ROWS]
    peak: Any  # [ROWS], what is subtracted from the score in an exponent of 2
    part: Any  # [ROWS], and multiplies the power


class Sums(NamedTuple):
    """Over samples and pairs."""

    weight: Any  # slabs [16 units, 16 columns of fields]
    bias: Any  # slabs [ROWS, 16 units]
    projection: Any  # slabs [ROWS, 16 units]


@triton.jit
def load_sample(data, up, tile, SPEC: tl.constexpr):
    ROWS: tl.constexpr = get(SPEC, "rows")
    DIM: tl.constexpr = get(SPEC, "dim")
    rows = rows_of(data, tile, ROWS)
    keys = ()
    if get(SPEC, "dropout") > 0:
        keys = row_keys(data.seed, rows.place, tl.zeros([ROWS], tl.int32))
    grad = load_rows(up.grad_out, rows.place, DIM, rows.valid, DIM, 16)
    peak = tl.load(up.peak_mass + 2 * rows.place, mask=rows.valid, other=float("inf"))
    mass = tl.load(up.peak_mass + 2 * rows.place + 1, mask=rows.valid, other=1.0)
    return Sample(
        rows,
        keys,
        grad,
        widened(grad),
        tl.load(up.delta + rows.place, mask=rows.valid, other=0.0),
        peak,
        1 / mass,
    )


@triton.jit
def load_back_weight(data, projection, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """Slabs `[16 units, 16 columns of fields]` of the weight, times the projection."""
    SLABS: tl.constexpr = slab_count(get(SPEC, "dim"), 16)
    given = load_weight(data, True, SPEC)
    weights = ()
    for a in tl.static_range(len(projection)):
        head = projection[a].to(tl.float32)[:, None]
        for k in tl.static_range(SLABS):
            weights = weights + ((head * given[a * SLABS + k].to(tl.float32)).to(DTYPE),)
    return weights


@triton.jit
def one_column(projection, DTYPE: tl.constexpr):
    """Slabs `[16 units, 8]`, the projection in the first column, zero in the others."""
    heads = ()
    for a in tl.static_range(len(projection)):
        p = projection[a].to(tl.float32)[:, None]
        heads = heads + (tl.where(tl.arange(0, 8)[None, :] == 0, p, 0.0).to(DTYPE),)
    return heads


@triton.jit
def columns_of(x, y):
    """`Σ_k x_k y_k`, `[ROWS, 16]`."""
    out = x[0] * y[0]
    for k in tl.static_range(1, len(x)):
        out += x[k] * y[k]
    return out


@triton.jit
def _attention(z, upstream, sample, up, heads, pair, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """`[ROWS]`: the weight before dropout, what the products are weighted by, and the gradient of the first.

    The gradient is of unrounded products: it is compared with delta, which is."""
    APPROX: tl.constexpr = get(SPEC, "approx")
    s = tl.zeros([z[0].shape[0], 8], tl.float32)
    for a in tl.static_range(len(z)):
        s = dot(narrow_relu(z[a], DTYPE, APPROX), heads[a], s, get(SPEC, "precision"))
    grad = tl.sum(upstream, 1)
    # In one exponent with the maximum the sum would cost the weights of a sample some bits, of all in one direction.
    weight = exp2(tl.sum(s, 1) * LOG2_E - sample.peak, APPROX) * sample.part
    if get(SPEC, "scores"):
        place = sample.rows.place * get(SPEC, "pairs") + pair
        grad += tl.load(up.grad_weights + place, mask=sample.rows.valid, other=0.0).to(tl.float32)
    if get(SPEC, "dropout") > 0:
        first, second = sample.keys
        column = tl.zeros(grad.shape, tl.int32) + pair
        keep = kept(first, second, column, get(SPEC, "dropout"))
        grad = tl.where(keep, grad * get(SPEC, "gain"), 0.0)
        return weight, tl.where(keep, weight * get(SPEC, "gain"), 0.0), grad
    else:
        return weight, weight, grad


@triton.jit
def score_gradient(z, upstream, sample, up, heads, pair, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """What the products are weighted by, and dL/ds: `[ROWS, 1]`. The gradient of the weight is
    the sum over the columns of `upstream [ROWS, 16]`; `heads` are those of `one_column`."""
    weight, factor, grad = _attention(z, upstream, sample, up, heads, pair, DTYPE, SPEC)
    if get(SPEC, "pairs") == 1:  # whose weight is 1, whatever its score
        ds = tl.zeros(grad.shape, tl.float32)
    else:
        ds = weight * (grad - sample.delta)
    return factor[:, None], ds[:, None]


@triton.jit
def with_mean(sample, data, up, net, heads, SPEC: tl.constexpr):
    """The sample, with delta a sum of the very numbers that it is compared with. Of `out`, it errs by as much as they
    do, in the same direction for all pairs: of few, that is most of the error."""
    mean = tl.zeros([get(SPEC, "rows")], tl.float32)
    for i in tl.range(1, get(SPEC, "count"), num_stages=1):
        own = load_field(data, sample.rows, i, SPEC)
        wide = widened(own)
        for j in tl.range(0, i, num_stages=1):
            v = load_field(data, sample.rows, j, SPEC)
            z = units(pair_products(own, 0, v, SPEC), net, SPEC)
            pair = pair_place(i, j, SPEC)
            upstream = columns_of(wide, multiplied(widened(v), sample.wide))
            weight, _, grad = _attention(z, upstream, sample, up, heads, pair, v[0].dtype, SPEC)
            mean += weight * grad
    return Sample(sample.rows, sample.keys, sample.grad, sample.wide, mean, sample.peak, sample.part)


@triton.jit
def store_field(pointer, slabs, sample, SPEC: tl.constexpr, ADD: tl.constexpr):
    """Writes the gradient of a field, whose `[B, F, K]` begins at `pointer`, or adds to what is there."""
    DIM: tl.constexpr = get(SPEC, "dim")
    STRIDE: tl.constexpr = get(SPEC, "count") * DIM
    if ADD:
        before = load_rows(pointer, sample.rows.place, STRIDE, sample.rows.valid, DIM, 16)
        grown = ()
        for k in tl.static_range(len(slabs)):
            grown = grown + (before[k] + slabs[k],)
        slabs = grown
    store_rows(pointer, slabs, sample.rows.place, STRIDE, sample.rows.valid, DIM, 16)


@triton.jit
def store_sums(up, sums, program, first, SPEC: tl.constexpr):
    """Of the units from `first` on."""
    DIM: tl.constexpr = get(SPEC, "dim")
    HIDDEN: tl.constexpr = get(SPEC, "hidden")
    SLABS: tl.constexpr = len(sums.weight) // len(sums.bias)
    for a in tl.static_range(len(sums.bias)):
        unit = first + a * 16 + tl.arange(0, 16)
        place = program.to(tl.int64) * HIDDEN + unit
        tl.store(up.bias + place, tl.sum(sums.bias[a], 0), mask=unit < HIDDEN)
        tl.store(up.projection + place, tl.sum(sums.projection[a], 0), mask=unit < HIDDEN)
        for k in tl.static_range(SLABS):
            column = columns(k, DIM, 16)[None, :]
            inside = (unit < HIDDEN)[:, None] & (column < DIM)
            tl.store(up.weight + place[:, None] * DIM + column, sums.weight[a * SLABS + k], mask=inside)
