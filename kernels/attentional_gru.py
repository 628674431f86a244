"""attentional_gru forward: one kernel, a program of which runs a few sequences of about the same length to their ends.

Tiles are transposed, units by sequences: a product with the recurrent weights then reads the state as its right
operand, and eight sequences, as few as a product takes, share a step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .arguments import get
from .attentional_gru_cell import (
    Scan,
    Spec,
    bias,
    both_biases,
    clear_slack,
    held_weight,
    input_weight,
    load_step,
    load_tile,
    move_to,
    sequences_of,
    sigmoid,
    source,
    store_tile,
    weight_of,
)
from .attentional_gru_mma import scan_mma_kernel
from .attentional_gru_rows import project_kernel
from .primitives import dot, tanh

WIDEST = 128  # of inputs and states
OTHER_BYTES = 8 << 10  # of a program's memory, that weights do not take
SEQUENCES = 8  # of a program
PROJECTIONS = {"half": (32, 8), "tf32": (32, 8), "ieee": (32, 8)}  # rows of a tile and warps, by precision
STEP_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}  # by the number of units, rounded up


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
def advance(data, h, step, input_weights, state_weights, biases, SPEC: tl.constexpr):
    """The state after a step: `[units, block]`."""
    PRECISION: tl.constexpr = get(SPEC, "precision")
    APPROX: tl.constexpr = get(SPEC, "approx")
    state = h.to(data.weight_hh.dtype.element_ty)
    r = project(step, input_weights, biases, 0, SPEC)
    r = sigmoid(dot(weight_of(state_weights, data, 0, SPEC), state, r, PRECISION), APPROX)
    n = project(step, input_weights, biases, 2, SPEC)
    if get(SPEC, "reset_after"):
        zero = tl.zeros([get(SPEC, "units"), get(SPEC, "block")], tl.float32)
        n += r * dot(weight_of(state_weights, data, 2, SPEC), state, zero + biases[3][:, None], PRECISION)
    else:
        n = dot(weight_of(state_weights, data, 2, SPEC), (r * h).to(state.dtype), n, PRECISION)
    n = tanh(n, APPROX)
    z = r
    if get(SPEC, "keeps"):
        z = project(step, input_weights, biases, 1, SPEC)
        z = sigmoid(dot(weight_of(state_weights, data, 1, SPEC), state, z, PRECISION), APPROX)
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
        state_weights = state_weights + (held_weight(data, gate, SPEC),)
    inner = bias(data.bias_hh, 2, SPEC)
    outer = bias(data.bias_ih, 2, SPEC)
    if not get(SPEC, "reset_after"):
        outer += inner
    biases = (both_biases(data, 0, SPEC), both_biases(data, 1, SPEC), outer, inner)
    step = load_step(data, begin, source(data, begin, length > 0, SPEC), length > 0, SPEC)
    at = source(data, begin + 1, length > 1, SPEC)
    for t in range(tl.max(length, 0)):
        ahead = load_step(data, begin + t + 1, at, t + 1 < length, SPEC)
        at = source(data, begin + t + 2, t + 2 < length, SPEC)
        valid = t < length
        h = tl.where(valid[None, :], advance(data, h, step, input_weights, state_weights, biases, SPEC), h)
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
    units = specialize(call).units
    if units * units * call.inputs.element_size() + OTHER_BYTES > settings._shared_memory(call.inputs.device):
        return f"the weights of a gate of {call.size} units in {call.inputs.dtype} do not fit on chip"
    return None


def kernel_of(call: Any) -> settings.Kernel:
    """The kernel that forward launches for a call that is covered."""
    if specialize(call).fast:
        return settings.Kernel("layouts", "16 bits, inputs and states up to 64 wide")
    return settings.Kernel("portable", "not 16 bits and up to 64 wide on an NVIDIA GPU")


def forward(call: Any) -> tuple[Tensor, Tensor]:
    """`states [T, H]` and `last [B, H]` of a `recattn.composite.attentional_gru.Recurrence`."""
    data, spec = prepare(call), specialize(call)
    states = call.inputs.new_empty(call.positions, spec.size)
    last = call.inputs.new_empty(data.batch, spec.size)
    if data.batch == 0:
        return states.zero_(), last
    if not _fits(spec, spec.units + spec.columns, states):
        projections = states.new_empty(data.rows, 3 * spec.size)
        block, warps = PROJECTIONS[settings.precision(states.dtype)]
        project_kernel[(triton.cdiv(data.rows, block),)](
            data, projections, SPEC=replace(spec, block=block), num_warps=warps
        )
        data = data._replace(inputs=projections)
        spec = replace(spec, projected=True, stride=3 * spec.size)
    (scan_mma_kernel if spec.fast else scan_kernel)[(triton.cdiv(data.batch, SEQUENCES),)](
        data, states, last, SPEC=spec, **step_options(spec)
    )
    return states, last


def step_options(spec: Spec) -> dict[str, int]:
    """Of a launch. Weights that each step reads have no room to be read ahead."""
    return {"num_warps": STEP_WARPS[spec.units], "num_stages": 1 if spec.streamed else 3}


def prepare(call: Any) -> Scan:
    """A call as the kernels take it."""
    inputs = call.inputs if _near(call.inputs) else call.inputs.contiguous()
    offsets = call.offsets.contiguous()
    return Scan(
        inputs=inputs,
        scores=inputs if call.scores is None else call.scores.contiguous(),
        index=offsets if call.rows is None else call.rows.contiguous(),
        offsets=offsets,
        order=torch.argsort(offsets.diff(), descending=True, stable=True),
        initial=inputs if call.initial is None else call.initial.contiguous(),
        weight_ih=call.weight_ih.contiguous(),
        weight_hh=call.weight_hh.contiguous(),
        bias_ih=call.bias_ih.contiguous(),
        bias_hh=call.bias_hh.contiguous(),
        batch=call.batch,
        rows=call.positions,
    )


def specialize(call: Any) -> Spec:
    precision = settings.precision(call.inputs.dtype)
    nvidia = torch.version.hip is None
    spec = Spec(
        width=call.inputs.shape[1],
        size=call.size,
        cell={"aigru": "gru", "augru": call.update}.get(call.kind, call.kind),
        scaled=call.kind == "aigru",
        reset_after=call.reset_after,
        initial=call.initial is not None,
        indexed=call.rows is not None,
        scored=call.row_scores,
        projected=False,
        streamed=False,
        slabs=precision != "half" and max(call.inputs.shape[1], call.size) > 64,
        stride=call.inputs.stride(0) if _near(call.inputs) else call.inputs.shape[1],
        precision="tf32" if precision != "ieee" else "tf32x3" if nvidia else "ieee",
        approx=precision == "half" and nvidia and not triton.knobs.runtime.interpret,
        block=SEQUENCES,
    )
    return replace(spec, streamed=not _fits(spec, spec.units, call.inputs))


def _fits(spec: Spec, columns: int, like: Tensor) -> bool:
    """Whether a program can keep weights `[3, units, columns]`, where "tf32x3" has two parts of each."""
    parts = 2 if spec.precision == "tf32x3" else 1
    needed = 3 * spec.units * columns * like.element_size() * parts
    return needed + OTHER_BYTES <= settings._shared_memory(like.device)


def _near(inputs: Tensor) -> bool:
    """Whether 32 bits reach across a tile of rows, whose elements lie together."""
    return inputs.stride(1) == 1 and inputs.stride(0) < 1 << 24
