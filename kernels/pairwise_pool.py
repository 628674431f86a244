"""pairwise_pool forward: samples are the rows of every tile, one pair of fields is a product of two tiles.

So nothing depends on which pair it is: no index, no mask, no pair that is computed in vain, and products are rounded as
eager code rounds them, which decides what a ReLU closes. A group of fields stays in registers and meets every field
before it, then its own; the scores of a field with a group are columns of one tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pairwise_pool_settings as settings
from .arguments import get
from .pairs import (
    add_multiplied,
    add_products,
    arguments,
    group_start,
    in_parts,
    load_field,
    load_group,
    load_network,
    narrow_relu,
    pair_place,
    pair_products,
    part,
    rows_of,
    spec_of,
    uncovered,
    units,
    widened,
)
from .primitives import LOG2_E, dot, exp2, scale, store_rows, zero_rows
from .score_dropout import kept, row_keys
from .settings import Kernel

__all__ = ["forward", "kernel_of", "uncovered"]

COLUMNS = tl.constexpr(8)
LOWEST = tl.constexpr(-1e30)  # finite, so that its difference from itself is no NaN


@triton.jit
def _one_hot_columns(projection, DTYPE: tl.constexpr):
    """Of each column `[units, COLUMNS]` slabs that hold the projection there and zero elsewhere."""
    column = tl.arange(0, COLUMNS)[None, :]
    tiles = ()
    for c in tl.static_range(COLUMNS):
        for a in tl.static_range(len(projection)):
            tiles = tiles + (tl.where(column == c, projection[a][:, None], 0.0).to(DTYPE),)
    return tiles


@triton.constexpr_function
def pair_within(n, count):
    """`(i, j)`, pair n of the fields of a group of `count`, j < i: all of j = 0, then of j = 1, ..."""
    j = 0
    while n >= count - 1 - j:
        n -= count - 1 - j
        j += 1
    return j + 1 + n, j


@triton.constexpr_function
def past(n, pairs):
    """Where the pairs end that share a tile of scores with pair n, its first."""
    return min(n + 8, pairs)


@triton.constexpr_function
def first_of(n, within, count):
    """Pair n's place in the group of its one field."""
    return pair_within(n, count)[0] if within else n


@triton.constexpr_function
def second_of(n, within, count):
    """And of the other among the others, the group itself or a single field."""
    return pair_within(n, count)[1] if within else 0


@triton.jit
def _pair_places(
    i, j, FROM: tl.constexpr, TO: tl.constexpr, WITHIN: tl.constexpr, COUNT: tl.constexpr, SPEC: tl.constexpr
):
    """`[COLUMNS]`: the place of each pair among all of a sample; -1 where there is none."""
    column = tl.arange(0, COLUMNS)
    places = tl.full([COLUMNS], -1, tl.int32)
    for n in tl.static_range(FROM, TO):
        place = pair_place(i + first_of(n, WITHIN, COUNT), j + second_of(n, WITHIN, COUNT), SPEC)
        places = tl.where(column == n - FROM, place, places)
    return places


@triton.jit
def _attend(
    state,
    own,
    wide,
    other,
    other_wide,
    net,
    heads,
    rows,
    keys,
    i,
    j,
    out,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    WITHIN: tl.constexpr,
    COUNT: tl.constexpr,
    SPEC: tl.constexpr,
):
    """Adds pairs FROM to TO of a group of COUNT fields, which begins with field i, with others, from field j on."""
    SLABS: tl.constexpr = len(own) // COUNT
    ROWS: tl.constexpr = get(SPEC, "rows")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    APPROX: tl.constexpr = get(SPEC, "approx")
    peak, mass, acc = state
    alive = tl.arange(0, COLUMNS) < TO - FROM
    s = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.where(alive, 0.0, LOWEST)[None, :]
    for n in tl.static_range(FROM, TO):
        v = part(other, second_of(n, WITHIN, COUNT), SLABS)
        z = units(pair_products(own, first_of(n, WITHIN, COUNT), v, SPEC), net, SPEC)
        for a in tl.static_range(len(z)):
            head = heads[(n - FROM) * len(z) + a]
            s = dot(narrow_relu(z[a], head.dtype, APPROX), head, s, PRECISION)
    if get(SPEC, "scores"):
        places = _pair_places(i, j, FROM, TO, WITHIN, COUNT, SPEC)
        place = rows.place[:, None] * get(SPEC, "pairs") + places[None, :]
        tl.store(out + place, s * LOG2_E, mask=rows.valid[:, None] & alive[None, :])
    top = tl.maximum(peak, tl.max(s, 1) * LOG2_E)
    factor = exp2(peak - top, APPROX)
    p = exp2(s * LOG2_E - top[:, None], APPROX)
    mass = mass * factor[:, None] + p
    if get(SPEC, "dropout") > 0:
        places = _pair_places(i, j, FROM, TO, WITHIN, COUNT, SPEC)
        keep = kept(keys[0][:, None], keys[1][:, None], places[None, :], get(SPEC, "dropout"))
        p = tl.where(keep, p, 0.0)
    p = in_parts(p, own[0].dtype)  # [ROWS, 2·COLUMNS]
    acc = scale(acc, factor[:, None])
    inner = zero_rows(ROWS, SLABS * 16, 16)
    row = tl.arange(0, 2 * COLUMNS)[:, None]
    for n in tl.static_range(FROM, TO):
        chosen = tl.where(row // 2 == n - FROM, tl.full([2 * COLUMNS, 16], 1.0, tl.float32), 0.0)
        weight = dot(p, chosen.to(p.dtype), tl.zeros([ROWS, 16], tl.float32), get(SPEC, "part_precision"))
        inner = add_multiplied(inner, weight, part(wide, first_of(n, WITHIN, COUNT), SLABS))
        if n + 1 == TO or second_of(n + 1, WITHIN, COUNT) != second_of(n, WITHIN, COUNT):
            acc = add_products(acc, inner, part(other_wide, second_of(n, WITHIN, COUNT), SLABS))
            inner = zero_rows(ROWS, SLABS * 16, 16)
    return top, mass, acc


@triton.jit
def _attend_within(state, own, wide, net, heads, rows, keys, i, out, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """Adds the pairs within a group of COUNT fields that begins with field i."""
    PAIRS: tl.constexpr = COUNT * (COUNT - 1) // 2
    for n in tl.static_range(0, PAIRS, COLUMNS):
        state = _attend(
            state,
            own,
            wide,
            own,
            wide,
            net,
            heads,
            rows,
            keys,
            i,
            i,
            out,
            n,
            past(n, PAIRS),
            True,
            COUNT,
            SPEC,
        )
    return state


@triton.jit
def _forward_kernel(data, out, peak_mass, scores, SPEC: tl.constexpr):
    """Programs along the second axis share the pairs; each writes `out [B, K]` and `peak_mass [B, 2]` of its own."""
    ROWS: tl.constexpr = get(SPEC, "rows")
    GROUP: tl.constexpr = get(SPEC, "group")
    FIRST: tl.constexpr = get(SPEC, "first")
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    rows = rows_of(data, tl.program_id(0), ROWS)
    net = load_network(data, SPEC)
    heads = _one_hot_columns(net.projection, data.fields.dtype.element_ty)
    keys = ()
    if get(SPEC, "dropout") > 0:
        keys = row_keys(data.seed, rows.place, tl.zeros([ROWS], tl.int32))
    state = (
        tl.full([ROWS], LOWEST, tl.float32),
        tl.zeros([ROWS, COLUMNS], tl.float32),
        zero_rows(ROWS, get(SPEC, "dim"), 16),
    )
    if share == 0:
        own = load_group(data, rows, 0, FIRST, SPEC)
        state = _attend_within(state, own, widened(own), net, heads, rows, keys, 0, scores, FIRST, SPEC)
    for group in tl.range(1, get(SPEC, "groups"), num_stages=1):
        i = group_start(group, SPEC)
        own = load_group(data, rows, i, GROUP, SPEC)
        wide = widened(own)
        if group % shares == share:
            state = _attend_within(state, own, wide, net, heads, rows, keys, i, scores, GROUP, SPEC)
        for j in tl.range(share, i, shares, num_stages=get(SPEC, "stages")):
            v = load_field(data, rows, j, SPEC)
            state = _attend(
                state,
                own,
                wide,
                v,
                widened(v),
                net,
                heads,
                rows,
                keys,
                i,
                j,
                scores,
                0,
                GROUP,
                False,
                GROUP,
                SPEC,
            )
    peak, mass, acc = state
    mass = tl.sum(mass, 1)
    norm = get(SPEC, "gain") / tl.where(mass > 0, mass, 1.0)  # a program may have no pair
    base = share.to(tl.int64) * data.batch
    place = base + rows.place
    store_rows(out, scale(acc, norm[:, None]), place, get(SPEC, "dim"), rows.valid, get(SPEC, "dim"), 16)
    tl.store(peak_mass + 2 * place, peak, mask=rows.valid)
    tl.store(peak_mass + 2 * place + 1, mass, mask=rows.valid)


def kernel_of(call: Any) -> Kernel:  # noqa: ARG001 (as of every operator)
    """The kernel that forward launches for a call that is covered."""
    return Kernel("pairs", "samples are rows of a tile, and pairs never exist")


def forward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, K]`, of the softmax maximum and sum `[B, 2]`, and, if weights are wanted, the scores `[B, P]`; all in
    float32, scores and maximum in base 2.

    `call` is a `recattn.composite.pairwise_pool.Call`.
    """
    batch, _, width = call.fields.shape
    new = call.fields.new_zeros if not call.pairs else call.fields.new_empty
    launch = settings.forward(call)
    shares = settings.shares(launch, call)
    out = new(shares, batch, width, dtype=torch.float32)
    peak_mass = new(shares, batch, 2, dtype=torch.float32)
    scores = out.new_empty(batch, call.pairs if call.return_weights else 0)
    if call.pairs and batch:
        data = arguments(call)
        _forward_kernel[(triton.cdiv(batch, launch.rows), shares)](
            data, out, peak_mass, scores, SPEC=spec_of(call, data, launch), num_warps=launch.num_warps
        )
        if shares > 1:
            return *_joined(out, peak_mass), scores
    return out[0], peak_mass[0], scores


def _joined(out: Tensor, peak_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Of programs that shared the pairs, `[shares, B, *]`."""
    peaks, masses = peak_mass.unbind(2)
    peak = peaks.amax(0)
    masses = masses * torch.exp2(peaks - peak)
    mass = masses.sum(0)
    out = torch.linalg.vecdot(out, (masses / mass).unsqueeze(2), dim=0)
    return out, torch.stack((peak, mass), 1)
