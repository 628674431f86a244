"""Matrices in memory in the order in which the threads of a product hold their elements.

A matrix unit leaves a product spread over threads such that no row of it lies in one. A tile that a program only adds
to and reads again, or that is multiplied by such a product, need not be in rows: in this order neither a load nor a
store passes shared memory. It is an order, whatever holds the elements: where that is otherwise, they are moved as
they would be for rows.

Slab follows slab. In a slab a warp has 16 rows in turn; of 8 columns by 16 rows a thread has two neighbours and the two
eight rows below, and of EACH elements side by side the others are further columns.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .primitives import cuts, slab_count, slab_size


@triton.constexpr_function
def fragment_shape(rows, cols, warps, each):
    """Of a slab `[rows, cols]`: repeats, warps, halves of 16 rows, their rows; repeats, octets of columns that a thread
    has side by side, pairs, and their columns."""
    warps = min(warps, rows // 16)
    octets = min(max(each // 4, 1), cols // 8)
    return [rows // (16 * warps), warps, 2, 8, cols // (8 * octets), octets, 4, 2]


@triton.jit
def to_fragments(slab, WARPS: tl.constexpr, EACH: tl.constexpr):
    """A slab `[rows, cols]`, flat."""
    rows: tl.constexpr = slab.shape[0]
    cols: tl.constexpr = slab.shape[1]
    parts = tl.reshape(slab, fragment_shape(rows, cols, WARPS, EACH))
    return tl.reshape(tl.permute(parts, (0, 4, 1, 3, 6, 5, 2, 7)), [rows * cols])


@triton.constexpr_function
def turned_shape(rows, cols, warps, each):
    shape = fragment_shape(rows, cols, warps, each)
    return [shape[i] for i in (0, 4, 1, 3, 6, 5, 2, 7)]


@triton.jit
def from_fragments(flat, rows: tl.constexpr, cols: tl.constexpr, WARPS: tl.constexpr, EACH: tl.constexpr):
    """The inverse of to_fragments."""
    parts = tl.permute(tl.reshape(flat, turned_shape(rows, cols, WARPS, EACH)), (0, 2, 6, 3, 1, 5, 4, 7))
    return tl.reshape(parts, [rows, cols])


@triton.constexpr_function
def fragment_start(j, i, rows, row_slab, cols, col_slab):
    """Where slab (j, i) begins."""
    row_sizes = [size for _, size in cuts(rows, row_slab, 16)]
    col_sizes = [size for _, size in cuts(cols, col_slab, 16)]
    return sum(row_sizes[:j]) * sum(col_sizes) + row_sizes[j] * sum(col_sizes[:i])


@triton.constexpr_function
def fragment_count(rows, row_slab, cols, col_slab):
    """Of elements, those past the edges included."""
    return sum(size for _, size in cuts(rows, row_slab, 16)) * sum(
        size for _, size in cuts(cols, col_slab, 16)
    )


@triton.jit
def fragment_places(
    j: tl.constexpr,
    i: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_SLAB: tl.constexpr,
    COLS: tl.constexpr,
    COL_SLAB: tl.constexpr,
):
    count: tl.constexpr = slab_size(j, ROWS, ROW_SLAB) * slab_size(i, COLS, COL_SLAB)
    return fragment_start(j, i, ROWS, ROW_SLAB, COLS, COL_SLAB) + tl.arange(0, count)


@triton.jit
def load_fragments(
    pointer,
    j: tl.constexpr,
    i: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_SLAB: tl.constexpr,
    COLS: tl.constexpr,
    COL_SLAB: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Slab (j, i) of a matrix that `Fragments.flat` has made."""
    each: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    rows: tl.constexpr = slab_size(j, ROWS, ROW_SLAB)
    cols: tl.constexpr = slab_size(i, COLS, COL_SLAB)
    # In two dimensions: other loads in one are of float32, and would be laid out as if they were as wide.
    place = tl.arange(0, rows * cols // each)[:, None] * each + tl.arange(0, each)[None, :]
    slab = tl.load(pointer + fragment_start(j, i, ROWS, ROW_SLAB, COLS, COL_SLAB) + place)
    return from_fragments(slab, rows, cols, WARPS, each)


@triton.jit
def add_fragments(
    pointer,
    slabs,
    ROWS: tl.constexpr,
    ROW_SLAB: tl.constexpr,
    COLS: tl.constexpr,
    COL_SLAB: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Adds to a matrix in float32 of the program's own."""
    COUNT: tl.constexpr = slab_count(COLS, COL_SLAB)
    for j in tl.static_range(slab_count(ROWS, ROW_SLAB)):
        for i in tl.static_range(COUNT):
            place = fragment_places(j, i, ROWS, ROW_SLAB, COLS, COL_SLAB)
            before = tl.load(pointer + place)
            tl.store(pointer + place, before + to_fragments(slabs[j * COUNT + i], WARPS, 4))


class Fragments(NamedTuple):
    """How a matrix `[rows, cols]` is cut into slabs, and how many warps make it."""

    rows: int
    cols: int
    row_slab: int
    col_slab: int
    warps: int

    @property
    def size(self) -> int:
        """Of elements, those past the edges included."""
        return fragment_count(self.rows, self.row_slab, self.cols, self.col_slab)

    def flat(self, matrix: Tensor) -> Tensor:
        """As load_fragments reads it, zero past the edges."""
        missing = (sum(self._col_cuts()) - self.cols, sum(self._row_cuts()) - self.rows)
        matrix = pad(matrix, (0, missing[0], 0, missing[1]))
        blocks = []
        for j, rows in _runs(self._row_cuts()):
            band = matrix.narrow(0, j, sum(rows))
            parts = []
            for i, cols in _runs(self._col_cuts()):
                a, b = self._shape(rows[0], cols[0], 16 // matrix.element_size())
                part = band.narrow(1, i, sum(cols)).reshape(len(rows), *a, len(cols), *b)
                # [rows of slabs, columns of slabs, repeats, repeats, warps, rows, places, octets, halves, pairs]
                part = part.permute(0, 5, 1, 6, 2, 4, 8, 7, 3, 9)
                parts.append(part.reshape(len(rows), -1))
            blocks.append(torch.cat(parts, 1).flatten())
        return torch.cat(blocks)

    def matrix(self, flat: Tensor) -> Tensor:
        """Of what add_fragments has left, `[rows, cols]`."""
        bands, start = [], 0
        for _, rows in _runs(self._row_cuts()):
            size = sum(rows) * sum(self._col_cuts())
            block, parts, first = flat.narrow(0, start, size).view(len(rows), -1), [], 0
            for _, cols in _runs(self._col_cuts()):
                a, b = self._shape(rows[0], cols[0], 4)
                part = block.narrow(1, first, rows[0] * sum(cols))
                part = part.view(len(rows), len(cols), a[0], b[0], a[1], a[3], b[2], b[1], a[2], b[3])
                part = part.permute(0, 2, 4, 8, 5, 1, 3, 7, 6, 9)
                parts.append(part.reshape(sum(rows), sum(cols)))
                first += rows[0] * sum(cols)
            bands.append(torch.cat(parts, 1))
            start += size
        return torch.cat(bands)[: self.rows, : self.cols]

    def _row_cuts(self) -> list[int]:
        return [size for _, size in cuts(self.rows, self.row_slab, 16)]

    def _col_cuts(self) -> list[int]:
        return [size for _, size in cuts(self.cols, self.col_slab, 16)]

    def _shape(self, rows: int, cols: int, each: int) -> tuple[list[int], list[int]]:
        shape = fragment_shape(rows, cols, self.warps, each)
        return shape[:4], shape[4:]


def _runs(sizes: list[int]) -> list[tuple[int, list[int]]]:
    """Equal sizes that follow each other, each with where it begins."""
    runs, start = [], 0
    for _, same in groupby(sizes):
        run = list(same)
        runs.append((start, run))
        start += sum(run)
    return runs
