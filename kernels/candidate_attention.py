"""target_attention where candidates share a history: each program brings the keys to a block of them.

Forward has a program per block of candidates and head; blocks are counted on the device, and the host knows only how
many there can be. Backward has a program per history and head. It takes one block after the other past all keys, and
keeps the block's gradient on chip. That of the keys is written once if there is one block; otherwise blocks add to what
those before have left, in memory that no other program touches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import target_attention_settings as settings
from .arguments import get
from .dot_product import (
    LOWEST,
    Upstream,
    attention,
    attention_backward,
    bias_factor,
    data_of,
    finish_scores,
    load_keys_values,
    load_softmax,
    load_tile,
    outer,
    products,
    spec_of,
    store_tile,
    transposed,
    zero_flat,
)
from .primitives import dot, exp2, scale, zero_rows
from .schedule import find_sequence


class Groups(NamedTuple):
    queries: Tensor  # [B + 1], the candidates of each history
    blocks: Tensor  # [B + 1], where the blocks of each begin


@triton.jit
def load_bias(data, start, valid, head, SPEC: tl.constexpr, FULL: tl.constexpr):
    """Of the tokens from `start` on, `[tokens]`."""
    STRIDE: tl.constexpr = get(SPEC, "bias_heads")
    if STRIDE:
        place = data.bias + (start + tl.arange(0, valid.shape[0])) * STRIDE + (head if STRIDE > 1 else 0)
        if FULL:
            return tl.load(place)
        else:
            return tl.load(place, mask=valid, other=0.0)
    else:
        return tl.zeros(valid.shape, tl.float32)


# ------------------------------------------------------------------------------------------------ forward


@triton.jit
def weigh(p, rows, acc, PRECISION: tl.constexpr):
    """`acc + p rows`, slabs `[candidates, size]`."""
    out = ()
    for i in tl.static_range(len(rows)):
        out = out + (dot(p.to(rows[i].dtype), rows[i], acc[i], PRECISION),)
    return out


@triton.jit
def _attend(data, start, valid, q, head, state, SPEC: tl.constexpr, FULL: tl.constexpr):
    """Adds the tokens from `start` on to the state: maxima, sums of exponentials, weighted values."""
    PRECISION: tl.constexpr = get(SPEC, "precision")
    peak, mass, acc = state
    k, v = load_keys_values(data, start, valid, head, SPEC, FULL)
    s = tl.zeros([get(SPEC, "columns"), valid.shape[0]], tl.float32)
    s = products(q, transposed(k), s, PRECISION)  # [candidates, tokens]
    s = finish_scores(s, data.scale, load_bias(data, start, valid, head, SPEC, FULL)[None, :], SPEC)
    if get(SPEC, "normalize") == "softmax":
        if not FULL:
            s = tl.where(valid[None, :], s, float("-inf"))
        top = tl.max(s, 1)
        # Rescaling waits until a maximum has grown 2^8 times: as exact, and rare.
        if tl.max(top - peak, 0) > 8:
            higher = tl.maximum(peak, top)
            factor = exp2(peak - higher, get(SPEC, "approx"))
            peak = higher
            mass *= factor
            acc = scale(acc, factor[:, None])
        p = exp2(s - peak[:, None], get(SPEC, "approx"))
        return peak, mass + tl.sum(p, 1), weigh(p, v, acc, PRECISION)
    else:
        p = attention(s, valid[None, :], (0.0, 1.0), SPEC, not FULL)
        return peak, mass, weigh(p, v, acc, PRECISION)


@triton.jit
def _candidates_forward_kernel(data, groups, out, peak_mass, count, SPEC: tl.constexpr):
    """The third axis of programs shares the keys of a history: each writes one of `out [splits, N, H·dv]`."""
    ROWS: tl.constexpr = get(SPEC, "columns")
    BLOCK: tl.constexpr = get(SPEC, "block")
    TAIL: tl.constexpr = get(SPEC, "tail")
    HEADS: tl.constexpr = get(SPEC, "heads")
    DIM: tl.constexpr = get(SPEC, "dim")
    VALUE_DIM: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    block = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if block >= tl.load(groups.blocks + data.batch):
        return
    history = find_sequence(groups.blocks, data.batch, block)
    candidate = tl.load(groups.queries + history) + (block - tl.load(groups.blocks + history)) * ROWS
    rest = tl.load(groups.queries + history + 1) - candidate
    row = tl.arange(0, ROWS)
    alive = row < rest
    candidate = candidate.to(tl.int64)
    query = data.query + candidate * data.query_stride + head * DIM
    q = load_tile(query, row, alive, data.query_stride, DIM, SLAB, False)
    first_row = tl.load(data.offsets + history).to(tl.int64)
    length = (tl.load(data.offsets + history + 1) - first_row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), BLOCK) * BLOCK
    begin = tl.minimum(split * share, length)
    end = tl.minimum(begin + share, length)
    full = begin + (end - begin) // BLOCK * BLOCK
    state = (
        tl.full([ROWS], LOWEST, tl.float32),
        tl.zeros([ROWS], tl.float32),
        zero_rows(ROWS, VALUE_DIM, SLAB),
    )
    every = tl.full([BLOCK], 1, tl.int1)
    for step in tl.range(begin, full, BLOCK, num_stages=get(SPEC, "stages")):
        state = _attend(data, first_row + step, every, q, head, state, SPEC, True)
    for step in tl.range(full, end, TAIL, num_stages=1):
        valid = tl.arange(0, TAIL) < end - step
        state = _attend(data, first_row + step, valid, q, head, state, SPEC, False)
    peak, mass, acc = state
    candidate += split.to(tl.int64) * count
    if get(SPEC, "normalize") == "softmax":
        place = peak_mass + 2 * (candidate * HEADS + head)
        tl.store(place + 2 * row * HEADS, peak, mask=alive)
        tl.store(place + 2 * row * HEADS + 1, mass, mask=alive)
        mass = tl.where(mass > 0, mass, 1.0)  # unless there is no key, or a bias of -inf hides all
        acc = scale(acc, (1 / mass)[:, None])
    place = out + candidate * (HEADS * VALUE_DIM) + head * VALUE_DIM
    store_tile(place, acc, row, alive, HEADS * VALUE_DIM, VALUE_DIM, SLAB, False)


def forward(call: Any) -> tuple[Tensor, Tensor]:
    """`out [N, H·dv]`, and of the softmax maximum in base 2 and sum `[N, H, 2]`, in float32."""
    data, batch, count = data_of(call), call.offsets.numel() - 1, call.query.shape[0]
    launch = settings.candidates_forward(*_shape(call))
    blocks, most = _blocks(call, launch.candidates)
    splits = launch.splits(most * call.heads, call.total // max(batch, 1), call.keys.device)
    shape = (splits, count) if splits > 1 else (count,)
    out = torch.zeros(*shape, call.values.shape[1], dtype=torch.float32, device=call.keys.device)
    peak_mass = out.new_zeros(*shape, call.heads, 2)
    if batch and count and call.total:
        spec = spec_of(call, data, launch, 1, columns=launch.candidates)
        _candidates_forward_kernel[(most, call.heads, splits)](
            data, blocks, out, peak_mass, count, SPEC=spec, num_warps=launch.num_warps
        )
    return _joined(out, peak_mass, call) if splits > 1 else (out, peak_mass)


def _joined(out: Tensor, peak_mass: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    """Of parts `[splits, N, *]`."""
    if call.normalize != "softmax":
        return out.sum(0), peak_mass[0]
    peaks, masses = peak_mass.unbind(3)
    peak = peaks.amax(0)
    masses = masses * torch.exp2(peaks - peak)
    mass = masses.sum(0)
    share = masses / mass.masked_fill(mass == 0, 1)
    out = (out.unflatten(2, (call.heads, -1)) * share.unsqueeze(3)).sum(0).flatten(1)
    return out, torch.stack((peak, mass), 2)


def _shape(call: Any) -> tuple[str, int, float]:
    """By which settings are chosen: precision, width of a head, mean number of candidates."""
    dim = max(call.keys.shape[1], call.values.shape[1]) // call.heads
    return settings.precision(call.keys.dtype), dim, call.query.shape[0] / max(call.offsets.numel() - 1, 1)


def _blocks(call: Any, size: int) -> tuple[Groups, int]:
    """Blocks of `size` candidates, and how many there can be."""
    queries = call.query_offsets.contiguous()
    blocks = torch.zeros_like(queries)
    torch.cumsum(
        (queries.diff() + (size - 1)).div_(size, rounding_mode="floor"),
        0,
        dtype=queries.dtype,
        out=blocks[1:],
    )
    return Groups(queries, blocks), call.query.shape[0] // size + min(
        call.query.shape[0], queries.numel() - 1
    )


# ------------------------------------------------------------------------------------------------ backward


@triton.jit
def load_candidates(data, upstream, candidate, rest, head, SPEC: tl.constexpr):
    """Queries, dL/dout, softmax and delta of a block; zeros that add nothing where there are fewer."""
    ROWS: tl.constexpr = get(SPEC, "columns")
    HEADS: tl.constexpr = get(SPEC, "heads")
    DIM: tl.constexpr = get(SPEC, "dim")
    VALUE_DIM: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    row = tl.arange(0, ROWS)
    alive = row < rest
    query = data.query + candidate * data.query_stride + head * DIM
    grad_out = upstream.grad_out + candidate * (HEADS * VALUE_DIM) + head * VALUE_DIM
    place = candidate * HEADS + head
    shift, part = load_softmax(upstream.peak_mass, place + row * HEADS, alive, SPEC)
    delta = tl.load(upstream.delta + place + row * HEADS, mask=alive, other=0.0)
    return (
        load_tile(query, row, alive, data.query_stride, DIM, SLAB, False),
        load_tile(grad_out, row, alive, HEADS * VALUE_DIM, VALUE_DIM, SLAB, False),
        (shift[None, :], part[None, :]),
        (delta * bias_factor(data.scale, SPEC))[None, :],
    )


@triton.jit
def write(out, part, slabs, start, valid, head, first, last, DIM: tl.constexpr, SPEC: tl.constexpr):
    """A block's share of the gradients of a tile of tokens: the last adds what those before have left in `part`."""
    WIDTH: tl.constexpr = get(SPEC, "heads") * DIM
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    row = tl.arange(0, valid.shape[0])
    place = start * WIDTH + head * DIM
    if first == 0:
        slabs = added(slabs, load_tile(part + place, row, valid, WIDTH, DIM, SLAB, False))
    if last:
        store_tile(out + place, slabs, row, valid, WIDTH, DIM, SLAB, False)
    else:
        store_tile(part + place, slabs, row, valid, WIDTH, DIM, SLAB, False)


@triton.jit
def added(left, right):
    out = ()
    for i in tl.static_range(len(left)):
        out = out + (left[i] + right[i],)
    return out


@triton.jit
def _attend_backward(data, block, grads, start, valid, head, first, last, acc, SPEC: tl.constexpr):
    """Adds a block's share to the gradients of the tokens from `start` on, and theirs to the block's own, `acc`."""
    PRECISION: tl.constexpr = get(SPEC, "precision")
    HEADS: tl.constexpr = get(SPEC, "heads")
    q, g, softmax, delta = block
    grad_key, grad_value, part_key, part_value, grad_bias = grads
    k, v = load_keys_values(data, start, valid, head, SPEC, False)
    bias = load_bias(data, start, valid, head, SPEC, False)[:, None]
    zero = tl.zeros([valid.shape[0], get(SPEC, "columns")], tl.float32)
    s = finish_scores(products(k, transposed(q), zero, PRECISION), data.scale, bias, SPEC)
    a = attention(s, valid[:, None], softmax, SPEC, True)  # [tokens, candidates]
    grad = products(v, transposed(g), zero, PRECISION)
    grad = attention_backward(grad, a, valid[:, None], bias_factor(data.scale, SPEC), delta, SPEC, True)
    start += tl.program_id(2).to(tl.int64) * data.total
    write(
        grad_value,
        part_value,
        outer(a, g, PRECISION),
        start,
        valid,
        head,
        first,
        last,
        get(SPEC, "value_dim"),
        SPEC,
    )
    if get(SPEC, "bias_heads"):
        place = grad_bias + (start + tl.arange(0, valid.shape[0])) * HEADS + head
        tl.store(place, tl.sum(grad, 1) + tl.load(place, mask=valid & (first == 0), other=0.0), mask=valid)
        grad *= data.scale
    grad = grad.to(q[0].dtype)
    write(
        grad_key,
        part_key,
        outer(grad, q, PRECISION),
        start,
        valid,
        head,
        first,
        last,
        get(SPEC, "dim"),
        SPEC,
    )
    return weigh(tl.trans(grad), k, acc, PRECISION)


@triton.jit
def _candidates_backward_kernel(data, groups, upstream, grad_query, grads, SPEC: tl.constexpr):
    """The third axis of programs shares the candidates of a history: each writes one of `grad_key [splits, T, H·d]`."""
    ROWS: tl.constexpr = get(SPEC, "columns")
    BLOCK: tl.constexpr = get(SPEC, "block")
    HEADS: tl.constexpr = get(SPEC, "heads")
    DIM: tl.constexpr = get(SPEC, "dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    history = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    base = split.to(tl.int64) * data.total
    if head == 0:
        begin = tl.load(data.offsets + data.batch).to(tl.int64)
        zero_rows_of(grads, base + begin, data.total - begin, history, tl.num_programs(0), SPEC)
    first_row = tl.load(data.offsets + history).to(tl.int64)
    length = (tl.load(data.offsets + history + 1) - first_row).to(tl.int32)
    candidate = tl.load(groups.queries + history)
    count = (tl.load(groups.queries + history + 1) - candidate).to(tl.int32)
    candidate = candidate.to(tl.int64)
    stride = tl.num_programs(2) * ROWS
    if (split * ROWS >= count) & (head == 0):
        zero_rows_of(grads, base + first_row, length, split * 0, 1, SPEC)
    for done in tl.range(split * ROWS, count, stride, num_stages=1):
        block = load_candidates(data, upstream, candidate + done, count - done, head, SPEC)
        first = done == split * ROWS
        last = done + stride >= count
        acc = zero_rows(ROWS, DIM, SLAB)
        for step in tl.range(0, length, BLOCK, num_stages=get(SPEC, "stages")):
            valid = tl.arange(0, BLOCK) < length - step
            acc = _attend_backward(data, block, grads, first_row + step, valid, head, first, last, acc, SPEC)
        row = tl.arange(0, ROWS)
        place = grad_query + (candidate + done) * (HEADS * DIM) + head * DIM
        store_tile(place, acc, row, row < count - done, HEADS * DIM, DIM, SLAB, False)
        # What was left in memory for the next block is read by other threads, maybe.
        tl.debug_barrier()


@triton.jit
def zero_rows_of(grads, begin, count, program, programs, SPEC: tl.constexpr):
    """Zeroes a program's share of some rows of the gradients of keys, values and bias."""
    zero_flat(grads[0], begin, count, get(SPEC, "heads") * get(SPEC, "dim"), program, programs)
    zero_flat(grads[1], begin, count, get(SPEC, "heads") * get(SPEC, "value_dim"), program, programs)
    if get(SPEC, "bias_heads"):
        zero_flat(grads[4], begin, count, get(SPEC, "heads"), program, programs)


def backward(call: Any, upstream: Upstream) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, of each token's key, value and bias, of a `recattn.composite.target_attention.Call`."""
    data, batch, count = data_of(call), call.offsets.numel() - 1, call.query.shape[0]
    precision, dim, mean = _shape(call)
    launch = settings.candidates_backward(precision, dim, mean)
    splits = launch.splits(batch * call.heads, int(mean), call.keys.device)
    query = data.query.new_zeros(count, data.query.shape[1])
    shape, dtype = ((splits, call.total), torch.float32) if splits > 1 else ((call.total,), call.keys.dtype)
    new = data.key.new_empty if batch and call.total else data.key.new_zeros
    keys = new(*shape, data.query.shape[1], dtype=dtype)
    values = new(*shape, call.values.shape[1], dtype=dtype)
    bias = None if call.bias is None else new(*shape, call.heads, dtype=torch.float32)
    # Where several blocks share a history, they add to what the ones before have left.
    parts = [keys, values]
    if dtype != torch.float32 and count > launch.candidates:
        parts = [x.new_empty(x.shape, dtype=torch.float32) for x in parts]
    if batch and call.total:
        spec = spec_of(call, data, launch, 1, columns=launch.candidates)
        groups = Groups(call.query_offsets.contiguous(), call.query_offsets)
        grads = (keys, values, *parts, keys if bias is None else bias)
        _candidates_backward_kernel[(batch, call.heads, splits)](
            data, groups, upstream, query, grads, SPEC=spec, num_warps=launch.num_warps
        )
    if splits > 1:
        keys, values = keys.sum(0), values.sum(0)
        bias = None if bias is None else bias.sum(0)
    return query, keys, values, bias
