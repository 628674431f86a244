"""activation_unit backward where the MLP is wide: chunk by chunk of positions.

Weights are too many to sum their gradients in a program, so dL/dz of a chunk's tokens is stored, in the dtype of the
products, and matrix products over the chunk do the rest. A chunk keeps all multiprocessors busy once, however many
positions there are. Per chunk

1. `recompute_kernel` runs the network again, tile by tile, and back to dL/dz1;
2. products of PyTorch give the sums for all weights, and dL/dk and dL/d(q*k) through the first layer;
3. `histories_kernel` makes dL/dk and dL/dv of them, and sums over each history for dL/dq and dL/dc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .activation_unit_wide import owners
from .arguments import Chunk, Spec, TileSums, get, width
from .backward import Call, WeightSums
from .dropout import noise_of
from .histories import load_tile, part_at, store_tile
from .pooling import pooled
from .primitives import load_rows, load_vector, store_row, store_rows, zero_rows
from .schedule import find_sequence, merge, slot_of
from .wide import load_pairs, owners_of, rows_of
from .wide_backward import FROM_UNITS, attend_rows_backward, attention_gradient, run_back, run_forward


@triton.jit(do_not_specialize=["batch", "count"])
def recompute_kernel(data, batch, owners, net, upstream, chunk, sums, count, SPEC: tl.constexpr):
    """The rows of a chunk, and the sums of its tiles. Slack, too, has rows, of zeros."""
    D: tl.constexpr = get(SPEC, "dim")
    BLOCK: tl.constexpr = get(SPEC, "block")
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # 32 bits reach across a chunk
    position = chunk.first + row.to(tl.int64)
    inside = position < count
    owner, valid = owners_of(owners, batch, position, count)
    place = rows_of(data, position, valid, SPEC)
    pairs = load_pairs(data, owner, place, valid, SPEC)
    store_rows(chunk.pairs, pairs[0], row, 2 * D, inside, D, get(SPEC, "dim_slab"))
    store_rows(chunk.pairs + D, pairs[1], row, 2 * D, inside, D, get(SPEC, "dim_slab"))
    grad = attention_gradient(data, upstream, owner, place, position, valid, SPEC)
    noise = noise_of(net, position, SPEC)
    s, zs, hs = run_forward(pairs, owner, noise, net, chunk, row, valid, inside, SPEC)
    a, ds = attend_rows_backward(s, grad, upstream, owner, valid, SPEC)
    tl.store(chunk.attention + row, a, mask=inside)
    tile = (chunk.first + tl.program_id(0).to(tl.int64) * BLOCK) // BLOCK
    run_back(ds, zs, hs, noise, net, upstream.back, chunk, sums, tile, row, inside, SPEC)


@triton.jit(do_not_specialize=["batch"])
def histories_kernel(
    data, batch, upstream, chunk, grad_pairs, grad_key, grad_value, grad_first, part, SPEC: tl.constexpr
):
    """dL/dk and dL/dv of a chunk's positions; dL/dq but for its way through c, and dL/dc, per sequence, side by side
    in `grad_first [B, D + H1]`. Programs count along all chunks."""
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    H1: tl.constexpr = width(0, SPEC)
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    H1_SLAB: tl.constexpr = get(SPEC, "slab")
    BLOCK: tl.constexpr = get(SPEC, "block")
    SHARE: tl.constexpr = get(SPEC, "least_rows")
    program = chunk.first // SHARE + tl.program_id(0)
    total = tl.load(data.offsets + batch)
    begin = tl.minimum(program.to(tl.int64) * SHARE, total).to(total.dtype)
    end = tl.minimum(begin + SHARE, total)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, batch, begin)
    token = tl.arange(0, BLOCK)
    while begin < end:
        sequence, first_row, last_row, stop = part_at(data, batch, sequence, begin, end)
        owner = sequence.to(tl.int64)
        q = load_vector(data.query + owner * get(SPEC, "query_stride"), D, SLAB)
        if not get(SPEC, "statistics"):
            grad_out = load_vector(upstream.grad_out + owner * DV, DV, SLAB)
        position = begin.to(tl.int64)
        sum_q = zero_rows(BLOCK, D, SLAB)
        sum_c = zero_rows(BLOCK, H1, H1_SLAB)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            valid = token < (stop - start)
            row = position - chunk.first + token
            k, _v = load_tile(data, position, valid, SPEC)
            by_key = load_rows(grad_pairs, row, 2 * D, valid, D, SLAB)
            by_product = load_rows(grad_pairs + D, row, 2 * D, valid, D, SLAB)
            dk = ()
            grad_q = ()
            for i in tl.static_range(len(q)):
                through = by_product[i].to(tl.float32)
                dk = dk + (by_key[i].to(tl.float32) + q[i].to(tl.float32)[None, :] * through,)
                grad_q = grad_q + (sum_q[i] + k[i].to(tl.float32) * through,)
            sum_q = grad_q
            if not get(SPEC, "statistics"):
                dv = outer(tl.load(chunk.attention + row, mask=valid, other=0.0), grad_out)
                if get(SPEC, "separate_values"):
                    store_tile(grad_value, dv, data, position, valid, DV, SPEC)
                else:
                    dk = add(dk, dv)
            store_tile(grad_key, dk, data, position, valid, D, SPEC)
            sum_c = add(sum_c, load_rows(chunk.grads[0], row, H1, valid, H1, H1_SLAB))
            position += BLOCK
        slot = slot_of(program, begin, stop, first_row, last_row)
        target = grad_first + owner * (D + H1)
        if slot >= 0:
            target = part + slot.to(tl.int64) * (D + H1)
        store_row(target, pooled(sum_q, True), D, SLAB)
        store_row(target + D, pooled(sum_c, True), H1, H1_SLAB)
        begin = stop
        sequence += 1


@triton.jit
def outer(a, row):
    """`[tokens, *]`, of each token its multiple of a row."""
    out = ()
    for i in tl.static_range(len(row)):
        out = out + (a[:, None] * row[i].to(tl.float32)[None, :],)
    return out


@triton.jit
def add(x, y):
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] + y[i].to(tl.float32),)
    return out


def wide_backward(call: Call) -> WeightSums:
    """Where weights are too many for a program."""
    data, net, upstream, count = call.data, call.net, call.upstream, call.unit.positions
    batch, dim, (first, *later) = call.unit.query.shape[0], data.key.shape[1], net.hidden
    twice = net.form.kernel not in FROM_UNITS  # units, and what went into their activation
    launch = settings.wide(settings.WIDE_BACKWARD, net.precision, dim, net.hidden, data.key.device, twice)
    launch, light = call.tuned("wide tokens", net.precision, launch), settings.WIDE_HISTORIES
    spec = call.spec(launch, settings.wide_products(net.precision))
    step = settings.chunk_rows(launch, light, data.key.device)
    programs = max(triton.cdiv(count, light.least_rows), 1)
    zeros = upstream.peak_mass.new_zeros  # float32
    chunk = _new_chunk(data.key, min(step, count), net.hidden, dim)
    sums = _new_sums(upstream.peak_mass, triton.cdiv(count, launch.block), net.hidden, spec)
    both = torch.cat([net.network.key, net.network.product], 1)  # [H1, 2·D]
    grad_both, grad_pairs = zeros(first, 2 * dim), torch.empty_like(chunk.pairs)
    grad_weights = [zeros(n, m) for m, n in zip(net.hidden, later, strict=False)]
    grad_biases = [zeros(n) for n in later]
    part = zeros(2 * programs, dim + first)
    sequence = owners(data.offsets, count)
    for begin in range(0, count, step):
        rows = min(step, count - begin)
        chunk = chunk._replace(first=begin)
        recompute_kernel[(triton.cdiv(rows, launch.block),)](
            data,
            batch,
            sequence,
            net.network,
            upstream,
            chunk,
            sums,
            count,
            SPEC=spec,
            num_warps=launch.num_warps,
        )
        grads = [grad[:rows] for grad in chunk.grads]
        torch.mm(grads[0], both, out=grad_pairs[:rows])
        grad_both += grads[0].t() @ chunk.pairs[:rows]
        for weight, bias, units, grad in zip(grad_weights, grad_biases, chunk.units, grads[1:], strict=True):
            weight += grad.t() @ units[:rows]
            bias += grad.sum(0, dtype=torch.float32)
        histories_kernel[(triton.cdiv(rows, light.least_rows),)](
            data,
            batch,
            upstream,
            chunk,
            grad_pairs,
            call.grad_key,
            call.grad_key if call.grad_value is None else call.grad_value,
            call.grad_first,
            part,
            SPEC=_light_spec(spec, light),
            num_warps=light.num_warps,
        )
    merge(part, None, data.offsets, call.grad_first, upstream.peak_mass, programs, light.least_rows)
    return WeightSums(
        grad_both[:, :dim],
        grad_both[:, dim:],
        grad_weights,
        grad_biases,
        [param.sum(0) for param in sums.params],
        sums.last_weight.sum(0),
        sums.last_bias.sum(0, keepdim=True),
    )


def _new_chunk(like: Tensor, rows: int, hidden: Sequence[int], dim: int) -> Chunk:
    return Chunk(
        first=0,
        pairs=like.new_empty(rows, 2 * dim),
        units=tuple(like.new_empty(rows, n) for n in hidden[:-1]),
        grads=tuple(like.new_empty(rows, n) for n in hidden),
        attention=like.new_empty(rows, dtype=torch.float32),
    )


def _new_sums(like: Tensor, tiles: int, hidden: Sequence[int], spec: Spec) -> TileSums:
    with_params = [n for n in hidden[: spec.param_layers] for _ in range(spec.params_each)]
    return TileSums(
        last_weight=like.new_empty(tiles if spec.last_layer else 0, hidden[-1]),
        last_bias=like.new_empty(tiles),
        params=tuple(like.new_empty(tiles, n) for n in with_params),
    )


def _light_spec(spec: Spec, light: settings.Launch) -> Spec:
    return replace(
        spec,
        block=light.block,
        slab=light.slab,
        dim_slab=light.dim_slab,
        least_rows=light.least_rows,
        stages=light.num_stages,
    )
