"""attentional_gru, what its kernels share: their arguments, the cell, its weights, and where rows lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arguments import get
from .primitives import tanh


class Scan(NamedTuple):
    """The data. Rows of the inputs lie `Spec.stride` apart."""

    inputs: Tensor  # [R, I], or the projections of each position [T, 3H]
    scores: Tensor  # [T], or [R]
    index: Tensor  # [T], of each position its row of the inputs, where they are read by index
    offsets: Tensor  # [B + 1]
    order: Tensor  # [B], the sequences by descending length
    initial: Tensor  # [B, H]
    weight_ih: Tensor  # [3H, I]
    weight_hh: Tensor  # [3H, H]
    bias_ih: Tensor  # [3H]
    bias_hh: Tensor  # [3H]
    batch: int
    rows: int  # T


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Nothing here depends on a length or on the size of the batch."""

    width: int  # of the inputs
    size: int  # of the state
    cell: str  # "gru", "agru", "paper" or "official"
    scaled: bool  # whether the attention multiplies the inputs
    reset_after: bool
    initial: bool  # whether there are states to start from
    indexed: bool  # whether positions have their inputs in other rows
    scored: bool  # whether the scores are in these too
    projected: bool  # whether inputs come projected
    streamed: bool  # whether each step reads the recurrent weights again
    slabs: (
        bool  # whether passes over tokens take what is summed over slab by slab, as registers do not hold it
    )
    stride: int
    precision: str  # of products, as tl.dot takes it
    approx: bool  # approximate instructions of NVIDIA GPUs
    block: int  # sequences or rows per program
    upstream: bool = False  # whether the states have a gradient
    final: bool = False  # whether the last ones have
    resident: bool = False  # whether passes over tokens keep weights on chip, for more tiles than one
    both: bool = False  # whether registers hold the sums of a gate's products with inputs and states at once
    scatter: bool = False  # whether gradients go to the rows of the inputs, else to positions

    @property
    def units(self) -> int:
        """The size of the state as tiles have it."""
        return max(16, triton.next_power_of_2(self.size))

    @property
    def columns(self) -> int:
        """The width of the inputs as tiles have it."""
        return max(16, triton.next_power_of_2(self.width))

    @property
    def fast(self) -> bool:
        """Whether the kernels with layouts written out take it."""
        return self.approx and max(self.units, self.columns) <= 64

    @property
    def attentive(self) -> bool:
        """Whether there is attention."""
        return self.scaled or self.cell != "gru"

    @property
    def weighs(self) -> bool:
        """Whether the attention is in the update."""
        return self.cell != "gru"

    @property
    def factor_names(self) -> tuple[str, ...]:
        """What backward keeps of a row."""
        names = ("r", "n", "kept", "hidden" if self.reset_after else "reset")
        return names + ("z",) * self.keeps + ("score",) * self.weighs

    @property
    def pitch(self) -> int:
        """The size of the state as factors and gradients of states have it: even, so that two units are one load.
        Behind an odd size, gradients are 0 and factors are finite."""
        return self.size + self.size % 2

    @property
    def factors(self) -> int:
        """How far apart rows of them lie."""
        return len(self.factor_names) * self.pitch

    @property
    def keeps(self) -> bool:
        """Whether the gate z is read."""
        return self.cell != "agru"


# ------------------------------------------------------------------------------------------------ the cell


@triton.jit
def sigmoid(x, APPROX: tl.constexpr):
    if APPROX:
        return 0.5 * tanh(0.5 * x, APPROX) + 0.5
    else:
        return 1 / (1 + tl.exp(-x))


@triton.jit
def move_to(z, a, SPEC: tl.constexpr):
    """How far the state moves to the candidate, from the keep gate and the attention."""
    if get(SPEC, "cell") == "agru":
        return a
    elif get(SPEC, "cell") == "paper":
        return a - a * z
    elif get(SPEC, "cell") == "official":
        return 1 - (1 - a) * z
    else:
        return 1 - z


@triton.jit
def weight(
    pointer, gate: tl.constexpr, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Of a gate's third of `[3H, WIDTH]`, zero past the edges, `[ROWS, COLUMNS]`."""
    SIZE: tl.constexpr = get(SPEC, "size")
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    inside = (row < SIZE) & (column < WIDTH)
    return tl.load(pointer + (gate * SIZE + row) * WIDTH + column, mask=inside, other=0.0)


@triton.jit
def input_weight(data, gate: tl.constexpr, SPEC: tl.constexpr):
    """`[units, columns]`."""
    UNITS: tl.constexpr = get(SPEC, "units")
    return weight(data.weight_ih, gate, 0, 0, UNITS, get(SPEC, "columns"), get(SPEC, "width"), SPEC)


@triton.jit
def state_weight(data, gate: tl.constexpr, SPEC: tl.constexpr):
    """`[units, units]`."""
    UNITS: tl.constexpr = get(SPEC, "units")
    return weight(data.weight_hh, gate, 0, 0, UNITS, UNITS, get(SPEC, "size"), SPEC)


@triton.jit
def held_weight(data, gate: tl.constexpr, SPEC: tl.constexpr):
    """What a program holds of the recurrent weights: nothing where steps read them."""
    if get(SPEC, "streamed"):
        return 0
    else:
        return state_weight(data, gate, SPEC)


@triton.jit
def weight_of(held, data, gate: tl.constexpr, SPEC: tl.constexpr):
    if get(SPEC, "streamed"):
        return state_weight(data, gate, SPEC)
    else:
        return held[gate]


@triton.jit
def bias(pointer, gate: tl.constexpr, SPEC: tl.constexpr):
    """A gate's third of `[3H]`: `[units]`."""
    unit = tl.arange(0, get(SPEC, "units"))
    SIZE: tl.constexpr = get(SPEC, "size")
    return tl.load(pointer + gate * SIZE + unit, mask=unit < SIZE, other=0.0).to(tl.float32)


@triton.jit
def both_biases(data, gate: tl.constexpr, SPEC: tl.constexpr):
    return bias(data.bias_ih, gate, SPEC) + bias(data.bias_hh, gate, SPEC)


# ------------------------------------------------------------------------------------------------ tiles


@triton.jit
def load_tile(pointer, row, stride, valid, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, other=0.0):
    """Rows of a matrix as columns, `other` where they are not valid: `[COLUMNS, rows]`."""
    column = tl.arange(0, COLUMNS)[:, None]
    mask = valid[None, :] & (column < WIDTH)
    return tl.load(pointer + row[None, :] * stride + column, mask=mask, other=other)


@triton.jit
def store_tile(pointer, tile, row, stride, valid, WIDTH: tl.constexpr):
    """The inverse of load_tile."""
    column = tl.arange(0, tile.shape[0])[:, None]
    mask = valid[None, :] & (column < WIDTH)
    tl.store(pointer + row[None, :] * stride + column, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def source(data, row, valid, SPEC: tl.constexpr):
    """Where the inputs of rows are."""
    if get(SPEC, "indexed"):
        return tl.load(data.index + row, mask=valid, other=0).to(tl.int64)
    else:
        return row


@triton.jit
def load_attention(data, row, at, valid, SPEC: tl.constexpr):
    """Of rows whose inputs are `at`."""
    if not get(SPEC, "attentive"):
        return tl.zeros([row.shape[0]], tl.float32)
    elif get(SPEC, "scored"):
        return tl.load(data.scores + at, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.load(data.scores + row, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_step(data, row, at, valid, SPEC: tl.constexpr):
    """What a step reads: the attention `[block]`, and the inputs `[columns, block]` or their projections for each gate
    `[units, block]`."""
    a = load_attention(data, row, at, valid, SPEC)
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    STRIDE: tl.constexpr = get(SPEC, "stride")
    if get(SPEC, "projected"):
        r = load_tile(data.inputs, row, STRIDE, valid, SIZE, UNITS)
        n = load_tile(data.inputs + 2 * SIZE, row, STRIDE, valid, SIZE, UNITS)
        if get(SPEC, "keeps"):
            return a, r, load_tile(data.inputs + SIZE, row, STRIDE, valid, SIZE, UNITS), n
        else:
            return a, r, r, n
    else:
        return a, load_tile(data.inputs, at, STRIDE, valid, get(SPEC, "width"), get(SPEC, "columns"))


@triton.jit
def sequences_of(program, data, SPEC: tl.constexpr):
    """The sequences of a program, which of them there are, where they begin, and their lengths: `[block]` each."""
    slot = program * get(SPEC, "block") + tl.arange(0, get(SPEC, "block"))
    live = slot < data.batch
    sequence = tl.load(data.order + slot, mask=live, other=0).to(tl.int64)
    begin = tl.load(data.offsets + sequence, mask=live, other=0).to(tl.int64)
    end = tl.load(data.offsets + sequence + 1, mask=live, other=0).to(tl.int64)
    return sequence, live, begin, (end - begin).to(tl.int32)


@triton.jit
def clear_slack(pointer, data, SPEC: tl.constexpr):
    """Zeroes the rows `[size]` behind the last sequence."""
    SIZE: tl.constexpr = get(SPEC, "size")
    unit = tl.arange(0, get(SPEC, "units"))
    row = tl.load(data.offsets + data.batch).to(tl.int64) + tl.program_id(0)
    while row < data.rows:
        tl.store(
            pointer + row * SIZE + unit, tl.zeros([unit.shape[0]], pointer.dtype.element_ty), mask=unit < SIZE
        )
        row += tl.num_programs(0)
