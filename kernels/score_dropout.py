"""Which scores dropout keeps, as `recattn/composite/score_dropout.py` has it: hashes of a seed, a row, a column."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def threshold(dropout):
    return min(round(dropout * (1 << 32)), (1 << 32) - 1)


@triton.jit
def _mix(x, key):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13) ^ key) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed, row, begin):
    """Two keys of each row, in 64 bits, whose columns count from `begin`."""
    seed = tl.load(seed)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    first = _mix(_mix(row.to(tl.uint32) ^ low, high), (row >> 32).to(tl.uint32))
    second = _mix(first + 0x9E3779B9, low)
    return first - begin.to(tl.uint32) * 0x9E3779B9, second


@triton.jit
def kept(first, second, column, DROPOUT: tl.constexpr):
    """Of rows with these keys and of columns, broadcast to each other."""
    return _mix(column.to(tl.uint32) * 0x9E3779B9 + first, second) >= threshold(DROPOUT)
