"""self_attention's backward: a kernel over queries, one over keys, and one for the table of the bias.

With p = exp(s - lse), and dropout and its rescaling written as m:

    dp = m·(g v^T)    ds = p·(dp - delta)    delta = g·out    dq = scale·ds k    dk = scale·ds^T q    dv = (m·p)^T g

Each computes the scores that it needs again, and writes each of its rows once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import self_attention_settings as settings
from .arguments import get
from .primitives import LOG2_E, exp2, scale, zero_rows
from .scores import (
    add_products,
    buckets_of,
    drop,
    finish_scores,
    load_columns,
    load_own,
    met,
    products,
    row_stride,
    rows_of,
    store_own,
)
from .self_attention import arguments, readable, specialize
from .spans import edge_column, inner_column, tiles_of

COPIES = tl.constexpr(64)  # of the table's gradient, so that programs seldom meet in one
REACH = 62  # bits of a sum of integers


@triton.jit
def _squares(slabs):
    """Of each row."""
    out = tl.sum(slabs[0].to(tl.float32) * slabs[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(slabs)):
        out += tl.sum(slabs[i].to(tl.float32) * slabs[i].to(tl.float32), 1)
    return out


@triton.jit
def _row_dots(a, b):
    out = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        out += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return out


@triton.jit
def _score_gradients(
    q, g, mass, delta, data, rows, column, end, head, MASKED: tl.constexpr, SPEC: tl.constexpr
):
    """Of a tile of keys: the keys and `[BLOCK, SIZE]` ds, of the scores without their scale."""
    SIZE: tl.constexpr = get(SPEC, "edge") if MASKED else get(SPEC, "step")
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    k = load_columns(data.k + head * D, column, end, SIZE, row_stride(1, SPEC), D, get(SPEC, "slab"), MASKED)
    v = load_columns(
        data.v + head * DV, column, end, SIZE, row_stride(2, SPEC), DV, get(SPEC, "slab"), MASKED
    )
    place = column + tl.arange(0, SIZE)
    s = finish_scores(products(q, k, PRECISION), data, rows, place, head, False, MASKED, SPEC)
    p = exp2(s * get(SPEC, "late_factor") - mass[:, None], get(SPEC, "approx"))
    dp = drop(products(g, v, PRECISION), data, rows, place, head, False, SPEC)
    return k, p * (dp - delta[:, None])


@triton.jit
def _queries_kernel(data, grad_out, out, lse, delta, grad_q, largest, SPEC: tl.constexpr):
    BLOCK: tl.constexpr = get(SPEC, "block")
    STEP: tl.constexpr = get(SPEC, "step")
    EDGE: tl.constexpr = get(SPEC, "edge")
    SPLIT: tl.constexpr = get(SPEC, "split")
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "slab")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    head = tl.program_id(1)
    rows = rows_of(data, tl.program_id(0), head, False, SPEC)
    tiles = tiles_of(rows.place, rows.low, rows.high, BLOCK, STEP, EDGE, SPLIT)
    q = load_own(data.q + head * D, rows, row_stride(0, SPEC), D, SLAB)
    g = load_own(grad_out + head * DV, rows, row_stride(3, SPEC), DV, SLAB)
    pooled = load_own(out + head * DV, rows, get(SPEC, "heads") * DV, DV, SLAB)
    at = head * data.rows.to(tl.int64) + rows.place
    mass = tl.load(lse + at, mask=rows.valid, other=0.0) * LOG2_E
    means = _row_dots(g, pooled)
    tl.store(delta + at, means, mask=rows.inside)
    if get(SPEC, "biased"):
        tl.store(largest + head * tl.num_programs(0) + tl.program_id(0), tl.max(_squares(g), 0))
    acc = zero_rows(BLOCK, D, SLAB)
    for i in tl.range(0, tiles.inner, num_stages=get(SPEC, "stages")):
        column = inner_column(tiles, i, STEP, SPLIT)
        k, ds = _score_gradients(q, g, mass, means, data, rows, column, tiles.end, head, False, SPEC)
        acc = add_products(acc, ds.to(k[0].dtype), k, PRECISION)
    for i in tl.range(0, tiles.edges, num_stages=1):
        column = edge_column(tiles, i, STEP, EDGE)
        k, ds = _score_gradients(q, g, mass, means, data, rows, column, tiles.end, head, True, SPEC)
        acc = add_products(acc, ds.to(k[0].dtype), k, PRECISION)
    acc = scale(acc, get(SPEC, "scale"))
    store_own(grad_q + head * D, acc, rows, get(SPEC, "heads") * D, D, SLAB)


@triton.jit
def _add_queries(
    acc_k,
    acc_v,
    k,
    v,
    data,
    grad_out,
    lse,
    delta,
    rows,
    column,
    end,
    head,
    MASKED: tl.constexpr,
    SPEC: tl.constexpr,
):
    """Adds what a tile of queries gives to dk and dv."""
    SIZE: tl.constexpr = get(SPEC, "edge") if MASKED else get(SPEC, "step")
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "slab")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    q = load_columns(data.q + head * D, column, end, SIZE, row_stride(0, SPEC), D, SLAB, MASKED)
    g = load_columns(grad_out + head * DV, column, end, SIZE, row_stride(3, SPEC), DV, SLAB, MASKED)
    place = column + tl.arange(0, SIZE)
    at = head * data.rows.to(tl.int64) + place
    if MASKED:
        mass = tl.load(lse + at, mask=place < end, other=0.0) * LOG2_E
        means = tl.load(delta + at, mask=place < end, other=0.0)
    else:
        mass = tl.load(lse + at) * LOG2_E
        means = tl.load(delta + at)
    s = finish_scores(products(k, q, PRECISION), data, rows, place, head, True, MASKED, SPEC)
    p = exp2(s * get(SPEC, "late_factor") - mass[None, :], get(SPEC, "approx"))  # [BLOCK, SIZE]
    dropped = drop(p, data, rows, place, head, True, SPEC)
    acc_v = add_products(acc_v, dropped.to(g[0].dtype), g, PRECISION)
    dp = drop(products(v, g, PRECISION), data, rows, place, head, True, SPEC)
    ds = p * (dp - means[None, :])
    return add_products(acc_k, ds.to(q[0].dtype), q, PRECISION), acc_v


@triton.jit
def _keys_kernel(data, grad_out, lse, delta, grad_k, grad_v, largest, SPEC: tl.constexpr):
    BLOCK: tl.constexpr = get(SPEC, "block")
    STEP: tl.constexpr = get(SPEC, "step")
    EDGE: tl.constexpr = get(SPEC, "edge")
    SPLIT: tl.constexpr = get(SPEC, "split")
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "slab")
    head = tl.program_id(1)
    rows = rows_of(data, tl.program_id(0), head, True, SPEC)
    tiles = tiles_of(rows.place, rows.low, rows.high, BLOCK, STEP, EDGE, SPLIT)
    k = load_own(data.k + head * D, rows, row_stride(1, SPEC), D, SLAB)
    v = load_own(data.v + head * DV, rows, row_stride(2, SPEC), DV, SLAB)
    if get(SPEC, "biased"):
        tl.store(largest + head * tl.num_programs(0) + tl.program_id(0), tl.max(_squares(v), 0))
    acc_k = zero_rows(BLOCK, D, SLAB)
    acc_v = zero_rows(BLOCK, DV, SLAB)
    for i in tl.range(0, tiles.inner, num_stages=get(SPEC, "stages")):
        column = inner_column(tiles, i, STEP, SPLIT)
        acc_k, acc_v = _add_queries(
            acc_k, acc_v, k, v, data, grad_out, lse, delta, rows, column, tiles.end, head, False, SPEC
        )
    for i in tl.range(0, tiles.edges, num_stages=1):
        column = edge_column(tiles, i, STEP, EDGE)
        acc_k, acc_v = _add_queries(
            acc_k, acc_v, k, v, data, grad_out, lse, delta, rows, column, tiles.end, head, True, SPEC
        )
    acc_k = scale(acc_k, get(SPEC, "scale"))
    store_own(grad_k + head * D, acc_k, rows, get(SPEC, "heads") * D, D, SLAB)
    store_own(grad_v + head * DV, acc_v, rows, get(SPEC, "heads") * DV, DV, SLAB)


@triton.jit
def _table_kernel(data, grad_out, lse, delta, unit, grad_table, SPEC: tl.constexpr):
    """Adds ds of each pair to its bucket, in multiples of `unit` as integers: their sum is the same in any order."""
    EDGE: tl.constexpr = get(SPEC, "edge")
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "slab")
    head = tl.program_id(1)
    rows = rows_of(data, tl.program_id(0), head, False, SPEC)
    q = load_own(data.q + head * D, rows, row_stride(0, SPEC), D, SLAB)
    g = load_own(grad_out + head * DV, rows, row_stride(3, SPEC), DV, SLAB)
    at = head * data.rows.to(tl.int64) + rows.place
    mass = tl.load(lse + at, mask=rows.valid, other=0.0) * LOG2_E
    means = tl.load(delta + at, mask=rows.valid, other=0.0)
    per_unit = 1 / tl.load(unit)
    copy = tl.program_id(0) % COPIES
    grad_table += (copy * get(SPEC, "heads") + head) * data.buckets
    begin = tl.min(rows.low, 0)
    end = tl.max(rows.high, 0)
    for i in tl.range(0, tl.cdiv(end - begin, EDGE), num_stages=1):
        column = begin + i * EDGE
        _, ds = _score_gradients(q, g, mass, means, data, rows, column, end, head, True, SPEC)
        other = column + tl.arange(0, EDGE)
        bucket = buckets_of(data, rows, other, False, SPEC)
        tl.atomic_add(
            grad_table + bucket, (ds * per_unit).to(tl.int64), mask=met(rows, other, SPEC), sem="relaxed"
        )


def backward(call: Any, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """dL/dq, dL/dk, dL/dv in their dtypes, and dL/dtable `[R, H]` in float32, empty without a table."""
    rows, heads = call.q.shape[0], call.heads
    grad_q, grad_k = (x.new_empty(x.shape) for x in (call.q, call.k))
    grad_v = call.v.new_empty(call.v.shape)
    biased = call.table is not None
    if not rows:
        return grad_q, grad_k, grad_v, lse.new_zeros(call.table.shape if biased else 0)
    data = arguments(call)
    grad_out = readable(grad_out)
    delta = torch.empty_like(lse)

    def launch(kernel: str) -> tuple[tuple[int, int], dict[str, Any]]:
        launch = settings.self_attention(kernel, call)
        spec = specialize(call, data, launch, grad_out)
        return (triton.cdiv(rows, launch.block), heads), {"SPEC": spec, "num_warps": launch.num_warps}

    query_grid, query_options = launch("queries")
    key_grid, key_options = launch("keys")
    largest = [lse.new_empty(grid if biased else 0) for grid in (query_grid, key_grid)]
    _queries_kernel[query_grid](data, grad_out, out, lse, delta, grad_q, largest[0], **query_options)
    _keys_kernel[key_grid](data, grad_out, lse, delta, grad_k, grad_v, largest[1], **key_options)
    if not biased:
        return grad_q, grad_k, grad_v, lse.new_zeros(0)
    # |ds| <= 2·p·|g|·|v|/(1 - dropout), and p sums to 1 in each row. Half of the bits would do for fp32.
    bound = largest[0].amax().sqrt() * largest[1].amax().sqrt() * (2 * rows / (1 - call.dropout))
    unit = torch.exp2(torch.log2(bound).ceil().clamp_min(-60) - REACH).reshape(1)
    sums = torch.zeros(COPIES.value, heads, data.buckets, dtype=torch.int64, device=lse.device)
    grid, options = launch("table")
    _table_kernel[grid](data, grad_out, lse, delta, unit, sums, **options)
    return grad_q, grad_k, grad_v, (sums.sum(0).double() * unit).float().t().contiguous()
