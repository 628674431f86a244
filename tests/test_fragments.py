"""Matrices in the order in which threads hold products: host and kernels agree on it, whatever the cuts."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from recattn.kernels.fragments import Fragments, add_fragments, load_fragments
from recattn.kernels.primitives import load_matrix, slab_count

SHAPES = [
    Fragments(64, 80, 32, 16, 2),
    Fragments(64, 80, 64, 64, 4),
    Fragments(18, 36, 32, 16, 2),
    Fragments(96, 100, 64, 64, 1),
    Fragments(5, 3, 16, 16, 4),
]


@triton.jit
def _add_kernel(
    matrix,
    sums,
    ROWS: tl.constexpr,
    ROW_SLAB: tl.constexpr,
    COLS: tl.constexpr,
    COL_SLAB: tl.constexpr,
    WARPS: tl.constexpr,
):
    slabs = load_matrix(matrix, ROWS, ROW_SLAB, 16, COLS, COL_SLAB)
    add_fragments(sums, slabs, ROWS, ROW_SLAB, COLS, COL_SLAB, WARPS)


@triton.jit
def _read_kernel(
    flat,
    sums,
    ROWS: tl.constexpr,
    ROW_SLAB: tl.constexpr,
    COLS: tl.constexpr,
    COL_SLAB: tl.constexpr,
    WARPS: tl.constexpr,
):
    slabs = ()
    for j in tl.static_range(slab_count(ROWS, ROW_SLAB)):
        for i in tl.static_range(slab_count(COLS, COL_SLAB)):
            slab = load_fragments(flat, j, i, ROWS, ROW_SLAB, COLS, COL_SLAB, WARPS)
            slabs = slabs + (slab.to(tl.float32),)  # noqa: RUF005 - Triton cannot unpack here
    add_fragments(sums, slabs, ROWS, ROW_SLAB, COLS, COL_SLAB, WARPS)


@pytest.mark.parametrize("order", SHAPES)
def test_a_matrix_added_by_a_kernel_comes_back_in_rows(order: Fragments) -> None:
    matrix = torch.randn(order.rows, order.cols)
    sums = torch.zeros(order.size)
    for _ in range(2):
        _add_kernel[(1,)](matrix, sums, order.rows, order.row_slab, order.cols, order.col_slab, order.warps)
    assert torch.equal(order.matrix(sums), 2 * matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("order", SHAPES)
def test_a_matrix_turned_on_the_host_is_read_in_its_rows(order: Fragments, dtype: torch.dtype) -> None:
    matrix = torch.randn(order.rows, order.cols).to(dtype)
    flat = order.flat(matrix)
    assert flat.shape == (order.size,)
    sums = torch.zeros(order.size)
    _read_kernel[(1,)](flat, sums, order.rows, order.row_slab, order.cols, order.col_slab, order.warps)
    assert torch.equal(order.matrix(sums), matrix.float())
