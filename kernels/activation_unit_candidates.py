"""activation_unit forward for candidates: several of one history share each tile of its keys.

The schedule's sequences are groups of up to COUNT candidates here, its rows positions of their history. A row of the
tile that pools belongs to a candidate.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .arguments import Histories, Network, Spec, get
from .dropout import noise_of
from .histories import load_tile, part_at, share_of
from .mlp import hidden_zero
from .mlp_backward import with_fresh_vectors
from .pooling import weigh
from .primitives import columns, dot, exp2, load_vector, slab_count, vector_max, vector_sum, zero_rows
from .schedule import find_sequence, merge, slot_of
from .streamed import first_layer, load_layers, score_tokens

ROWS = tl.constexpr(16)  # of the tile that pools


@triton.jit
def in_rows(vectors):
    """Vectors `[n]` as the first rows of `[ROWS, n]`, zeros behind them."""
    row = tl.arange(0, ROWS)[:, None]
    tile = tl.zeros([ROWS, vectors[0].shape[0]], tl.float32)
    for c in tl.static_range(len(vectors)):
        tile = tl.where(row == c, vectors[c][None, :], tile)
    return tile  # [ROWS, n]


@triton.jit
def in_column(numbers):
    """Numbers as the first of a column `[ROWS, 1]`, ones behind them."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.full([ROWS, 1], 1.0, tl.float32)
    for c in tl.static_range(len(numbers)):
        column = tl.where(row == c, numbers[c], column)
    return column


@triton.jit
def scale_rows(slabs, numbers):
    column = in_column(numbers)
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (slabs[i] * column,)
    return out


@triton.jit
def raise_peaks(tops, peaks, masses, acc, APPROX: tl.constexpr):
    """The softmax's state with the maxima raised to those of a tile."""
    factors = ()
    raised = ()
    scaled = ()
    for c in tl.static_range(len(tops)):
        higher = tl.maximum(tops[c], peaks[c])
        factor = exp2(peaks[c] - higher, APPROX)
        factors = factors + (factor,)
        raised = raised + (higher,)
        scaled = scaled + (masses[c] * factor,)
    return raised, scaled, scale_rows(acc, factors)


@triton.jit
def add_weights(masses, weights):
    out = ()
    for c in tl.static_range(len(masses)):
        out = out + (masses[c] + weights[c],)
    return out


@triton.jit
def store_candidates(pointer, stride, slabs, count, SPEC: tl.constexpr):
    """The first `count` rows of slabs, `stride` elements apart."""
    DV: tl.constexpr = get(SPEC, "value_dim")
    row = tl.arange(0, ROWS)[:, None]
    for i in tl.static_range(slab_count(DV, get(SPEC, "dim_slab"))):
        column = columns(i, DV, get(SPEC, "dim_slab"))[None, :]
        tl.store(pointer + row * stride + column, slabs[i], mask=(row < count) & (column < DV))


@triton.jit(do_not_specialize=["batch"])
def candidates_kernel(
    data, groups, batch, net, out, peak_mass, part, part_state, COUNT: tl.constexpr, SPEC: tl.constexpr
):
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    BLOCK: tl.constexpr = get(SPEC, "block")
    SOFTMAX: tl.constexpr = get(SPEC, "softmax")
    APPROX: tl.constexpr = get(SPEC, "approx")
    program = tl.program_id(0)
    begin, end = share_of(program, groups, batch, SPEC)
    if begin >= end:
        return
    group = find_sequence(groups.offsets, batch, begin)
    layers, _params, last = load_layers(net, SPEC)
    token = tl.arange(0, BLOCK)
    while begin < end:
        group, first_row, last_row, stop = part_at(groups, batch, group, begin, end)
        slot = slot_of(program, begin, stop, first_row, last_row)
        query = tl.load(groups.query + group)
        count = tl.load(groups.last_query + group) - query
        zero = hidden_zero(count)
        owners = ()
        firsts = ()
        peaks = ()
        masses = ()
        for c in tl.static_range(COUNT):
            owner = query + tl.minimum(c, count - 1)
            q = load_vector(data.query + owner * get(SPEC, "query_stride") + zero, D, SLAB)
            owners = owners + (owner,)
            firsts = firsts + (first_layer(net, q, owner, SPEC)[0],)
            peaks = peaks + (tl.full([], float("-inf"), tl.float32),)
            masses = masses + (tl.zeros([BLOCK], tl.float32),)
        acc = zero_rows(ROWS, DV, SLAB)
        position = tl.load(groups.begin + group) + (begin - first_row)
        rows = (stop - begin).to(tl.int32)  # offsets of groups have 64 bits, which take registers
        for start in tl.range(0, rows, BLOCK, num_stages=get(SPEC, "stages")):
            rest = rows - start
            valid = token < rest
            k, v = load_tile(data, position, valid, SPEC)
            scores = ()
            tops = ()
            grown = False
            for c in tl.static_range(COUNT):
                # Rows of dropout count along all queries.
                row = tl.load(data.offsets + owners[c]) + (position - tl.load(data.starts + owners[c]))
                noise = noise_of(net, row + token, SPEC)
                # Read in every tile: kept, they would fill the registers.
                again = with_fresh_vectors(net, owners[c], (firsts[c], ()), layers, last, rest, SPEC)
                s = score_tokens(k, again[0], again[1], again[3], again[2], SPEC, noise)  # [BLOCK]
                if SOFTMAX:
                    s = tl.where(valid, s, float("-inf"))
                    top = vector_max(s)
                    tops = tops + (top,)
                    grown = grown | (top > peaks[c] + 8)
                scores = scores + (s,)
            weights = ()
            if SOFTMAX:
                if grown:
                    peaks, masses, acc = raise_peaks(tops, peaks, masses, acc, APPROX)
                for c in tl.static_range(COUNT):
                    weights = weights + (exp2(scores[c] - peaks[c], APPROX),)
                masses = add_weights(masses, weights)
            else:
                for c in tl.static_range(COUNT):
                    p = weigh(scores[c], get(SPEC, "normalize"), APPROX)
                    weights = weights + (tl.where(valid, p, 0.0),)
            spread = in_rows(weights)
            pooled = ()
            for i in tl.static_range(len(v)):
                pooled = pooled + (dot(spread.to(v[i].dtype), v[i], acc[i], get(SPEC, "precision")),)
            acc = pooled
            position += BLOCK
        norms = ()
        for c in tl.static_range(COUNT):
            norms = norms + (vector_sum(masses[c]),)
        if slot < 0:
            if SOFTMAX:
                inverse = ()
                for c in tl.static_range(COUNT):
                    inverse = inverse + (1 / norms[c],)
                acc = scale_rows(acc, inverse)
                for c in tl.static_range(COUNT):
                    tl.store(peak_mass + 2 * (query + c), peaks[c], mask=c < count)
                    tl.store(peak_mass + 2 * (query + c) + 1, norms[c], mask=c < count)
            store_candidates(out + query * DV, DV, acc, count, SPEC)
        else:
            lane = 2 * tl.num_programs(0) + zero  # parts of candidate c lie behind those of candidate c - 1
            store_candidates(part + slot * DV, lane * DV, acc, count, SPEC)
            for c in tl.static_range(COUNT):
                tl.store(part_state + 2 * (c * lane + slot), peaks[c])
                tl.store(part_state + 2 * (c * lane + slot) + 1, norms[c])
        begin = stop
        group += 1


def forward(
    unit: Any,
    data: Histories,
    network: Network,
    out: Tensor,
    peak_mass: Tensor,
    spec: Spec,
    launch: settings.Launch,
) -> None:
    """Into `out [N, Dv]` and `peak_mass [N, 2]`, zero and one before."""
    count = settings.CANDIDATES
    groups = unit.candidates.groups(count, unit.query.shape[0])
    programs = settings.programs(launch, -(-unit.most_rows // count), data.key.device)
    part = peak_mass.new_empty(count * 2 * programs, out.shape[1])
    part_state = peak_mass.new_empty(count * 2 * programs, 2)
    candidates_kernel[(programs,)](
        data,
        groups,
        groups.begin.numel(),
        network,
        out,
        peak_mass,
        part,
        part_state,
        COUNT=count,
        SPEC=spec,
        num_warps=launch.num_warps,
    )
    places = (groups.query, groups.last_query)
    state = part_state if spec.softmax else None
    merge(part, state, groups.offsets, out, peak_mass, programs, launch.least_rows, places, count)
