"""Tiles of scores between rows of one sequence: products, bias, mask, dropout. Shared by self_attention's kernels.

A tile has the program's rows as its rows; its columns are keys, or where it is TRANSPOSED queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arguments import get
from .primitives import LOG2_E, columns, dot, load_rows, slab_count, slab_inside, store_rows
from .score_dropout import kept, row_keys
from .spans import columns_met, spans_of


class Data(NamedTuple):
    """What the kernels read. Rows of q, k and v lie `Spec.strides` apart."""

    q: Tensor  # [T, H·d]
    k: Tensor  # [T, H·d]
    v: Tensor  # [T, H·dv]
    first: Tensor  # [T], of each row the first row of its sequence
    past: Tensor  # [T], and the first behind it
    table: Tensor  # [H, R], the bias times log2 e
    index: Tensor  # [T], what it is looked up by, where that is not the place
    seed: Tensor  # [1], of dropout
    rows: int
    buckets: int


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Nothing here depends on a length or on the size of the batch."""

    heads: int
    dim: int
    value_dim: int
    strides: tuple[int, ...]  # of rows of q, k, v and the gradient of the output
    scale: float
    causal: bool
    hide_self: bool
    biased: bool
    exact: bool  # whether backward gets the output as it was before it was rounded
    indexed: bool  # whether the bias is looked up by an index
    dropout: float
    precision: str  # of products, as tl.dot takes it
    approx: bool  # approximate instructions of NVIDIA GPUs
    block: int  # rows of a program
    step: int  # columns of a tile without a mask
    edge: int  # and of one with it
    slab: int  # widest slab of q, k and v
    stages: int

    @property
    def split(self) -> bool:
        """Whether a row meets columns on both sides of itself, but not itself."""
        return self.hide_self and not self.causal

    @property
    def factor(self) -> float:
        """Makes scores in base 2 of products."""
        return self.scale * LOG2_E.value

    @property
    def late_factor(self) -> float:
        """Of scores where it is positive and nothing is added to them: a factor of the exponent costs nothing."""
        return 1.0 if self.biased or self.scale <= 0 else self.factor

    @property
    def keep(self) -> float:
        return 1 / (1 - self.dropout)


class Rows(NamedTuple):
    """The rows of a program."""

    start: tl.tensor  # the first, in 64 bits
    place: tl.tensor  # [BLOCK]
    inside: tl.tensor  # those that there are
    valid: tl.tensor  # those that are of a sequence
    low: tl.tensor  # of each the first column that it meets
    high: tl.tensor  # and the first behind those
    index: tl.tensor  # what the bias is looked up by
    keys: tuple  # of dropout, where the rows are queries


@triton.constexpr_function
def row_stride(which, spec):
    return spec.strides[which]


@triton.jit
def rows_of(data, program, head, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr):
    start = program * get(SPEC, "block")
    place = start + tl.arange(0, get(SPEC, "block"))
    inside = place < data.rows
    begin, end = spans_of(data.first, data.past, place, data.rows)
    low, high = columns_met(place, begin, end, get(SPEC, "causal"), get(SPEC, "hide_self"), TRANSPOSED)
    valid = inside & (begin < end)
    keys = ()
    if get(SPEC, "dropout") > 0 and not TRANSPOSED:
        keys = dropout_keys(data, place, begin, head, SPEC)
    index = bias_index(data, place, valid, SPEC)
    return Rows(start.to(tl.int64), place, inside, valid, low, high, index, keys)


@triton.jit
def dropout_keys(data, query, begin, head, SPEC: tl.constexpr):
    return row_keys(data.seed, query.to(tl.int64) * get(SPEC, "heads") + head, begin)


@triton.jit
def bias_index(data, place, valid, SPEC: tl.constexpr):
    """What the bias of places is looked up by."""
    if get(SPEC, "indexed"):
        return tl.load(data.index + place, mask=valid, other=0)
    else:
        return place


@triton.jit
def load_own(pointer, rows, STRIDE: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr):
    """The program's rows of a `[*, WIDTH]` matrix as slabs; zero where a row is not of a sequence."""
    row = tl.arange(0, rows.place.shape[0])
    return load_rows(pointer + rows.start * STRIDE, row, STRIDE, rows.valid, WIDTH, SLAB)


@triton.jit
def store_own(pointer, slabs, rows, STRIDE: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr):
    """The inverse of load_own, for slack too."""
    row = tl.arange(0, rows.place.shape[0])
    store_rows(pointer + rows.start * STRIDE, slabs, row, STRIDE, rows.inside, WIDTH, SLAB)


@triton.jit
def load_columns(
    pointer,
    begin,
    end,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SLAB: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows from begin on of a `[*, WIDTH]` matrix as slabs `[SIZE, size]`; zero from `end` on, where MASKED."""
    place = tl.arange(0, SIZE)[:, None]
    pointer += begin.to(tl.int64) * STRIDE
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, SLAB)):
        column = columns(i, WIDTH, SLAB)[None, :]
        at = pointer + place * STRIDE + column
        if MASKED and slab_inside(i, WIDTH, SLAB):
            slabs = slabs + (tl.load(at, mask=place < end - begin, other=0.0),)
        elif MASKED:
            slabs = slabs + (tl.load(at, mask=(place < end - begin) & (column < WIDTH), other=0.0),)
        elif slab_inside(i, WIDTH, SLAB):
            slabs = slabs + (tl.load(at),)
        else:
            slabs = slabs + (tl.load(at, mask=column < WIDTH, other=0.0),)
    return slabs


@triton.jit
def products(a, b, PRECISION: tl.constexpr):
    """`a @ b.T` of two matrices in slabs."""
    out = dot(a[0], tl.trans(b[0]), None, PRECISION)
    for i in tl.static_range(1, len(a)):
        out = dot(a[i], tl.trans(b[i]), out, PRECISION)
    return out


@triton.jit
def add_products(acc, a, b, PRECISION: tl.constexpr):
    """`acc + a @ b`, where acc and b are in slabs."""
    out = ()
    for i in tl.static_range(len(b)):
        out = out + (dot(a, b[i], acc[i], PRECISION),)
    return out


@triton.jit
def bucket(data, query_index, key_index):
    """The place in the table of each pair."""
    place = query_index - key_index + data.buckets // 2
    return tl.minimum(tl.maximum(place, 0), data.buckets - 1).to(tl.int32)


@triton.jit
def buckets_of(data, rows, column, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr):
    """`[BLOCK, SIZE]`."""
    other = bias_index(data, column, column < data.rows, SPEC)[None, :]
    mine = rows.index[:, None]
    if TRANSPOSED:
        return bucket(data, other, mine)
    else:
        return bucket(data, mine, other)


@triton.jit
def finish_scores(
    s, data, rows, column, head, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, SPEC: tl.constexpr
):
    """Of products `[BLOCK, SIZE]` the scores over `late_factor`, with their bias; minus infinity outside."""
    s *= get(SPEC, "factor") / get(SPEC, "late_factor")
    if get(SPEC, "biased"):
        s += tl.load(data.table + head * data.buckets + buckets_of(data, rows, column, TRANSPOSED, SPEC))
    if MASKED:
        s = tl.where(met(rows, column, SPEC), s, float("-inf"))
    return s


@triton.jit
def met(rows, column, SPEC: tl.constexpr):
    """Which columns each row meets."""
    column = column[None, :]
    inside = (column >= rows.low[:, None]) & (column < rows.high[:, None])
    if get(SPEC, "split"):
        inside = inside & (column != rows.place[:, None])
    return inside


@triton.jit
def drop(x, data, rows, column, head, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr):
    """Zero where dropout is, larger elsewhere."""
    if get(SPEC, "dropout") == 0:
        return x
    else:
        if TRANSPOSED:
            begin, _ = spans_of(data.first, data.past, column, data.rows)
            first, second = dropout_keys(data, column, begin, head, SPEC)
            keep = kept(first[None, :], second[None, :], rows.place[:, None], get(SPEC, "dropout"))
        else:
            keep = kept(rows.keys[0][:, None], rows.keys[1][:, None], column[None, :], get(SPEC, "dropout"))
        return tl.where(keep, x * get(SPEC, "keep"), 0.0)
