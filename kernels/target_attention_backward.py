"""target_attention backward with one query per history: one pass over keys and values, on the forward's schedule."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import candidate_attention
from . import target_attention_settings as settings
from .arguments import get
from .dot_product import (
    Upstream,
    accumulate,
    add_rows,
    attention,
    attention_backward,
    bias_factor,
    data_of,
    heads_together,
    key_width,
    load_keys_values,
    load_softmax,
    outer,
    products,
    spec_of,
    store_tile,
    transposed,
    value_width,
    zero_flat,
)
from .schedule import find_sequence, rows_per_program
from .target_attention import (
    column_owners,
    column_scores,
    join,
    load_columns,
    meets,
    store_columns,
    zero_columns,
)


@triton.jit
def _attend_backward(
    data,
    grads,
    origin,
    step,
    valid,
    columns,
    bounds,
    head,
    group,
    acc,
    SPEC: tl.constexpr,
    FULL: tl.constexpr,
):
    """Writes the gradients of the tokens from `origin + step` on; returns the query's, `acc`, with theirs added."""
    PRECISION: tl.constexpr = get(SPEC, "precision")
    HEADS: tl.constexpr = get(SPEC, "heads")
    q, g, shift, part, delta = columns
    grad_key, grad_value, grad_bias = grads
    start = origin + step
    k, v = load_keys_values(data, start, valid, group, SPEC, FULL)
    met = meets(step, valid, bounds, SPEC)
    s = column_scores(data, k, transposed(q), start, valid, head, group, SPEC, FULL)
    a = attention(s, met, (shift[None, :], part[None, :]), SPEC, not FULL)  # [tokens, columns]
    grad = products(v, transposed(g), tl.zeros(a.shape, tl.float32), PRECISION)
    grad = attention_backward(grad, a, met, bias_factor(data.scale, SPEC), delta[None, :], SPEC, not FULL)
    token = tl.arange(0, valid.shape[0])
    if get(SPEC, "bias_heads"):
        place = grad_bias + start * HEADS + group * get(SPEC, "heads_together")
        if get(SPEC, "heads_together") == 1:
            # All columns but one are zero.
            tl.store(place + token * HEADS, tl.sum(grad, 1), mask=valid)
        else:
            column = tl.arange(0, get(SPEC, "columns"))
            alive = column < get(SPEC, "together") * get(SPEC, "heads_together")
            place = place + token[:, None] * HEADS + head[None, :]
            tl.store(place, grad, mask=met & alive[None, :])
        grad *= data.scale
    acc = accumulate(k, grad.to(k[0].dtype), acc, PRECISION)
    KEYS: tl.constexpr = key_width(SPEC)
    VALUES: tl.constexpr = value_width(SPEC)
    K: tl.constexpr = HEADS * get(SPEC, "dim")
    V: tl.constexpr = HEADS * get(SPEC, "value_dim")
    store_tile(
        grad_key + start * K + group * KEYS,
        outer(grad, q, PRECISION),
        token,
        valid,
        K,
        KEYS,
        get(SPEC, "dim_slab"),
        FULL,
    )
    store_tile(
        grad_value + start * V + group * VALUES,
        outer(a, g, PRECISION),
        token,
        valid,
        V,
        VALUES,
        get(SPEC, "dim_slab"),
        FULL,
    )
    return acc


@triton.jit
def _backward_kernel(data, upstream, grad_query, grad_key, grad_value, grad_bias, SPEC: tl.constexpr):
    """Rows of `grad_query [B + 2·programs, H·d]` from B on are for the parts of histories that are cut."""
    BLOCK: tl.constexpr = get(SPEC, "block")
    TAIL: tl.constexpr = get(SPEC, "tail")
    TOGETHER: tl.constexpr = get(SPEC, "together")
    HEADS: tl.constexpr = get(SPEC, "heads")
    DIM: tl.constexpr = get(SPEC, "dim")
    VALUE_DIM: tl.constexpr = get(SPEC, "value_dim")
    program = tl.program_id(0)
    group = tl.program_id(1)
    grads = (grad_key, grad_value, grad_bias)
    total = tl.load(data.offsets + data.batch)
    if group == 0:  # slack takes no gradient
        slack = data.total - total
        zero_flat(grad_key, total.to(tl.int64), slack, HEADS * DIM, program, tl.num_programs(0))
        zero_flat(grad_value, total.to(tl.int64), slack, HEADS * VALUE_DIM, program, tl.num_programs(0))
        if get(SPEC, "bias_heads"):
            zero_flat(grad_bias, total.to(tl.int64), slack, HEADS, program, tl.num_programs(0))
    share = rows_per_program(total, tl.num_programs(0), get(SPEC, "least_rows"))
    begin = tl.minimum(program.to(tl.int64) * share, total).to(total.dtype)
    end = tl.minimum(begin + share, total)
    if begin >= end:
        return
    first = find_sequence(data.offsets, data.batch, begin)
    while begin < end:
        if tl.load(data.offsets + tl.minimum(first + TOGETHER, data.batch)) <= begin:  # all empty
            first = find_sequence(data.offsets, data.batch, begin)
        owners = column_owners(first, data.batch, SPEC)
        live, owner, head = owners
        first_row = tl.load(data.offsets + owner, mask=live, other=0)
        last_row = tl.load(data.offsets + owner + 1, mask=live, other=0)
        stop = tl.minimum(tl.load(data.offsets + tl.minimum(first + TOGETHER, data.batch)), end)
        origin = begin.to(tl.int64)
        bounds = ((first_row - origin).to(tl.int32), (tl.minimum(last_row, stop) - origin).to(tl.int32))
        place = owner.to(tl.int64) * HEADS + group * get(SPEC, "heads_together") + head
        shift, part = load_softmax(upstream.peak_mass, place, live, SPEC)
        queries = (
            load_columns(data.query, data.query_stride, owners, group, DIM, SPEC),
            load_columns(upstream.grad_out, HEADS * VALUE_DIM, owners, group, VALUE_DIM, SPEC),
            shift,
            part,
            tl.load(upstream.delta + place, mask=live, other=0.0) * bias_factor(data.scale, SPEC),
        )
        acc = zero_columns(key_width(SPEC), SPEC)
        length = (stop - begin).to(tl.int32)
        if TOGETHER == 1:
            full = length // BLOCK * BLOCK
            every = tl.full([BLOCK], 1, tl.int1)
            for step in tl.range(0, full, BLOCK, num_stages=get(SPEC, "stages")):
                acc = _attend_backward(
                    data, grads, origin, step, every, queries, bounds, head, group, acc, SPEC, True
                )
            for step in tl.range(full, length, TAIL, num_stages=1):
                valid = tl.arange(0, TAIL) < length - step
                acc = _attend_backward(
                    data, grads, origin, step, valid, queries, bounds, head, group, acc, SPEC, False
                )
        else:
            for step in tl.range(0, length, BLOCK, num_stages=get(SPEC, "stages")):
                valid = tl.arange(0, BLOCK) < length - step
                acc = _attend_backward(
                    data, grads, origin, step, valid, queries, bounds, head, group, acc, SPEC, False
                )
        seen = live & (tl.minimum(last_row, stop) > tl.maximum(first_row, begin))
        whole = (first_row >= begin) & (last_row <= stop)
        slot = data.batch + 2 * program + (first_row >= begin).to(tl.int32)
        row = tl.where(whole, owner, slot).to(tl.int64)
        store_columns(grad_query, HEADS * DIM, acc, row, seen, head, group, DIM, SPEC)
        begin = stop
        first += TOGETHER


def backward(
    call: Any, grad_out: Tensor, delta: Tensor, peak_mass: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, keys, values and bias of a `recattn.composite.target_attention.Call`."""
    upstream = Upstream(grad_out.contiguous(), delta.contiguous(), peak_mass.contiguous())
    if call.query_offsets is not None:
        query, keys, values, bias = candidate_attention.backward(call, upstream)
    else:
        query, keys, values, bias = _backward(call, upstream)
    if call.rows is not None:
        keys, values = (add_rows(call, x, table) for x, table in ((keys, call.keys), (values, call.values)))
    if bias is not None and call.bias.shape[1] == 1:
        bias = bias.sum(1, keepdim=True)
    return query, keys, values, bias


def _backward(call: Any, upstream: Upstream) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, total = call.offsets.numel() - 1, call.total
    width = max(call.keys.shape[1], call.values.shape[1]) // call.heads
    precision = settings.precision(call.keys.dtype)
    heads = heads_together(call, settings.QUERY_BACKWARD_WIDEST[precision], 16)
    launch = settings.query_backward(precision, heads * width)
    data = data_of(call)
    programs = launch.programs(total, call.keys.device)
    short = total < settings.SHORT * batch
    spec = spec_of(
        call,
        data,
        launch,
        heads,
        least_rows=launch.least_rows,
        columns=16,
        together=16 // heads if short else 1,
    )
    query = data.query.new_zeros(batch + 2 * programs, data.query.shape[1], dtype=torch.float32)
    new = data.key.new_empty if batch and total else data.key.new_zeros
    keys, values = new(total, call.keys.shape[1]), new(total, call.values.shape[1])
    bias = None if call.bias is None else new(total, call.heads, dtype=torch.float32)
    if batch and total:
        _backward_kernel[(programs, call.heads // heads)](
            data,
            upstream,
            query,
            keys,
            values,
            query if bias is None else bias,
            SPEC=spec,
            num_warps=launch.num_warps,
        )
        join(query, None, data.offsets, programs, call.heads, launch.least_rows)
    return query[:batch], keys, values, bias
