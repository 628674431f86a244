"""attentional_gru backward. Gates depend on the states alone, so all of it but a recurrence is done token by token.

Let dh be the gradient of the state after a step. With the gates known, the gradients e of a step's pre-activations
and what it passes on to the step before are linear in dh:

    coefficients   gates again, from the states; the factors of dh, written once and read by the others
    reverse        dh_t = grad_t + carry;  e = factors ⊙ dh_t;  carry = keep ⊙ dh_t + Σ W_gᵀ e_g
    gradients      of inputs and scores, from e = factors ⊙ dh
    weights        eᵀ x and eᵀ h over all rows, each program's part on its own

Where the reset gate comes before the product, e_r is linear in W_nᵀ e_n, which reverse has: there it puts e_r in the
place of its factor.
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
from .attentional_gru import SEQUENCES, prepare, specialize, step_options
from .attentional_gru_cell import held_weight, load_tile, sequences_of, store_tile, weight_of
from .attentional_gru_reverse_mma import reverse_mma_kernel
from .attentional_gru_rows import coefficients_kernel, gradients_kernel, place
from .attentional_gru_weights import weights_kernel
from .primitives import dot

# Rows of a tile and warps of the passes over tokens, by precision, and whether inputs or states are above 64 wide.
COEFFICIENTS = {
    ("half", False): (64, 8),
    ("half", True): (32, 8),
    ("tf32", False): (32, 8),
    ("tf32", True): (32, 8),
    ("ieee", False): (16, 4),
    ("ieee", True): (16, 8),
}
GRADIENTS = {
    ("half", False): (64, 8),
    ("half", True): (16, 8),
    ("tf32", False): (64, 8),
    ("tf32", True): (32, 8),
    ("ieee", False): (32, 8),
    ("ieee", True): (16, 8),
}
WEIGHTS = {
    ("half", False): (32, 4),
    ("half", True): (32, 8),
    ("tf32", False): (32, 8),
    ("tf32", True): (32, 8),
    ("ieee", False): (32, 8),
    ("ieee", True): (16, 8),
}
# Programs per multiprocessor of passes that keep weights on chip from tile to tile, in 16 bits up to 64 wide.
RESIDENT = 2
BOTH = (("half", False), ("tf32", False))  # which sum a gate's products with inputs and states at once
LEAST_ROWS, MOST_PARTS = 1024, 64  # of a program that sums over rows; of the programs


@triton.jit
def load_step_factor(factors, row, valid, other, name: tl.constexpr, SPEC: tl.constexpr):
    """`[units, block]`."""
    SIZE: tl.constexpr = get(SPEC, "size")
    pointer = factors + place(name, SPEC)
    return load_tile(pointer, row, get(SPEC, "factors"), valid, SIZE, get(SPEC, "units"), other)


@triton.jit
def load_factors(factors, grad_states, row, valid, SPEC: tl.constexpr):
    """The upstream gradient and the factors of a step. A step that there is not keeps all and adds nothing."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    if get(SPEC, "upstream"):
        grad = load_tile(grad_states, row, SIZE, valid, SIZE, UNITS).to(tl.float32)
    else:
        grad = tl.zeros([UNITS, get(SPEC, "block")], tl.float32)
    kept = load_step_factor(factors, row, valid, 1.0, "kept", SPEC)
    r = load_step_factor(factors, row, valid, 0.0, "r", SPEC)
    z = r
    if get(SPEC, "keeps"):
        z = load_step_factor(factors, row, valid, 0.0, "z", SPEC)
    if get(SPEC, "reset_after"):
        return grad, kept, r, z, load_step_factor(factors, row, valid, 0.0, "hidden", SPEC)
    else:
        n = load_step_factor(factors, row, valid, 0.0, "n", SPEC)
        return grad, kept, r, z, n, load_step_factor(factors, row, valid, 0.0, "reset", SPEC)


@triton.jit
def back_through(weights, data, gate: tl.constexpr, e, acc, SPEC: tl.constexpr):
    """Adds what a gate's product passes on to the state, `[units, block]`."""
    return dot(tl.trans(weight_of(weights, data, gate, SPEC)), e, acc, get(SPEC, "precision"))


@triton.jit
def step_back(data, dh, step, weights, SPEC: tl.constexpr):
    """The gradient of the state before a step, and of the pre-activation of r: `[units, block]` each."""
    kept = step[1].to(tl.float32)
    r = step[2].to(tl.float32)
    DTYPE: tl.constexpr = data.weight_hh.dtype.element_ty
    e_n = (dh * step[4].to(tl.float32)).to(DTYPE)
    carry = dh * kept
    if get(SPEC, "reset_after"):
        carry = back_through(weights, data, 2, e_n, carry, SPEC)
        e_r = dh * r
    else:
        reset = back_through(weights, data, 2, e_n, tl.zeros_like(dh), SPEC)
        carry += reset * step[5].to(tl.float32)
        e_r = reset * r
    carry = back_through(weights, data, 0, e_r.to(DTYPE), carry, SPEC)
    if get(SPEC, "keeps"):
        e_z = dh * step[3].to(tl.float32)
        carry = back_through(weights, data, 1, e_z.to(DTYPE), carry, SPEC)
    return carry, e_r


@triton.jit
def reverse_kernel(data, factors, grad_states, grad_last, grads, grad_initial, SPEC: tl.constexpr):
    """The gradient of the state after each step, `grads [T, pitch]`, and of the first."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    sequence, live, begin, length = sequences_of(tl.program_id(0), data, SPEC)
    carry = tl.zeros([UNITS, get(SPEC, "block")], tl.float32)
    if get(SPEC, "final"):
        carry = load_tile(grad_last, sequence, SIZE, live, SIZE, UNITS).to(tl.float32)
    weights = ()
    for gate in tl.static_range(3):
        weights = weights + (held_weight(data, gate, SPEC),)
    steps = tl.max(length, 0)
    # Masks say both that a step is one of the sequence and that there is one: a block may be of empty ones.
    step = load_factors(factors, grad_states, begin + steps - 1, (steps > 0) & (steps <= length), SPEC)
    for i in range(steps):
        t = steps - 1 - i
        before = (t > 0) & (t <= length)
        if not get(SPEC, "streamed"):
            ahead = load_factors(factors, grad_states, begin + t - 1, before, SPEC)
        dh = step[0] + carry
        store_tile(grads, dh, begin + t, get(SPEC, "pitch"), t < length, get(SPEC, "pitch"))
        carry, e_r = step_back(data, dh, step, weights, SPEC)
        if not get(SPEC, "reset_after"):
            pointer = factors + place("r", SPEC)
            store_tile(pointer, e_r, begin + t, get(SPEC, "factors"), t < length, SIZE)
        if get(SPEC, "streamed"):  # with weights in them there are no registers to read ahead into
            ahead = load_factors(factors, grad_states, begin + t - 1, before, SPEC)
        step = ahead
    if get(SPEC, "initial"):
        store_tile(grad_initial, carry, sequence, SIZE, live, SIZE)


# ------------------------------------------------------------------------------------------------ launcher


def backward(
    call: Any, states: Tensor, grad_states: Tensor | None, grad_last: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, scores, weights, biases and the initial state."""
    data = prepare(call)
    scan = replace(specialize(call), scatter=call.unique_rows)
    width, size, rows, batch = scan.width, scan.size, data.rows, data.batch
    new = call.inputs.new_empty
    # Rows of the inputs that no position reads are not written.
    zeros = call.inputs.new_zeros
    grad_inputs = zeros(call.inputs.shape) if scan.scatter else new(rows, width)
    grad_scores = None
    if call.scores is not None:
        grad_scores = zeros(call.scores.shape) if scan.scatter and scan.scored else new(rows)
    grad_initial = None if call.initial is None else new(batch, size)
    kept = grad_inputs if grad_scores is None else grad_scores
    factors, grads = new(rows, scan.factors), new(rows, scan.pitch)
    starts = _starts(data.offsets, rows)
    parts = max(1, min(MOST_PARTS, triton.cdiv(rows, LEAST_ROWS)))
    share = triton.cdiv(rows, parts)
    weights = states.new_zeros(parts, 3 * size * (width + size), dtype=torch.float32)
    biases = states.new_zeros(parts, 6 * size, dtype=torch.float32)
    if batch == 0 or rows == 0:
        grad_inputs.zero_()
        kept.zero_()
        if grad_initial is not None and grad_last is not None:
            grad_initial.copy_(grad_last)
        elif grad_initial is not None:
            grad_initial.zero_()
    else:
        reverse = replace(
            scan,
            upstream=grad_states is not None,
            final=grad_last is not None,
        )
        kind = settings.precision(call.inputs.dtype), max(width, size) > 64

        def passes(table: dict[tuple[str, bool], tuple[int, int]]) -> dict[str, Any]:
            block, warps = table[kind]
            spec = replace(scan, block=block, both=kind in BOTH, resident=kind == ("half", False))
            return {"SPEC": spec, "num_warps": warps}

        def tiles(table: dict[tuple[str, bool], tuple[int, int]]) -> tuple[int]:
            count = triton.cdiv(rows, table[kind][0])
            if kind == ("half", False):
                count = min(count, RESIDENT * settings.multiprocessors(states.device))
            return (count,)

        upstream, final = (grads if g is None else g.contiguous() for g in (grad_states, grad_last))
        coefficients_kernel[tiles(COEFFICIENTS)](data, states, starts, factors, **passes(COEFFICIENTS))
        (reverse_mma_kernel if scan.fast else reverse_kernel)[(triton.cdiv(batch, SEQUENCES),)](
            data,
            factors,
            upstream,
            final,
            grads,
            grads if grad_initial is None else grad_initial,
            SPEC=reverse,
            **step_options(scan),
        )
        gradients_kernel[tiles(GRADIENTS)](data, factors, grads, grad_inputs, kept, **passes(GRADIENTS))
        weights_kernel[(parts, 3)](
            data, states, starts, factors, grads, weights, biases, share, **passes(WEIGHTS)
        )
    weight, vector = weights.sum(0), biases.sum(0).view(2, 3 * size)
    weight_ih, weight_hh = weight.split([3 * size * width, 3 * size * size])
    return (
        grad_inputs,
        grad_scores,
        weight_ih.view(3 * size, width),
        weight_hh.view(3 * size, size),
        vector[0],
        vector[1],
        grad_initial,
    )


def _starts(offsets: Tensor, rows: int) -> Tensor:
    """`[T]`: the sequence that begins at a row, or -1."""
    begin = torch.where(offsets.diff() > 0, offsets[:-1], rows).to(torch.int64)
    sequence = torch.arange(begin.numel(), device=offsets.device, dtype=torch.int32)
    return torch.full((rows + 1,), -1, device=offsets.device, dtype=torch.int32).scatter_(0, begin, sequence)
