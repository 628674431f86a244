"""Jit primitives for sums over tokens, as backward needs them, and for what becomes of them.

A product with a tile of ones or of equal rows costs a fraction of a reduction, which has to cross lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import columns, dot, slab_count, slab_size, slab_start


@triton.jit
def zero_tile(
    j: tl.constexpr,
    i: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_WIDEST: tl.constexpr,
    ROW_NARROWEST: tl.constexpr,
    COLS: tl.constexpr,
    COL_WIDEST: tl.constexpr,
    COL_NARROWEST: tl.constexpr,
):
    rows: tl.constexpr = slab_size(j, ROWS, ROW_WIDEST, ROW_NARROWEST)
    return tl.zeros([rows, slab_size(i, COLS, COL_WIDEST, COL_NARROWEST)], tl.float32)


@triton.jit
def zero_matrix(
    ROWS: tl.constexpr,
    ROW_WIDEST: tl.constexpr,
    COLS: tl.constexpr,
    COL_WIDEST: tl.constexpr,
    ROW_NARROWEST: tl.constexpr = 16,
    COL_NARROWEST: tl.constexpr = 16,
):
    slabs = ()
    for j in tl.static_range(slab_count(ROWS, ROW_WIDEST, ROW_NARROWEST)):
        for i in tl.static_range(slab_count(COLS, COL_WIDEST, COL_NARROWEST)):
            slabs = slabs + (
                zero_tile(j, i, ROWS, ROW_WIDEST, ROW_NARROWEST, COLS, COL_WIDEST, COL_NARROWEST),
            )
    return slabs


@triton.jit
def load_padded(pointer, WIDTH: tl.constexpr, WIDEST: tl.constexpr, COUNT: tl.constexpr, ALONG: tl.constexpr):
    """`[WIDTH]` as the first of COUNT rows `[COUNT, size]` or columns `[size, COUNT]`, the others zero."""
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, WIDEST)):
        column = columns(i, WIDTH, WIDEST)
        other = tl.arange(0, COUNT)
        if ALONG:
            inside = (other == 0)[:, None] & (column < WIDTH)[None, :]
            slabs = slabs + (
                tl.load(pointer + (other * 0)[:, None] + column[None, :], mask=inside, other=0.0),
            )
        else:
            inside = (column < WIDTH)[:, None] & (other == 0)[None, :]
            slabs = slabs + (
                tl.load(pointer + column[:, None] + (other * 0)[None, :], mask=inside, other=0.0),
            )
    return slabs


@triton.jit
def in_dtype(slabs, DTYPE: tl.constexpr):
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (slabs[i].to(DTYPE),)
    return out


@triton.jit
def outer_sum(rows, cols, acc, PRECISION: tl.constexpr):
    """`acc + Σ_t rows_t cols_tᵀ`, of slabs `[tokens, *]`."""
    out = ()
    for j in tl.static_range(len(rows)):
        left = tl.trans(rows[j].to(cols[0].dtype))
        for i in tl.static_range(len(cols)):
            out = out + (dot(left, cols[i], acc[j * len(cols) + i], PRECISION),)
    return out


@triton.jit
def column_sum(rows, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + Σ_t rows_t` as eight equal columns."""
    ones = (tl.full([rows[0].shape[0], 8], 1.0, tl.float32).to(DTYPE),)
    return outer_sum(rows, ones, acc, PRECISION)


@triton.jit
def flat_slab(
    j: tl.constexpr,
    i: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_WIDEST: tl.constexpr,
    ROW_NARROWEST: tl.constexpr,
    COLS: tl.constexpr,
    COL_WIDEST: tl.constexpr,
    COL_NARROWEST: tl.constexpr,
):
    """Of slab (j, i), flat: the places in a contiguous `[ROWS, COLS]`, and whether they lie inside."""
    rows: tl.constexpr = slab_size(j, ROWS, ROW_WIDEST, ROW_NARROWEST)
    cols: tl.constexpr = slab_size(i, COLS, COL_WIDEST, COL_NARROWEST)
    index = tl.arange(0, rows * cols)
    row = slab_start(j, ROWS, ROW_WIDEST, ROW_NARROWEST) + index // cols
    column = slab_start(i, COLS, COL_WIDEST, COL_NARROWEST) + index % cols
    return row * COLS + column, (row < ROWS) & (column < COLS)


@triton.jit
def flat(slab):
    return tl.reshape(slab, [slab.shape[0] * slab.shape[1]])


@triton.jit
def add_matrix(
    pointer,
    slabs,
    fresh,
    ROWS: tl.constexpr,
    ROW_WIDEST: tl.constexpr,
    COLS: tl.constexpr,
    COL_WIDEST: tl.constexpr,
    ROW_NARROWEST: tl.constexpr = 16,
    COL_NARROWEST: tl.constexpr = 16,
):
    """Adds to a contiguous `[ROWS, COLS]` of the program's own; overwrites it if it is fresh."""
    COUNT: tl.constexpr = slab_count(COLS, COL_WIDEST, COL_NARROWEST)
    for j in tl.static_range(slab_count(ROWS, ROW_WIDEST, ROW_NARROWEST)):
        for i in tl.static_range(COUNT):
            place, inside = flat_slab(j, i, ROWS, ROW_WIDEST, ROW_NARROWEST, COLS, COL_WIDEST, COL_NARROWEST)
            before = tl.load(pointer + place, mask=inside & (fresh == 0), other=0.0)
            tl.store(pointer + place, before + flat(slabs[j * COUNT + i]), mask=inside)


@triton.jit
def store_column(
    pointer, slabs, ROWS: tl.constexpr, ROW_WIDEST: tl.constexpr, ROW_NARROWEST: tl.constexpr = 16
):
    """The first of the equal columns that column_sum makes."""
    for j in tl.static_range(slab_count(ROWS, ROW_WIDEST, ROW_NARROWEST)):
        row = columns(j, ROWS, ROW_WIDEST, ROW_NARROWEST)[:, None]
        column = tl.arange(0, slabs[j].shape[1])[None, :]
        tl.store(pointer + row + column * 0, slabs[j], mask=(column == 0) & (row < ROWS))


# ------------------------------------------------------------------------------------------------ eight rows


@triton.jit
def zero_octets(WARPS: tl.constexpr, WIDTH: tl.constexpr, WIDEST: tl.constexpr, NARROWEST: tl.constexpr):
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, WIDEST, NARROWEST)):
        slabs = slabs + (tl.zeros([WARPS, 8, slab_size(i, WIDTH, WIDEST, NARROWEST)], tl.float32),)
    return slabs


@triton.jit
def add_octet(slab, acc, WARPS: tl.constexpr):
    rows = tl.reshape(slab, [slab.shape[0] // (16 * WARPS), WARPS, 2, 8, slab.shape[1]])
    return acc + tl.sum(tl.sum(rows, 2), 0)


@triton.jit
def add_octets(slabs, acc):
    """Adds in full precision the rows that a thread holds of tiles `[tokens, size]`, where warps take turns
    at 16 rows: `[WARPS, 8, size]`."""
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (add_octet(slabs[i], acc[i], acc[i].shape[0]),)
    return out


@triton.jit
def store_octets(pointer, slabs, WIDTH: tl.constexpr, WIDEST: tl.constexpr, NARROWEST: tl.constexpr):
    """Their sum, to `pointer[:WIDTH]`."""
    for i in tl.static_range(slab_count(WIDTH, WIDEST, NARROWEST)):
        column = columns(i, WIDTH, WIDEST, NARROWEST)
        tl.store(pointer + column, tl.sum(tl.sum(slabs[i], 0), 0), mask=column < WIDTH)
