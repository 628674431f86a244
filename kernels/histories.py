"""Where the rows of histories lie, and which of them a program takes.

A *row* counts along all sequences, as the schedule does; a *position* along all histories, which sequences may share:
candidates of one history are sequences over the same positions. The keys and values of a position lie where `rows`
says, if it is given, else at the position itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get
from .primitives import load_rows, store_rows
from .schedule import find_sequence, rows_per_program


@triton.jit
def share_of(program, data, batch, SPEC: tl.constexpr):
    """The rows of a program: `(begin, end)`."""
    total = tl.load(data.offsets + batch)
    share = rows_per_program(total, tl.num_programs(0), get(SPEC, "least_rows"))
    begin = tl.minimum(program.to(tl.int64) * share, total).to(total.dtype)
    return begin, tl.minimum(begin + share, total)


@triton.jit
def part_at(data, batch, sequence, begin, end):
    """The sequence that row `begin` is of, `sequence` or one behind it, its rows, and where the part of it before
    `end` stops: `(sequence, first_row, last_row, stop)`."""
    if tl.load(data.offsets + sequence + 1) <= begin:  # empty
        sequence = find_sequence(data.offsets, batch, begin)
    first_row = tl.load(data.offsets + sequence)
    last_row = tl.load(data.offsets + sequence + 1)
    return sequence, first_row, last_row, tl.minimum(last_row, end)


@triton.jit
def position_of(data, sequence, first_row, row, SPEC: tl.constexpr):
    """Of a row of a sequence, in 64 bits."""
    if get(SPEC, "shared"):
        return tl.load(data.starts + sequence) + (row - first_row).to(tl.int64)
    else:
        return row.to(tl.int64)


@triton.jit
def load_tile(data, position, valid, SPEC: tl.constexpr, zero=0):
    """The keys and the values of a tile that begins at a position, as slabs; zero where a token is not valid. `zero`
    is added to the rows, see `hidden_zero`."""
    token = tl.arange(0, get(SPEC, "block"))
    if get(SPEC, "indexed"):
        row = tl.load(data.rows + position + token, mask=valid, other=0).to(tl.int64)
        key = data.key
        value = data.value
    else:
        row = token + zero
        key = data.key + position * get(SPEC, "key_stride")
        value = data.value + position * get(SPEC, "value_stride")
    k = load_rows(key, row, get(SPEC, "key_stride"), valid, get(SPEC, "dim"), get(SPEC, "dim_slab"))
    if get(SPEC, "separate_values"):
        return k, load_rows(
            value, row, get(SPEC, "value_stride"), valid, get(SPEC, "value_dim"), get(SPEC, "dim_slab")
        )
    else:
        return k, k


@triton.jit
def store_tile(pointer, slabs, data, position, valid, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Gradients of what load_tile has loaded, to where it lies if no other position is there, else to the position."""
    token = tl.arange(0, get(SPEC, "block"))
    if get(SPEC, "scatter"):
        row = tl.load(data.rows + position + token, mask=valid, other=0).to(tl.int64)
    else:
        row = token
        pointer += position * WIDTH
    store_rows(pointer, slabs, row, WIDTH, valid, WIDTH, get(SPEC, "dim_slab"))
