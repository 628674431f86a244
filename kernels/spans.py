"""Which rows meet which: the schedule of attention among rows of one sequence.

Every program takes the same number of contiguous rows, wherever sequences begin and end, so that the grid follows from
shapes and short sequences share a tile. It runs over the columns of all sequences that its rows are of. Where all rows
meet all columns of a tile no mask is needed; most tiles of a long sequence are such.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """The columns of a program: tiles of STEP without a mask, then of EDGE with one."""

    begin: tl.tensor  # where the whole begins
    end: tl.tensor  # and ends
    before: tl.tensor  # the first tiles without a mask begin there, so many
    resume: tl.tensor  # the others here
    inner: tl.tensor  # so many in all
    gap: tl.tensor  # tiles of EDGE between the two
    edges: tl.tensor  # and in all


@triton.jit
def spans_of(first, past, row, rows):
    """Where the sequence of each row begins and ends; the last row's behind it."""
    row = tl.minimum(row, rows - 1)
    return tl.load(first + row), tl.load(past + row)


@triton.jit
def columns_met(row, begin, end, CAUSAL: tl.constexpr, HIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """`(low, high)`: row i meets the columns from low to before high, but for i itself where it is hidden. Columns are
    keys, or TRANSPOSED queries."""
    if CAUSAL and TRANSPOSED:
        return tl.maximum(begin, row + 1 if HIDE else row), end
    elif CAUSAL:
        return begin, tl.minimum(end, row if HIDE else row + 1)
    else:
        return begin, end


@triton.jit
def tiles_of(
    row, low, high, BLOCK: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr, SPLIT: tl.constexpr
):
    """The tiles of a block of rows. SPLIT: no row meets itself, though it may meet columns on both sides."""
    begin = tl.min(low, 0)
    end = tl.max(high, 0)
    inside = tl.max(low, 0)  # from here to before `until` all rows meet all columns
    until = tl.min(high, 0)
    before = begin * 0
    if SPLIT:
        whole = (inside == begin) & (until == end)
        first_row = tl.min(row, 0)
        before = tl.where(whole, tl.maximum(first_row - begin, 0) // STEP, 0)
        inside = tl.where(whole, tl.maximum(inside, first_row + BLOCK), inside)
    start = begin + before * STEP
    gap = tl.cdiv(tl.maximum(inside - start, 0), EDGE)
    resume = start + gap * EDGE
    behind = tl.maximum(until - resume, 0) // STEP
    edges = gap + tl.cdiv(tl.maximum(end - (resume + behind * STEP), 0), EDGE)
    return Tiles(begin, end, before, resume, before + behind, gap, edges)


@triton.jit
def inner_column(tiles, i, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """The first column of the i-th tile without a mask."""
    if SPLIT:
        return tl.where(i < tiles.before, tiles.begin, tiles.resume - tiles.before * STEP) + i * STEP
    else:
        return tiles.resume + i * STEP


@triton.jit
def edge_column(tiles, i, STEP: tl.constexpr, EDGE: tl.constexpr):
    """The first column of the i-th tile with a mask."""
    behind = tiles.resume + (tiles.inner - tiles.before) * STEP - tiles.gap * EDGE
    return tl.where(i < tiles.gap, tiles.begin + tiles.before * STEP, behind) + i * EDGE


@triton.jit
def _spans_kernel(offsets, first, past, rows, batch, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(offsets + batch)
    low = row * 0  # the sequence of a row lies from low to high
    high = low + batch
    left = batch
    while left > 0:
        middle = (low + high) // 2
        ended = tl.load(offsets + middle + 1, mask=low < high, other=total + rows) <= row
        low = tl.where(ended, middle + 1, low)
        high = tl.where(ended, high, middle)
        left //= 2
    some = low < batch
    begin = tl.load(offsets + low, mask=some, other=total)
    end = tl.load(offsets + low + 1, mask=some, other=total)
    tl.store(first + row, begin.to(tl.int32), mask=row < rows)
    tl.store(past + row, end.to(tl.int32), mask=row < rows)


def spans(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of each row the first row of its sequence, and the first one behind it: `[rows]` int32. For slack both are
    `offsets[-1]`."""
    first, past = torch.empty(2, rows, dtype=torch.int32, device=offsets.device)
    block = 128
    _spans_kernel[(triton.cdiv(rows, block),)](
        offsets, first, past, rows, offsets.numel() - 1, BLOCK=block, num_warps=4
    )
    return first, past
