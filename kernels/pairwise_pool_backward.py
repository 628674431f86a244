"""pairwise_pool backward: one pair of fields after the other as in forward, and everything about it computed again.

The score's gradient stays in float32 where it is summed over pairs, which gives those of the projection and the bias:
over the pairs of a sample it sums to zero, so that they are small differences of large terms. It is rounded only where
a product of matrices reads it, for the gradients of the weight and of the fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pairwise_pool_settings as settings
from .arguments import get
from .pairs import (
    Rows,
    arguments,
    group_start,
    load_field,
    load_group,
    load_network,
    load_weight,
    multiplied,
    narrow_relu,
    pair_place,
    pair_products,
    part,
    rows_of,
    spec_of,
    units,
    widened,
)
from .primitives import LOG2_E, columns, dot, load_rows, slab_count, store_rows, zero_rows
from .primitives import exp2 as exp2_of
from .score_dropout import kept, row_keys


class Upstream(NamedTuple):
    """What backward begins with, and whereto."""

    grad_out: Tensor  # [B, K]
    grad_weights: Tensor  # [B, P]
    delta: Tensor  # [B], Σ_p a_p dL/da_p
    lse: Tensor  # [B]
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
    lse: Any  # [ROWS], base 2


class Back(NamedTuple):
    weight: Any  # slabs [16 units, 16 columns of fields], times the projection
    heads: Any  # slabs [16 units, 8], the projection in the first column, zero in the others


class Sums(NamedTuple):
    """Over samples and pairs."""

    weight: Any  # slabs [16 units, 16 columns of fields]
    bias: Any  # slabs [ROWS, 16 units]
    projection: Any  # slabs [ROWS, 16 units]


@triton.jit
def _load_back(data, net, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    SLABS: tl.constexpr = len(net.weight) // len(net.bias)
    given = load_weight(data, True, SPEC)
    weights = ()
    heads = ()
    for a in tl.static_range(len(net.bias)):
        projection = net.projection[a].to(tl.float32)[:, None]
        heads = heads + (tl.where(tl.arange(0, 8)[None, :] == 0, projection, 0.0).to(DTYPE),)
        for k in tl.static_range(SLABS):
            weights = weights + ((projection * given[a * SLABS + k].to(tl.float32)).to(DTYPE),)
    return Back(weights, heads)


@triton.jit
def _load_sample(data, up, tile, SPEC: tl.constexpr):
    ROWS: tl.constexpr = get(SPEC, "rows")
    DIM: tl.constexpr = get(SPEC, "dim")
    rows = rows_of(data, tile, ROWS)
    keys = ()
    if get(SPEC, "dropout") > 0:
        keys = row_keys(data.seed, rows.place, tl.zeros([ROWS], tl.int32))
    grad = load_rows(up.grad_out, rows.place, DIM, rows.valid, DIM, 16)
    return Sample(
        rows,
        keys,
        grad,
        widened(grad),
        tl.load(up.delta + rows.place, mask=rows.valid, other=0.0),
        tl.load(up.lse + rows.place, mask=rows.valid, other=float("inf")) * LOG2_E,
    )


@triton.jit
def _score_gradient(z, own_wide, v_upstream, sample, up, back, pair, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """What the products are weighted by, and dL/ds: `[ROWS, 1]`.

    The gradient of a weight, from unrounded products: it is compared with delta, which is."""
    APPROX: tl.constexpr = get(SPEC, "approx")
    s = tl.zeros([z[0].shape[0], 8], tl.float32)
    for a in tl.static_range(len(z)):
        s = dot(narrow_relu(z[a], DTYPE, APPROX), back.heads[a], s, get(SPEC, "precision"))
    inner = own_wide[0] * v_upstream[0]
    for k in tl.static_range(1, len(v_upstream)):
        inner += own_wide[k] * v_upstream[k]
    grad = tl.sum(inner, 1)
    weight = exp2_of(tl.sum(s, 1) * LOG2_E - sample.lse, APPROX)
    if get(SPEC, "scores"):
        place = sample.rows.place * get(SPEC, "pairs") + pair
        grad += tl.load(up.grad_weights + place, mask=sample.rows.valid, other=0.0).to(tl.float32)
    if get(SPEC, "dropout") > 0:
        first, second = sample.keys
        column = tl.zeros(grad.shape, tl.int32) + pair
        keep = kept(first, second, column, get(SPEC, "dropout"))
        grad = tl.where(keep, grad * get(SPEC, "gain"), 0.0) - sample.delta
        return tl.where(keep, weight * get(SPEC, "gain"), 0.0)[:, None], (weight * grad)[:, None]
    else:
        return weight[:, None], (weight * (grad - sample.delta))[:, None]


@triton.jit
def _through_network(grad, z, products, weight, sample, back, sums, SPEC: tl.constexpr):
    """dL/d(products) as slabs in float32, and the sums with this pair's added."""
    SLABS: tl.constexpr = len(products)
    PRECISION: tl.constexpr = get(SPEC, "precision")
    weight_sums = ()
    bias_sums = ()
    projection_sums = ()
    back_grad = ()
    for k in tl.static_range(SLABS):
        back_grad = back_grad + (weight * sample.wide[k],)
    for a in tl.static_range(len(z)):
        x = tl.where(z[a] > 0, grad, 0.0)
        bias_sums = bias_sums + (sums.bias[a] + x,)
        projection_sums = projection_sums + (sums.projection[a] + x * z[a],)
        x = x.to(products[0].dtype)
        grown = ()
        for k in tl.static_range(SLABS):
            weight_sums = weight_sums + (
                dot(tl.trans(x), products[k], sums.weight[a * SLABS + k], PRECISION),
            )
            grown = grown + (dot(x, back.weight[a * SLABS + k], back_grad[k], PRECISION),)
        back_grad = grown
    return back_grad, Sums(weight_sums, bias_sums, projection_sums)


@triton.jit
def _add_pair(
    own,
    wide,
    c: tl.constexpr,
    v,
    v_wide,
    v_upstream,
    own_grad,
    v_grad,
    sums,
    sample,
    up,
    net,
    back,
    pair,
    SPEC: tl.constexpr,
):
    """Adds to the gradients of the group, of field `v` and of the parameters those of v's pair with field c."""
    SLABS: tl.constexpr = len(v)
    products = pair_products(own, c, v, SPEC)
    z = units(products, net, SPEC)
    weight, grad = _score_gradient(
        z, part(wide, c, SLABS), v_upstream, sample, up, back, pair, v[0].dtype, SPEC
    )
    back_grad, sums = _through_network(grad, z, products, weight, sample, back, sums, SPEC)
    grown = ()
    for n in tl.static_range(len(own_grad)):
        if n // SLABS == c:
            grown = grown + (own_grad[n] + back_grad[n % SLABS] * v_wide[n % SLABS],)
        else:
            grown = grown + (own_grad[n],)
    v_grown = ()
    for k in tl.static_range(SLABS):
        v_grown = v_grown + (v_grad[k] + back_grad[k] * wide[c * SLABS + k],)
    return grown, v_grown, sums


@triton.jit
def _within_group(
    own, wide, own_grad, sums, sample, up, net, back, i, COUNT: tl.constexpr, SPEC: tl.constexpr
):
    """Adds the pairs within a group of COUNT fields that begins with field i."""
    SLABS: tl.constexpr = len(own) // COUNT
    for j in tl.static_range(COUNT - 1):
        v_grad = part(own_grad, j, SLABS)
        v_upstream = multiplied(part(wide, j, SLABS), sample.wide)
        for c in tl.static_range(j + 1, COUNT):
            own_grad, v_grad, sums = _add_pair(
                own,
                wide,
                c,
                part(own, j, SLABS),
                part(wide, j, SLABS),
                v_upstream,
                own_grad,
                v_grad,
                sums,
                sample,
                up,
                net,
                back,
                pair_place(i + c, i + j, SPEC),
                SPEC,
            )
        grown = ()
        for n in tl.static_range(len(own_grad)):
            if n // SLABS == j:
                grown = grown + (v_grad[n % SLABS],)
            else:
                grown = grown + (own_grad[n],)
        own_grad = grown
    return own_grad, sums


@triton.jit
def _store_field(pointer, slabs, sample, SPEC: tl.constexpr, ADD: tl.constexpr):
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
def _store_group(pointer, own_grad, sample, i, COUNT: tl.constexpr, SPEC: tl.constexpr):
    SLABS: tl.constexpr = len(own_grad) // COUNT
    for c in tl.static_range(COUNT):
        place = pointer + (i + c) * get(SPEC, "dim")
        _store_field(place, part(own_grad, c, SLABS), sample, SPEC, False)
    tl.debug_barrier()  # other threads may add to it


@triton.jit
def _store_sums(up, sums, program, SPEC: tl.constexpr):
    DIM: tl.constexpr = get(SPEC, "dim")
    HIDDEN: tl.constexpr = get(SPEC, "hidden")
    SLABS: tl.constexpr = len(sums.weight) // len(sums.bias)
    for a in tl.static_range(len(sums.bias)):
        unit = columns(a, HIDDEN, 16)
        place = program.to(tl.int64) * HIDDEN + unit
        tl.store(up.bias + place, tl.sum(sums.bias[a], 0), mask=unit < HIDDEN)
        tl.store(up.projection + place, tl.sum(sums.projection[a], 0), mask=unit < HIDDEN)
        for k in tl.static_range(SLABS):
            column = columns(k, DIM, 16)[None, :]
            inside = (unit < HIDDEN)[:, None] & (column < DIM)
            tl.store(up.weight + place[:, None] * DIM + column, sums.weight[a * SLABS + k], mask=inside)


@triton.jit
def _backward_kernel(data, up, SPEC: tl.constexpr):
    """Programs along the first axis take turns at tiles of samples; those along the second share the pairs."""
    ROWS: tl.constexpr = get(SPEC, "rows")
    GROUP: tl.constexpr = get(SPEC, "group")
    FIRST: tl.constexpr = get(SPEC, "first")
    DIM: tl.constexpr = get(SPEC, "dim")
    HIDDEN: tl.constexpr = get(SPEC, "hidden")
    DTYPE: tl.constexpr = data.fields.dtype.element_ty
    SLABS: tl.constexpr = slab_count(DIM, 16)
    UNITS: tl.constexpr = slab_count(HIDDEN, 16)
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    net = load_network(data, SPEC)
    back = _load_back(data, net, DTYPE, SPEC)
    sums = Sums(
        zero_rows(16, UNITS * SLABS * 16, 16),
        zero_rows(ROWS, UNITS * 16, 16),
        zero_rows(ROWS, UNITS * 16, 16),
    )
    fields = up.fields + share.to(tl.int64) * data.batch * (get(SPEC, "count") * DIM)
    for tile in tl.range(tl.program_id(0), tl.cdiv(data.batch, ROWS), tl.num_programs(0), num_stages=1):
        sample = _load_sample(data, up, tile, SPEC)
        first_grad = zero_rows(ROWS, FIRST * SLABS * 16, 16)
        if share == 0:
            first = load_group(data, sample.rows, 0, FIRST, SPEC)
            first_grad, sums = _within_group(
                first, widened(first), first_grad, sums, sample, up, net, back, 0, FIRST, SPEC
            )
        _store_group(fields, first_grad, sample, 0, FIRST, SPEC)
        for group in tl.range(1, get(SPEC, "groups"), num_stages=1):
            i = group_start(group, SPEC)
            own = load_group(data, sample.rows, i, GROUP, SPEC)
            wide = widened(own)
            own_grad = zero_rows(ROWS, GROUP * SLABS * 16, 16)
            for j in tl.range(share, i, shares, num_stages=1):
                v = load_field(data, sample.rows, j, SPEC)
                v_wide = widened(v)
                v_upstream = multiplied(v_wide, sample.wide)
                v_grad = zero_rows(ROWS, SLABS * 16, 16)
                for c in tl.static_range(GROUP):
                    own_grad, v_grad, sums = _add_pair(
                        own,
                        wide,
                        c,
                        v,
                        v_wide,
                        v_upstream,
                        own_grad,
                        v_grad,
                        sums,
                        sample,
                        up,
                        net,
                        back,
                        pair_place(i + c, j, SPEC),
                        SPEC,
                    )
                _store_field(fields + j * DIM, v_grad, sample, SPEC, True)
            if group % shares == share:
                own_grad, sums = _within_group(
                    own, wide, own_grad, sums, sample, up, net, back, i, GROUP, SPEC
                )
            _store_group(fields, own_grad, sample, i, GROUP, SPEC)
    _store_sums(up, sums, tl.program_id(0) * shares + share, SPEC)


def backward(
    call: Any, grad_out: Tensor, grad_weights: Tensor | None, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of fields, weight, bias and projection of a `recattn.composite.pairwise_pool.Call`."""
    batch, count, width = call.fields.shape
    hidden = call.weight.shape[0]
    launch = settings.backward(call)
    shares = settings.shares(launch, call)
    programs = settings.programs(launch, call)
    if not call.pairs or not batch:
        fields, weight, bias, projection = (torch.zeros_like(x) for x in call[:4])
        return fields, weight, bias, projection
    data = arguments(call)

    def new(*shape: int) -> Tensor:
        return call.fields.new_empty(*shape, dtype=torch.float32)

    up = Upstream(
        grad_out.contiguous(),
        grad_out if grad_weights is None else grad_weights.contiguous(),
        delta.contiguous(),
        lse.contiguous(),
        new(shares, batch, count, width),
        new(programs * shares, hidden, width),
        new(programs * shares, hidden),
        new(programs * shares, hidden),
    )
    spec = spec_of(call, data, launch, grad_weights is not None)
    _backward_kernel[(programs, shares)](data, up, SPEC=spec, num_warps=launch.num_warps)
    fields = up.fields[0] if shares == 1 else up.fields.sum(0)
    weight, bias, projection = (x.sum(0) for x in (up.weight, up.bias, up.projection))
    head = call.projection.float()
    return fields, weight.mul_(head[:, None]), bias.mul_(head), projection
