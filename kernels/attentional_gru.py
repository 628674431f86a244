"""attentional_gru forward: one kernel, a program of which runs a few sequences of about the same length to their ends.

Tiles are transposed, units by sequences: a product with the recurrent weights then reads the state as its right
operand, and eight sequences, as few as a product takes, share a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .arguments import get
from .attentional_gru_mma import scan_mma_kernel
from .primitives import dot, tanh

WIDEST = 128  # of inputs and states
OTHER_BYTES = 8 << 10  # of a program's memory, that weights do not take
SEQUENCES = 8  # of a program
STEP_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}  # by the number of units, rounded up


class Scan(NamedTuple):
    """The data. Rows of the inputs lie `Spec.stride` apart."""

    inputs: Tensor  # [T, I], or their projections [T, 3H]
    scores: Tensor  # [T]
    offsets: Tensor  # [B + 1]
    order: Tensor  # [B], the sequences by descending length
    initial: Tensor  # [B, H]
    weight_ih: Tensor  # [3H, I]
    weight_hh: Tensor  # [3H, H]
    bias_ih: Tensor  # [3H]
    bias_hh: Tensor  # [3H]
    batch: int
    rows: int


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Nothing here depends on a length or on the size of the batch."""

    width: int  # of the inputs
    size: int  # of the state
    cell: str  # "gru", "agru", "paper" or "official"
    scaled: bool  # whether the attention multiplies the inputs
    reset_after: bool
    initial: bool  # whether there are states to start from
    projected: bool  # whether inputs come projected
    stride: int
    precision: str  # of products, as tl.dot takes it
    approx: bool  # approximate instructions of NVIDIA GPUs
    block: int  # sequences or rows per program
    upstream: bool = False  # whether the states have a gradient
    final: bool = False  # whether the last ones have

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
    def factors(self) -> int:
        """How far apart rows of them lie."""
        return len(self.factor_names) * self.size

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
def weight(pointer, gate: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    """A gate's third of `[3H, WIDTH]`, zero past the edges: `[units, COLUMNS]`."""
    SIZE: tl.constexpr = get(SPEC, "size")
    row = tl.arange(0, get(SPEC, "units"))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < SIZE) & (column < WIDTH)
    return tl.load(pointer + (gate * SIZE + row) * WIDTH + column, mask=inside, other=0.0)


@triton.jit
def input_weight(data, gate: tl.constexpr, SPEC: tl.constexpr):
    return weight(data.weight_ih, gate, get(SPEC, "width"), get(SPEC, "columns"), SPEC)


@triton.jit
def state_weight(data, gate: tl.constexpr, SPEC: tl.constexpr):
    return weight(data.weight_hh, gate, get(SPEC, "size"), get(SPEC, "units"), SPEC)


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
def load_attention(data, row, valid, SPEC: tl.constexpr):
    if get(SPEC, "attentive"):
        return tl.load(data.scores + row, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.zeros([row.shape[0]], tl.float32)


@triton.jit
def load_step(data, row, valid, SPEC: tl.constexpr):
    """What a step reads: the attention `[block]`, and the inputs `[columns, block]` or their projections for each gate
    `[units, block]`."""
    a = load_attention(data, row, valid, SPEC)
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
        return a, load_tile(data.inputs, row, STRIDE, valid, get(SPEC, "width"), get(SPEC, "columns"))


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


# ------------------------------------------------------------------------------------------------ forward


@triton.jit
def project(step, weights, biases, gate: tl.constexpr, SPEC: tl.constexpr):
    """The inputs' part of a gate's pre-activation, with a bias: `[units, block]`."""
    if get(SPEC, "projected"):
        return step[1 + gate].to(tl.float32) + biases[gate][:, None]
    else:
        x = step[1]
        if get(SPEC, "scaled"):
            x = (x.to(tl.float32) * step[0][None, :]).to(x.dtype)
        zero = tl.zeros([get(SPEC, "units"), get(SPEC, "block")], tl.float32)
        return dot(weights[gate], x, zero + biases[gate][:, None], get(SPEC, "precision"))


@triton.jit
def advance(h, step, input_weights, state_weights, biases, SPEC: tl.constexpr):
    """The state after a step: `[units, block]`."""
    PRECISION: tl.constexpr = get(SPEC, "precision")
    APPROX: tl.constexpr = get(SPEC, "approx")
    state = h.to(state_weights[0].dtype)
    r = dot(state_weights[0], state, project(step, input_weights, biases, 0, SPEC), PRECISION)
    r = sigmoid(r, APPROX)
    n = project(step, input_weights, biases, 2, SPEC)
    if get(SPEC, "reset_after"):
        zero = tl.zeros([get(SPEC, "units"), get(SPEC, "block")], tl.float32)
        n += r * dot(state_weights[2], state, zero + biases[3][:, None], PRECISION)
    else:
        n = dot(state_weights[2], (r * h).to(state.dtype), n, PRECISION)
    n = tanh(n, APPROX)
    z = r
    if get(SPEC, "keeps"):
        z = dot(state_weights[1], state, project(step, input_weights, biases, 1, SPEC), PRECISION)
        z = sigmoid(z, APPROX)
    return h + move_to(z, step[0][None, :], SPEC) * (n - h)


@triton.jit
def scan_kernel(data, states, last, SPEC: tl.constexpr):
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    sequence, live, begin, length = sequences_of(tl.program_id(0), data, SPEC)
    clear_slack(states, data, SPEC)
    h = tl.zeros([UNITS, get(SPEC, "block")], tl.float32)
    if get(SPEC, "initial"):
        h = load_tile(data.initial, sequence, SIZE, live, SIZE, UNITS).to(tl.float32)
    input_weights = ()
    state_weights = ()
    for gate in tl.static_range(3):
        if get(SPEC, "projected"):
            input_weights = input_weights + (0,)
        else:
            input_weights = input_weights + (input_weight(data, gate, SPEC),)
        state_weights = state_weights + (state_weight(data, gate, SPEC),)
    inner = bias(data.bias_hh, 2, SPEC)
    outer = bias(data.bias_ih, 2, SPEC)
    if not get(SPEC, "reset_after"):
        outer += inner
    biases = (both_biases(data, 0, SPEC), both_biases(data, 1, SPEC), outer, inner)
    step = load_step(data, begin, length > 0, SPEC)
    for t in range(tl.max(length, 0)):
        ahead = load_step(data, begin + t + 1, t + 1 < length, SPEC)
        valid = t < length
        h = tl.where(valid[None, :], advance(h, step, input_weights, state_weights, biases, SPEC), h)
        store_tile(states, h, begin + t, SIZE, valid, SIZE)
        step = ahead
    store_tile(last, h, sequence, SIZE, live, SIZE)


def uncovered(call: Any) -> str | None:
    """Why no kernel here takes this call, or None if one does."""
    if call.inputs.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel computes in {call.inputs.dtype}"
    widest = max(call.inputs.shape[1], call.size)
    if widest > WIDEST:
        return f"kernels take inputs and states up to {WIDEST} wide, not {widest}"
    spec = specialize(call)
    if not fits(spec, spec.units, call.inputs):
        return f"the recurrent weights of {call.size} units in {call.inputs.dtype} do not stay on chip"
    return None


def kernel_of(call: Any) -> settings.Kernel:
    """The kernel that forward launches for a call that is covered."""
    if specialize(call).fast:
        return settings.Kernel("layouts", "16 bits, inputs and states up to 64 wide")
    return settings.Kernel("portable", "not 16 bits and up to 64 wide on an NVIDIA GPU")


def forward(call: Any) -> tuple[Tensor, Tensor]:
    """`states [T, H]` and `last [B, H]` of a `recattn.composite.attentional_gru.Recurrence`."""
    data, spec = prepare(call), specialize(call)
    states = call.inputs.new_empty(data.rows, spec.size)
    last = call.inputs.new_empty(data.batch, spec.size)
    if data.batch == 0:
        return states.zero_(), last
    if not fits(spec, spec.units + spec.columns, states):
        inputs = call.inputs * call.scores.unsqueeze(1) if spec.scaled else call.inputs
        data = data._replace(inputs=inputs @ call.weight_ih.t())
        spec = replace(spec, projected=True, stride=3 * spec.size)
    (scan_mma_kernel if spec.fast else scan_kernel)[(triton.cdiv(data.batch, SEQUENCES),)](
        data, states, last, SPEC=spec, num_warps=STEP_WARPS[spec.units]
    )
    return states, last


def prepare(call: Any) -> Scan:
    """A call as the kernels take it."""
    inputs = call.inputs if _near(call.inputs) else call.inputs.contiguous()
    offsets = call.offsets.contiguous()
    return Scan(
        inputs=inputs,
        scores=inputs if call.scores is None else call.scores.contiguous(),
        offsets=offsets,
        order=torch.argsort(offsets.diff(), descending=True, stable=True),
        initial=inputs if call.initial is None else call.initial.contiguous(),
        weight_ih=call.weight_ih.contiguous(),
        weight_hh=call.weight_hh.contiguous(),
        bias_ih=call.bias_ih.contiguous(),
        bias_hh=call.bias_hh.contiguous(),
        batch=call.batch,
        rows=inputs.shape[0],
    )


def specialize(call: Any) -> Spec:
    precision = settings.precision(call.inputs.dtype)
    nvidia = torch.version.hip is None
    return Spec(
        width=call.inputs.shape[1],
        size=call.size,
        cell={"aigru": "gru", "augru": call.update}.get(call.kind, call.kind),
        scaled=call.kind == "aigru",
        reset_after=call.reset_after,
        initial=call.initial is not None,
        projected=False,
        stride=call.inputs.stride(0) if _near(call.inputs) else call.inputs.shape[1],
        precision="tf32" if precision != "ieee" else "tf32x3" if nvidia else "ieee",
        approx=precision == "half" and nvidia and not triton.knobs.runtime.interpret,
        block=SEQUENCES,
    )


def fits(spec: Spec, columns: int, like: Tensor) -> bool:
    """Whether a program can keep weights `[3, units, columns]`, where "tf32x3" has two parts of each."""
    parts = 2 if spec.precision == "tf32x3" else 1
    needed = 3 * spec.units * columns * like.element_size() * parts
    return needed + OTHER_BYTES <= settings._shared_memory(like.device)


def _near(inputs: Tensor) -> bool:
    """Whether 32 bits reach across a tile of rows, whose elements lie together."""
    return inputs.stride(1) == 1 and inputs.stride(0) < 1 << 24
