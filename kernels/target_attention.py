"""target_attention forward with one query per history: keys as the rows of a product, queries as its columns.

A matrix unit makes eight columns whether they are used or not: each head takes one, and short histories share a
tile, each with columns of its own. The scores of a token with the queries of other histories are masked.
"""

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
    LOWEST,
    accumulate,
    attention,
    data_of,
    finish_scores,
    heads_together,
    load_keys_values,
    products,
    spec_of,
    transposed,
    uncovered,
    value_width,
)
from .primitives import LN_2, columns, dot, exp2, scale, slab_count, slab_size
from .schedule import find_sequence, rows_per_program

__all__ = ["forward", "uncovered"]


@triton.jit
def column_owners(first, batch, SPEC: tl.constexpr):
    """Of each column: whether there is one, its history, its head within the group."""
    TOGETHER: tl.constexpr = get(SPEC, "together")
    HEADS: tl.constexpr = get(SPEC, "heads_together")
    column = tl.arange(0, get(SPEC, "columns"))
    owner = first + column // HEADS
    return (column < TOGETHER * HEADS) & (owner < batch), owner, column % HEADS


@triton.jit
def load_columns(pointer, stride, owners, group, DIM: tl.constexpr, SPEC: tl.constexpr):
    """Rows of the histories, one per column and zero but in its head: slabs `[columns, size]`."""
    live, owner, head = owners
    WIDTH: tl.constexpr = get(SPEC, "heads_together") * DIM
    pointer += group * WIDTH
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, get(SPEC, "dim_slab"))):
        place = columns(i, WIDTH, get(SPEC, "dim_slab"))
        mask = live[:, None] & (place[None, :] // DIM == head[:, None])
        row = owner.to(tl.int64)[:, None] * stride
        slabs = slabs + (tl.load(pointer + row + place[None, :], mask=mask, other=0.0),)
    return slabs


@triton.jit
def store_columns(pointer, stride, slabs, row, mask, head, group, DIM: tl.constexpr, SPEC: tl.constexpr):
    """The inverse of load_columns, of slabs `[size, columns]`."""
    WIDTH: tl.constexpr = get(SPEC, "heads_together") * DIM
    pointer += group * WIDTH
    for i in tl.static_range(slab_count(WIDTH, get(SPEC, "dim_slab"))):
        place = columns(i, WIDTH, get(SPEC, "dim_slab"))
        inside = mask[:, None] & (place[None, :] // DIM == head[:, None])
        tl.store(pointer + row[:, None] * stride + place[None, :], tl.trans(slabs[i]), mask=inside)


@triton.jit
def zero_columns(WIDTH: tl.constexpr, SPEC: tl.constexpr):
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, get(SPEC, "dim_slab"))):
        slabs = slabs + (
            tl.zeros([slab_size(i, WIDTH, get(SPEC, "dim_slab")), get(SPEC, "columns")], tl.float32),
        )
    return slabs


@triton.jit
def column_scores(data, k, q, start, valid, head, group, SPEC: tl.constexpr, FULL: tl.constexpr):
    """Scores `[tokens, columns]`."""
    BIAS_HEADS: tl.constexpr = get(SPEC, "bias_heads")
    token = tl.arange(0, valid.shape[0])
    s = products(k, q, tl.zeros([valid.shape[0], get(SPEC, "columns")], tl.float32), get(SPEC, "precision"))
    if BIAS_HEADS > 1:
        place = data.bias + start * BIAS_HEADS + group * get(SPEC, "heads_together")
        bias = tl.load(place + token[:, None] * BIAS_HEADS + head[None, :], mask=valid[:, None], other=0.0)
    elif BIAS_HEADS == 1:
        if FULL:
            bias = tl.load(data.bias + start + token)[:, None]
        else:
            bias = tl.load(data.bias + start + token, mask=valid, other=0.0)[:, None]
    else:
        bias = 0.0
    return finish_scores(s, data.scale, bias, SPEC)


@triton.jit
def meets(step, valid, bounds, SPEC: tl.constexpr):
    """Which tokens are of the history of which column, `[tokens, columns]`; step and bounds count from one token."""
    if get(SPEC, "together") > 1:
        row = step + tl.arange(0, valid.shape[0])
        return (row[:, None] >= bounds[0][None, :]) & (row[:, None] < bounds[1][None, :])
    else:
        return valid[:, None]


@triton.jit
def _attend(data, origin, step, valid, q, bounds, head, group, state, SPEC: tl.constexpr, FULL: tl.constexpr):
    """Adds the tokens from `origin + step` on to the state: maxima, sums of exponentials, weighted values."""
    PRECISION: tl.constexpr = get(SPEC, "precision")
    peak, mass, acc = state
    start = origin + step
    k, v = load_keys_values(data, start, valid, group, SPEC, FULL)
    s = column_scores(data, k, q, start, valid, head, group, SPEC, FULL)
    met = meets(step, valid, bounds, SPEC)
    if get(SPEC, "normalize") == "softmax":
        if not FULL:
            s = tl.where(met, s, float("-inf"))
        top = tl.max(s, 0)
        # Rescaling waits until a maximum has grown 2^8 times: as exact, and rare.
        if tl.max(top - peak, 0) > 8:
            higher = tl.maximum(peak, top)
            factor = exp2(peak - higher, get(SPEC, "approx"))[None, :]
            peak = higher
            mass *= factor
            acc = scale(acc, factor)
        p = exp2(s - peak[None, :], get(SPEC, "approx"))
        if PRECISION != "tf32":
            mass += tl.sum(p, 0)[None, :]
        else:
            # Rows of ones make the sum in the matrix unit, of what the values are weighted with.
            p = p.to(v[0].dtype)
            ones = tl.full([16, valid.shape[0]], 1.0, tl.float32).to(p.dtype)
            mass = dot(ones, p, mass, PRECISION)
        acc = accumulate(v, p, acc, PRECISION)
    else:
        p = attention(s, met, (0.0, 1.0), SPEC, not FULL)
        acc = accumulate(v, p.to(v[0].dtype), acc, PRECISION)
    return peak, mass, acc


@triton.jit
def _forward_kernel(data, out, peak_mass, SPEC: tl.constexpr):
    """Rows of `out [B + 2·programs, H·dv]` and `peak_mass` from B on are for the parts of histories that are cut."""
    BLOCK: tl.constexpr = get(SPEC, "block")
    TAIL: tl.constexpr = get(SPEC, "tail")
    TOGETHER: tl.constexpr = get(SPEC, "together")
    HEADS: tl.constexpr = get(SPEC, "heads")
    program = tl.program_id(0)
    group = tl.program_id(1)
    total = tl.load(data.offsets + data.batch)
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
        q = transposed(load_columns(data.query, data.query_stride, owners, group, get(SPEC, "dim"), SPEC))
        state = (
            tl.full([get(SPEC, "columns")], LOWEST, tl.float32),
            tl.zeros([16 if get(SPEC, "precision") == "tf32" else 1, get(SPEC, "columns")], tl.float32),
            zero_columns(value_width(SPEC), SPEC),
        )
        length = (stop - begin).to(tl.int32)
        if TOGETHER == 1:
            full = length // BLOCK * BLOCK
            every = tl.full([BLOCK], 1, tl.int1)
            for step in tl.range(0, full, BLOCK, num_stages=get(SPEC, "stages")):
                state = _attend(data, origin, step, every, q, bounds, head, group, state, SPEC, True)
            for step in tl.range(full, length, TAIL, num_stages=1):
                valid = tl.arange(0, TAIL) < length - step
                state = _attend(data, origin, step, valid, q, bounds, head, group, state, SPEC, False)
        else:
            for step in tl.range(0, length, BLOCK, num_stages=get(SPEC, "stages")):
                valid = tl.arange(0, BLOCK) < length - step
                state = _attend(data, origin, step, valid, q, bounds, head, group, state, SPEC, False)
        peak, mass, acc = state
        seen = live & (tl.minimum(last_row, stop) > tl.maximum(first_row, begin))
        whole = (first_row >= begin) & (last_row <= stop)
        slot = data.batch + 2 * program + (first_row >= begin).to(tl.int32)
        row = tl.where(whole, owner, slot).to(tl.int64)
        if get(SPEC, "normalize") == "softmax":
            norm = tl.max(mass, 0)
            place = peak_mass + 2 * (row * HEADS + group * get(SPEC, "heads_together") + head)
            tl.store(place, peak, mask=seen)
            tl.store(place + 1, norm, mask=seen)
            acc = scale(
                acc, (1 / tl.where(norm > 0, norm, 1.0))[None, :]
            )  # zero where a bias of -inf hides all
        store_columns(
            out, HEADS * get(SPEC, "value_dim"), acc, row, seen, head, group, get(SPEC, "value_dim"), SPEC
        )
        begin = stop
        first += TOGETHER


@triton.jit
def _join_kernel(
    out,
    peak_mass,
    offsets,
    batch,
    programs,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LEAST_ROWS: tl.constexpr,
):
    """One program per head and boundary between two programs. It works if the history that the boundary cuts began
    in the program before, so that each cut history is joined once, its parts in order."""
    program = tl.program_id(0) + 1
    head = tl.program_id(1)
    total = tl.load(offsets + batch)
    share = rows_per_program(total, programs, LEAST_ROWS)
    boundary = program.to(tl.int64) * share
    if boundary >= total:
        return
    sequence = find_sequence(offsets, batch, boundary)
    first_row = tl.load(offsets + sequence)
    last_row = tl.load(offsets + sequence + 1)
    if (first_row == boundary) | (first_row < boundary - share):
        return
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    row = (batch + 2 * program - 1).to(tl.int64) * HEADS + head
    acc = tl.load(out + row * DIM + column, mask=inside, other=0.0)
    if SOFTMAX:
        peak = tl.load(peak_mass + 2 * row)
        mass = tl.load(peak_mass + 2 * row + 1)
        acc *= mass
    while boundary < last_row:
        row = (batch + 2 * program).to(tl.int64) * HEADS + head
        term = tl.load(out + row * DIM + column, mask=inside, other=0.0)
        if SOFTMAX:
            term_peak = tl.load(peak_mass + 2 * row)
            higher = tl.maximum(peak, term_peak)
            factor = tl.exp2(peak - higher)
            term_mass = tl.load(peak_mass + 2 * row + 1) * tl.exp2(term_peak - higher)
            mass = mass * factor + term_mass
            acc = acc * factor + term * term_mass
            peak = higher
        else:
            acc += term
        program += 1
        boundary += share
    row = sequence.to(tl.int64) * HEADS + head
    if SOFTMAX:
        acc /= tl.where(mass > 0, mass, 1.0)
        tl.store(peak_mass + 2 * row, peak)
        tl.store(peak_mass + 2 * row + 1, mass)
    tl.store(out + row * DIM + column, acc, mask=inside)


def join(
    out: Tensor, peak_mass: Tensor | None, offsets: Tensor, programs: int, heads: int, least_rows: int
) -> None:
    """Joins the parts of cut histories, in the last 2·programs rows of `out [B + 2·programs, H·d]`, into their rows:
    sums, or with each part's maximum and sum the softmax's average, maximum and sum."""
    if programs == 1:
        return
    dim = out.shape[1] // heads
    _join_kernel[(programs - 1, heads)](
        out,
        out if peak_mass is None else peak_mass,
        offsets,
        offsets.numel() - 1,
        programs,
        HEADS=heads,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        SOFTMAX=peak_mass is not None,
        LEAST_ROWS=least_rows,
        num_warps=1,
    )


def kernel_of(call: Any) -> settings.Kernel:
    """The kernel that forward launches for a call that is covered."""
    if call.query_offsets is not None:
        return settings.Kernel("candidates", "queries share histories")
    if call.total < settings.SHORT * (call.offsets.numel() - 1):
        return settings.Kernel(
            "packed", f"histories of less than {settings.SHORT} items on average share a tile"
        )
    return settings.Kernel("classic", "one query per history")


def forward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`out [N, H·dv]`, the log-sum-exp of the scores `[N, H]` if wanted, and of the softmax the maximum in base 2 and
    the sum `[N, H, 2]`; in float32, of a `recattn.composite.target_attention.Call`."""
    kernel = kernel_of(call).name
    out, peak_mass = (candidate_attention.forward if kernel == "candidates" else _forward)(call)
    if not call.return_lse:
        return out, out.new_empty(0), peak_mass
    peak, mass = peak_mass.unbind(2)
    return out, mass.log2().add_(peak).mul_(LN_2.value), peak_mass


def _forward(call: Any) -> tuple[Tensor, Tensor]:
    precision = settings.precision(call.keys.dtype)
    batch, total = call.offsets.numel() - 1, call.total
    width = max(call.keys.shape[1], call.values.shape[1]) // call.heads
    heads = heads_together(call, settings.QUERY_FORWARD_WIDEST[precision], 8)
    launch = settings.query_forward(precision, heads * width)
    data = data_of(call)
    programs = launch.programs(total, call.keys.device)
    spec = spec_of(
        call,
        data,
        launch,
        heads,
        least_rows=launch.least_rows,
        columns=8,
        together=8 // heads if kernel_of(call).name == "packed" else 1,
    )
    out = torch.zeros(
        batch + 2 * programs, call.values.shape[1], dtype=torch.float32, device=call.keys.device
    )
    peak_mass = out.new_zeros(batch + 2 * programs, call.heads, 2)
    if batch and total:
        _forward_kernel[(programs, call.heads // heads)](
            data, out, peak_mass, SPEC=spec, num_warps=launch.num_warps, **settings.all_registers()
        )
        join(
            out,
            peak_mass if spec.normalize == "softmax" else None,
            data.offsets,
            programs,
            call.heads,
            launch.least_rows,
        )
    return out[:batch], peak_mass[:batch]
