"""self_attention: the forward kernel and its launcher."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import self_attention_settings as settings
from .arguments import get
from .primitives import LN_2, exp2, zero_rows
from .scores import (
    Data,
    Spec,
    add_products,
    drop,
    finish_scores,
    load_columns,
    load_own,
    products,
    row_stride,
    rows_of,
    store_own,
)
from .spans import edge_column, inner_column, spans, tiles_of


@triton.jit
def _attend(peak, mass, acc, q, data, rows, column, end, head, MASKED: tl.constexpr, SPEC: tl.constexpr):
    """Adds a tile of keys to the softmax's maximum and sum and to the pooled values."""
    SIZE: tl.constexpr = get(SPEC, "edge") if MASKED else get(SPEC, "step")
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    k = load_columns(data.k + head * D, column, end, SIZE, row_stride(1, SPEC), D, get(SPEC, "slab"), MASKED)
    v = load_columns(
        data.v + head * DV, column, end, SIZE, row_stride(2, SPEC), DV, get(SPEC, "slab"), MASKED
    )
    place = column + tl.arange(0, SIZE)
    s = products(q, k, get(SPEC, "precision"))  # [BLOCK, SIZE]
    s = finish_scores(s, data, rows, place, head, False, MASKED, SPEC)
    top = tl.maximum(peak, tl.max(s, 1) * get(SPEC, "late_factor"))
    factor = exp2(peak - top, get(SPEC, "approx"))
    p = exp2(s * get(SPEC, "late_factor") - top[:, None], get(SPEC, "approx"))
    mass = mass * factor + tl.sum(p, 1)
    p = drop(p, data, rows, place, head, False, SPEC)
    scaled = ()
    for i in tl.static_range(len(acc)):
        scaled = scaled + (acc[i] * factor[:, None],)
    return top, mass, add_products(scaled, p.to(v[0].dtype), v, get(SPEC, "precision"))


@triton.jit
def _forward_kernel(data, out, lse, exact_out, SPEC: tl.constexpr):
    BLOCK: tl.constexpr = get(SPEC, "block")
    STEP: tl.constexpr = get(SPEC, "step")
    EDGE: tl.constexpr = get(SPEC, "edge")
    SPLIT: tl.constexpr = get(SPEC, "split")
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "slab")
    head = tl.program_id(1)
    rows = rows_of(data, tl.program_id(0), head, False, SPEC)
    tiles = tiles_of(rows.place, rows.low, rows.high, BLOCK, STEP, EDGE, SPLIT)
    q = load_own(data.q + head * D, rows, row_stride(0, SPEC), D, SLAB)
    peak = tl.full(
        [BLOCK], -1e30, tl.float32
    )  # finite, so that of a row that meets none all exponentials are 0
    mass = tl.zeros([BLOCK], tl.float32)
    acc = zero_rows(BLOCK, DV, SLAB)
    for i in tl.range(0, tiles.inner, num_stages=get(SPEC, "stages")):
        column = inner_column(tiles, i, STEP, SPLIT)
        peak, mass, acc = _attend(peak, mass, acc, q, data, rows, column, tiles.end, head, False, SPEC)
    for i in tl.range(0, tiles.edges, num_stages=1):
        column = edge_column(tiles, i, STEP, EDGE)
        peak, mass, acc = _attend(peak, mass, acc, q, data, rows, column, tiles.end, head, True, SPEC)
    some = mass > 0
    mass = tl.where(some, mass, 1.0)
    norm = 1 / mass
    pooled = ()
    for i in tl.static_range(len(acc)):
        pooled = pooled + (acc[i] * norm[:, None],)
    WIDTH: tl.constexpr = get(SPEC, "heads") * DV
    store_own(out + head * DV, pooled, rows, WIDTH, DV, SLAB)
    if get(SPEC, "exact"):
        store_own(exact_out + head * DV, pooled, rows, WIDTH, DV, SLAB)
    state = tl.where(some, (peak + tl.log2(mass)) * LN_2, 0.0)
    tl.store(lse + head * data.rows.to(tl.int64) + rows.place, state, mask=rows.inside)


def uncovered(call: Any) -> str | None:
    """Why no kernel here takes this call, or None if one does."""
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel computes in {call.q.dtype}"
    widest = max(call.dim, call.value_dim)
    if widest > settings.WIDEST:
        return f"kernels take heads up to {settings.WIDEST} wide, not {widest}"
    if call.q.shape[0] >= 1 << 31:
        return f"kernels take less than 2^31 rows, not {call.q.shape[0]}"
    return None


def kernel_of(call: Any) -> settings.Kernel:
    """The kernel that forward launches for a call that is covered."""
    return settings.kind_of("forward", call)


def forward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`out [T, H·dv]`, the log-sum-exp of the scores, `[H, T]` float32, and `out` before it was rounded, if backward
    needs that, else nothing.

    `call` is a `recattn.composite.self_attention.Attention`.
    """
    rows = call.q.shape[0]
    out = call.v.new_empty(rows, call.heads * call.value_dim)
    lse = call.q.new_empty(call.heads, rows, dtype=torch.float32)
    exact_out = lse.new_empty(0 if call.exact_dtype == out.dtype else out.shape)
    if rows:
        launch = settings.self_attention("forward", call)
        data = arguments(call)
        _forward_kernel[(triton.cdiv(rows, launch.block), call.heads)](
            data, out, lse, exact_out, SPEC=specialize(call, data, launch), num_warps=launch.num_warps
        )
    return out, lse, exact_out


def arguments(call: Any) -> Data:
    q, k, v = (readable(x) for x in (call.q, call.k, call.v))
    first, past = spans(call.offsets.contiguous(), q.shape[0])
    table, index, seed = bias_table(call), call.positions, call.seed
    return Data(
        q,
        k,
        v,
        first,
        past,
        q if table is None else table,
        first if index is None else index.contiguous(),
        first if seed is None else seed,
        q.shape[0],
        0 if table is None else table.shape[1],
    )


def readable(x: Tensor) -> Tensor:
    """Rows may lie apart, as long as 32 bits reach across a tile; their elements may not."""
    return x if x.stride(1) == 1 and x.stride(0) < 1 << 24 else x.contiguous()


def bias_table(call: Any) -> Tensor | None:
    """The bias in base 2, a row per head."""
    return None if call.table is None else (call.table.t().float() / math.log(2)).contiguous()


def specialize(
    call: Any, data: Data, launch: settings.AttentionLaunch, grad_out: Tensor | None = None
) -> Spec:
    approx = torch.version.hip is None and not triton.knobs.runtime.interpret
    products = "tf32"
    if settings.precision(call.q.dtype) == "ieee":  # which three products of tf32 parts are as exact as
        products = "tf32x3" if approx else "ieee"
    return Spec(
        heads=call.heads,
        dim=call.dim,
        value_dim=call.value_dim,
        strides=tuple(x.stride(0) for x in (data.q, data.k, data.v, grad_out) if x is not None),
        scale=call.scale,
        causal=call.causal,
        hide_self=call.hide_self,
        biased=call.table is not None,
        exact=call.exact_dtype != call.v.dtype,
        indexed=call.positions is not None,
        dropout=call.dropout,
        precision=products,
        approx=approx,
        block=launch.block,
        step=launch.step,
        edge=launch.edge,
        slab=launch.slab,
        stages=launch.num_stages,
    )
