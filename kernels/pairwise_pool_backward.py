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
from . import pairwise_pool_wide
from .arguments import get
from .pairs import (
    arguments,
    group_start,
    load_field,
    load_group,
    load_network,
    multiplied,
    pair_place,
    pair_products,
    part,
    spec_of,
    units,
    widened,
)
from .pairwise_pool_sample import (
    Sums,
    Upstream,
    columns_of,
    load_back_weight,
    load_sample,
    one_column,
    score_gradient,
    store_field,
    store_sums,
    with_mean,
)
from .primitives import dot, slab_count, zero_rows


class Back(NamedTuple):
    weight: Any  # slabs [16 units, 16 columns of fields], times the projection
    heads: Any  # slabs [16 units, 8], the projection in the first column, zero in the others


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
    upstream = columns_of(part(wide, c, SLABS), v_upstream)
    weight, grad = score_gradient(z, upstream, sample, up, back.heads, pair, v[0].dtype, SPEC)
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
def _store_group(pointer, own_grad, sample, i, COUNT: tl.constexpr, SPEC: tl.constexpr):
    SLABS: tl.constexpr = len(own_grad) // COUNT
    for c in tl.static_range(COUNT):
        place = pointer + (i + c) * get(SPEC, "dim")
        store_field(place, part(own_grad, c, SLABS), sample, SPEC, False)
    tl.debug_barrier()  # other threads may add to it


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
    back = Back(load_back_weight(data, net.projection, DTYPE, SPEC), one_column(net.projection, DTYPE))
    sums = Sums(
        zero_rows(16, UNITS * SLABS * 16, 16),
        zero_rows(ROWS, UNITS * 16, 16),
        zero_rows(ROWS, UNITS * 16, 16),
    )
    fields = up.fields + share.to(tl.int64) * data.batch * (get(SPEC, "count") * DIM)
    for tile in tl.range(tl.program_id(0), tl.cdiv(data.batch, ROWS), tl.num_programs(0), num_stages=1):
        sample = load_sample(data, up, tile, SPEC)
        if get(SPEC, "few"):
            sample = with_mean(sample, data, up, net, back.heads, SPEC)
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
                store_field(fields + j * DIM, v_grad, sample, SPEC, True)
            if group % shares == share:
                own_grad, sums = _within_group(
                    own, wide, own_grad, sums, sample, up, net, back, i, GROUP, SPEC
                )
            _store_group(fields, own_grad, sample, i, GROUP, SPEC)
    store_sums(up, sums, tl.program_id(0) * shares + share, 0, SPEC)


def backward(
    call: Any, grad_out: Tensor, grad_weights: Tensor | None, delta: Tensor, peak_mass: Tensor
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
        peak_mass.contiguous(),
        new(shares, batch, count, width),
        new(programs * shares, hidden, width),
        new(programs * shares, hidden),
        new(programs * shares, hidden),
    )
    spec = spec_of(call, data, launch, grad_weights is not None)
    if settings.wide(call):
        pairwise_pool_wide.backward(data, up, spec, launch, programs, shares)
    else:
        _backward_kernel[(programs, shares)](data, up, SPEC=spec, num_warps=launch.num_warps)
    fields = up.fields[0] if shares == 1 else up.fields.sum(0)
    weight, bias, projection = (x.sum(0) for x in (up.weight, up.bias, up.projection))
    head = call.projection.float()
    return fields, weight.mul_(head[:, None]), bias.mul_(head), projection
