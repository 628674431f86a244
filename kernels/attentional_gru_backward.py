"""attentional_gru backward. Gates depend on the states alone, so all of it but a recurrence is done token by token.

Let dh be the gradient of the state after a step. With the gates of a step known, the gradients of its pre-activations
and what it passes on to the step before are linear in dh. Three kernels follow each other, and one that sums:

    coefficients   gates again, from the states; the factors of dh
    reverse        dh_t = grad_t + carry;  e = factors ⊙ dh_t;  carry = keep ⊙ dh_t + Σ W_gᵀ e_g
    gradients      gates again; e, and from it the gradients of inputs and scores
    weights        eᵀ x and eᵀ h over all rows, each program's part on its own
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import get
from .attentional_gru import (
    SEQUENCES,
    STEP_WARPS,
    bias,
    both_biases,
    input_weight,
    load_attention,
    load_tile,
    move_to,
    prepare,
    sequences_of,
    sigmoid,
    state_weight,
    store_tile,
)
from .primitives import dot, tanh

# Rows of a tile and warps of the passes over tokens, by the number of units, rounded up.
COEFFICIENTS = {16: (64, 4), 32: (64, 4), 64: (64, 8), 128: (64, 8)}
GRADIENTS = {16: (64, 4), 32: (64, 4), 64: (64, 8), 128: (64, 8)}
WEIGHTS = {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (64, 8)}
LEAST_ROWS, MOST_PARTS = 1024, 64  # of a program that sums over rows; of the programs


# ------------------------------------------------------------------------------------------------ tiles


@triton.jit
def load_rows(pointer, row, stride, valid, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a matrix, zero where they are not valid: `[rows, COLUMNS]`."""
    column = tl.arange(0, COLUMNS)[None, :]
    mask = valid[:, None] & (column < WIDTH)
    return tl.load(pointer + row[:, None] * stride + column, mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, tile, row, stride, valid, WIDTH: tl.constexpr):
    column = tl.arange(0, tile.shape[1])[None, :]
    mask = valid[:, None] & (column < WIDTH)
    tl.store(pointer + row[:, None] * stride + column, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_before(data, states, starts, row, valid, SPEC: tl.constexpr):
    """The states that rows start from: `[rows, units]`."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    started = tl.load(starts + row, mask=valid, other=0)  # the sequence that begins here, or -1
    h = load_rows(states, row - 1, SIZE, valid & (started < 0), SIZE, UNITS)
    if get(SPEC, "initial"):
        first = load_rows(data.initial, started.to(tl.int64), SIZE, valid & (started >= 0), SIZE, UNITS)
        return tl.where((started >= 0)[:, None], first, h)
    else:
        return h


@triton.jit
def load_inputs(data, row, a, valid, SPEC: tl.constexpr):
    """What the products read: `[rows, columns]`."""
    x = load_rows(data.inputs, row, get(SPEC, "stride"), valid, get(SPEC, "width"), get(SPEC, "columns"))
    if get(SPEC, "scaled"):
        x = (x.to(tl.float32) * a[:, None]).to(x.dtype)
    return x


# ------------------------------------------------------------------------------------------------ the cell


@triton.jit
def project(data, x, vector, gate: tl.constexpr, SPEC: tl.constexpr):
    """`[rows, units]`."""
    zero = tl.zeros([x.shape[0], get(SPEC, "units")], tl.float32)
    return dot(x, tl.trans(input_weight(data, gate, SPEC)), zero + vector[None, :], get(SPEC, "precision"))


@triton.jit
def recur(data, h, acc, gate: tl.constexpr, SPEC: tl.constexpr):
    return dot(h, tl.trans(state_weight(data, gate, SPEC)), acc, get(SPEC, "precision"))


@triton.jit
def gates(data, x, h, SPEC: tl.constexpr):
    """The gates r, z (r again where there is none) and n, and what the reset gate scales: `[rows, units]`."""
    APPROX: tl.constexpr = get(SPEC, "approx")
    r = project(data, x, both_biases(data, 0, SPEC), 0, SPEC)
    r = sigmoid(recur(data, h, r, 0, SPEC), APPROX)
    z = r
    if get(SPEC, "keeps"):
        z = project(data, x, both_biases(data, 1, SPEC), 1, SPEC)
        z = sigmoid(recur(data, h, z, 1, SPEC), APPROX)
    if get(SPEC, "reset_after"):
        zero = tl.zeros([x.shape[0], get(SPEC, "units")], tl.float32)
        hidden = recur(data, h, zero + bias(data.bias_hh, 2, SPEC)[None, :], 2, SPEC)
        n = project(data, x, bias(data.bias_ih, 2, SPEC), 2, SPEC) + r * hidden
    else:
        hidden = h.to(tl.float32)
        n = project(data, x, both_biases(data, 2, SPEC), 2, SPEC)
        n = recur(data, (r * hidden).to(h.dtype), n, 2, SPEC)
    return r, z, tanh(n, APPROX), hidden


@triton.jit
def move_by_keep(a, SPEC: tl.constexpr):
    """The derivative of move_to by the keep gate."""
    if get(SPEC, "cell") == "paper":
        return -a
    elif get(SPEC, "cell") == "official":
        return a - 1
    else:
        return a * 0 - 1


@triton.jit
def move_by_attention(z, SPEC: tl.constexpr):
    if get(SPEC, "cell") == "agru":
        return z * 0 + 1
    elif get(SPEC, "cell") == "paper":
        return 1 - z
    else:
        return z


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def coefficients_kernel(data, states, starts, factors, SPEC: tl.constexpr):
    """The factors of r, z and n, what is kept, and without reset_after r: `factors [T, 4 or 5, H]`."""
    SIZE: tl.constexpr = get(SPEC, "size")
    FACTORS: tl.constexpr = get(SPEC, "factors")
    row = tl.program_id(0).to(tl.int64) * get(SPEC, "block") + tl.arange(0, get(SPEC, "block"))
    valid = row < tl.load(data.offsets + data.batch)
    a = load_attention(data, row, valid, SPEC)
    x = load_inputs(data, row, a, valid, SPEC)
    h = load_before(data, states, starts, row, valid, SPEC)
    r, z, n, hidden = gates(data, x, h, SPEC)
    a = a[:, None]
    move = move_to(z, a, SPEC)
    through = move * (1 - n * n)
    slope = r * (1 - r) * hidden
    if get(SPEC, "reset_after"):
        store_rows(factors, slope * through, row, FACTORS, valid, SIZE)
        store_rows(factors + 2 * SIZE, through * r, row, FACTORS, valid, SIZE)
    else:
        store_rows(factors, slope, row, FACTORS, valid, SIZE)
        store_rows(factors + 2 * SIZE, through, row, FACTORS, valid, SIZE)
        store_rows(factors + 4 * SIZE, r, row, FACTORS, valid, SIZE)
    if get(SPEC, "keeps"):
        keep = (n - h.to(tl.float32)) * z * (1 - z) * move_by_keep(a, SPEC)
        store_rows(factors + SIZE, keep, row, FACTORS, valid, SIZE)
    store_rows(factors + 3 * SIZE, tl.zeros_like(n) + (1 - move), row, FACTORS, valid, SIZE)


@triton.jit
def load_factors(factors, grad_states, row, valid, SPEC: tl.constexpr):
    """The upstream gradient and the factors of a step. A step that there is not keeps all and adds nothing."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    FACTORS: tl.constexpr = get(SPEC, "factors")
    if get(SPEC, "upstream"):
        grad = load_tile(grad_states, row, SIZE, valid, SIZE, UNITS).to(tl.float32)
    else:
        grad = tl.zeros([UNITS, get(SPEC, "block")], tl.float32)
    r = load_tile(factors, row, FACTORS, valid, SIZE, UNITS)
    z = r
    if get(SPEC, "keeps"):
        z = load_tile(factors + SIZE, row, FACTORS, valid, SIZE, UNITS)
    n = load_tile(factors + 2 * SIZE, row, FACTORS, valid, SIZE, UNITS)
    keep = load_tile(factors + 3 * SIZE, row, FACTORS, valid, SIZE, UNITS, other=1.0)
    if get(SPEC, "reset_after"):
        return grad, r, z, n, keep
    else:
        return grad, r, z, n, keep, load_tile(factors + 4 * SIZE, row, FACTORS, valid, SIZE, UNITS)


@triton.jit
def step_back(dh, step, weights, SPEC: tl.constexpr):
    """The gradient of the state before a step: `[units, block]`."""
    PRECISION: tl.constexpr = get(SPEC, "precision")
    _, r, z, n, keep = step[:5]
    carry = dh * keep.to(tl.float32)
    e = (dh * n.to(tl.float32)).to(weights[0].dtype)
    if get(SPEC, "reset_after"):
        carry = dot(weights[2], e, carry, PRECISION)
        e = dh * r.to(tl.float32)
    else:
        reset = dot(weights[2], e, tl.zeros_like(dh), PRECISION)
        carry += reset * step[5].to(tl.float32)
        e = reset * r.to(tl.float32)
    carry = dot(weights[0], e.to(weights[0].dtype), carry, PRECISION)
    if get(SPEC, "keeps"):
        carry = dot(weights[1], (dh * z.to(tl.float32)).to(weights[1].dtype), carry, PRECISION)
    return carry


@triton.jit
def reverse_kernel(data, factors, grad_states, grad_last, grads, grad_initial, SPEC: tl.constexpr):
    """The gradient of the state after each step, `grads [T, H]`, and of the first."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    sequence, live, begin, length = sequences_of(tl.program_id(0), data, SPEC)
    carry = tl.zeros([UNITS, get(SPEC, "block")], tl.float32)
    if get(SPEC, "final"):
        carry = load_tile(grad_last, sequence, SIZE, live, SIZE, UNITS).to(tl.float32)
    weights = ()
    for gate in tl.static_range(3):
        weights = weights + (tl.trans(state_weight(data, gate, SPEC)),)
    steps = tl.max(length, 0)
    step = load_factors(factors, grad_states, begin + steps - 1, (steps > 0) & (steps <= length), SPEC)
    for i in range(steps):
        t = steps - 1 - i
        ahead = load_factors(factors, grad_states, begin + t - 1, (t > 0) & (t <= length), SPEC)
        dh = step[0] + carry
        store_tile(grads, dh, begin + t, SIZE, t < length, SIZE)
        carry = step_back(dh, step, weights, SPEC)
        step = ahead
    if get(SPEC, "initial"):
        store_tile(grad_initial, carry, sequence, SIZE, live, SIZE)


@triton.jit
def back_through(data, e, acc, gate: tl.constexpr, SPEC: tl.constexpr):
    """A gate's part of the gradient of the inputs, `[rows, columns]`."""
    return dot(e, input_weight(data, gate, SPEC), acc, get(SPEC, "precision"))


@triton.jit
def gradients_kernel(data, states, starts, grads, errors, grad_inputs, grad_scores, SPEC: tl.constexpr):
    """The gradients of the inputs and the scores, and of the pre-activations, `errors [T, 4, H]`: r, z, n, and behind
    the reset gate n again, or without reset_after what the candidate's product reads."""
    SIZE: tl.constexpr = get(SPEC, "size")
    WIDTH: tl.constexpr = get(SPEC, "width")
    row = tl.program_id(0).to(tl.int64) * get(SPEC, "block") + tl.arange(0, get(SPEC, "block"))
    inside = row < data.rows
    valid = row < tl.load(data.offsets + data.batch)
    a = load_attention(data, row, valid, SPEC)
    x = load_inputs(data, row, a, valid, SPEC)
    h = load_before(data, states, starts, row, valid, SPEC)
    r, z, n, hidden = gates(data, x, h, SPEC)
    dh = load_rows(grads, row, SIZE, valid, SIZE, get(SPEC, "units")).to(tl.float32)
    move = move_to(z, a[:, None], SPEC)
    distance = n - h.to(tl.float32)
    e_n = dh * move * (1 - n * n)
    grad = tl.zeros([get(SPEC, "block"), get(SPEC, "columns")], tl.float32)
    grad = back_through(data, e_n.to(x.dtype), grad, 2, SPEC)
    if get(SPEC, "reset_after"):
        e_r = e_n * hidden * r * (1 - r)
        fourth = e_n * r
    else:
        reset = dot(e_n.to(x.dtype), state_weight(data, 2, SPEC), tl.zeros_like(dh), get(SPEC, "precision"))
        e_r = reset * hidden * r * (1 - r)
        fourth = r * hidden
    grad = back_through(data, e_r.to(x.dtype), grad, 0, SPEC)
    store_rows(errors, e_r, row, 4 * SIZE, valid, SIZE)
    store_rows(errors + 2 * SIZE, e_n, row, 4 * SIZE, valid, SIZE)
    store_rows(errors + 3 * SIZE, fourth, row, 4 * SIZE, valid, SIZE)
    if get(SPEC, "keeps"):
        e_z = dh * distance * z * (1 - z) * move_by_keep(a[:, None], SPEC)
        grad = back_through(data, e_z.to(x.dtype), grad, 1, SPEC)
        store_rows(errors + SIZE, e_z, row, 4 * SIZE, valid, SIZE)
    if get(SPEC, "scaled"):
        raw = load_rows(data.inputs, row, get(SPEC, "stride"), valid, WIDTH, get(SPEC, "columns"))
        grad_a = tl.sum(grad * raw.to(tl.float32), 1)
        grad = grad * a[:, None]
    elif get(SPEC, "attentive"):
        grad_a = tl.sum(dh * distance * move_by_attention(z, SPEC), 1)
    store_rows(grad_inputs, grad, row, WIDTH, inside, WIDTH)
    if get(SPEC, "attentive"):
        tl.store(grad_scores + row, grad_a.to(grad_scores.dtype.element_ty), mask=inside)


@triton.jit
def load_operand(data, states, starts, errors, row, valid, gate, of_state: tl.constexpr, SPEC: tl.constexpr):
    """What a gate's product reads: `[rows, columns]`, or of the states `[rows, units]`."""
    if of_state:
        if get(SPEC, "reset_after"):
            return load_before(data, states, starts, row, valid, SPEC)
        else:
            SIZE: tl.constexpr = get(SPEC, "size")
            UNITS: tl.constexpr = get(SPEC, "units")
            h = load_before(data, states, starts, row, valid & (gate < 2), SPEC)
            reset = load_rows(errors + 3 * SIZE, row, 4 * SIZE, valid & (gate == 2), SIZE, UNITS)
            return tl.where(gate == 2, reset, h)
    else:
        return load_inputs(data, row, load_attention(data, row, valid, SPEC), valid, SPEC)


@triton.jit
def sum_products(
    data,
    states,
    starts,
    errors,
    weights,
    biases,
    begin,
    end,
    gate,
    of_state: tl.constexpr,
    SPEC: tl.constexpr,
):
    """The rows from begin to end of a gate's weight gradient and bias gradient."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    BLOCK: tl.constexpr = get(SPEC, "block")
    WIDTH: tl.constexpr = SIZE if of_state else get(SPEC, "width")
    COLUMNS: tl.constexpr = UNITS if of_state else get(SPEC, "columns")
    slot = gate
    if of_state and get(SPEC, "reset_after"):
        slot = tl.where(gate == 2, 3, gate)  # the candidate's behind the reset gate
    acc = tl.zeros([UNITS, COLUMNS], tl.float32)
    total = tl.zeros([BLOCK, UNITS], tl.float32)  # summed over rows at last
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        valid = row < end
        e = load_rows(errors + slot * SIZE, row, 4 * SIZE, valid, SIZE, UNITS)
        operand = load_operand(data, states, starts, errors, row, valid, gate, of_state, SPEC)
        acc = dot(tl.trans(e), operand, acc, get(SPEC, "precision"))
        total += e.to(tl.float32)
    unit = tl.arange(0, UNITS)
    store_rows(weights + gate * SIZE * WIDTH, acc, unit, WIDTH, unit < SIZE, WIDTH)
    tl.store(biases + gate * SIZE + unit, tl.sum(total, 0), mask=unit < SIZE)


@triton.jit
def weights_kernel(data, states, starts, errors, weights, biases, share, SPEC: tl.constexpr):
    """One program per part of the rows, and gate of `weight_ih` or of `weight_hh`."""
    SIZE: tl.constexpr = get(SPEC, "size")
    WIDTH: tl.constexpr = get(SPEC, "width")
    part = tl.program_id(0).to(tl.int64)
    begin = part * share
    end = tl.minimum(begin + share, tl.load(data.offsets + data.batch).to(tl.int64))
    weights += part * 3 * SIZE * (WIDTH + SIZE)
    biases += part * 6 * SIZE
    gate = tl.program_id(1)
    if gate % 3 != 1 or get(SPEC, "keeps"):
        if gate < 3:
            sum_products(data, states, starts, errors, weights, biases, begin, end, gate, False, SPEC)
        else:
            weights += 3 * SIZE * WIDTH
            biases += 3 * SIZE
            sum_products(data, states, starts, errors, weights, biases, begin, end, gate - 3, True, SPEC)


# ------------------------------------------------------------------------------------------------ launcher


def backward(
    call: Any, states: Tensor, grad_states: Tensor | None, grad_last: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, scores, weights, biases and the initial state."""
    data, scan = prepare(call)
    width, size, rows, batch = scan.width, scan.size, data.rows, data.batch
    new = call.inputs.new_empty
    grad_inputs = new(rows, width)
    grad_scores = None if call.scores is None else new(rows)
    grad_initial = None if call.initial is None else new(batch, size)
    kept = grad_inputs if grad_scores is None else grad_scores
    factors = new(rows, 4 if scan.reset_after else 5, size)
    grads, errors = new(rows, size), new(rows, 4, size)
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
            factors=factors.stride(0),
            upstream=grad_states is not None,
            final=grad_last is not None,
        )
        units = max(scan.units, scan.columns)

        def passes(table: dict[int, tuple[int, int]]) -> dict[str, Any]:
            block, warps = table[units]
            return {"SPEC": replace(scan, factors=factors.stride(0), block=block), "num_warps": warps}

        def tiles(table: dict[int, tuple[int, int]]) -> tuple[int]:
            return (triton.cdiv(rows, table[units][0]),)

        upstream, final = (grads if g is None else g.contiguous() for g in (grad_states, grad_last))
        coefficients_kernel[tiles(COEFFICIENTS)](data, states, starts, factors, **passes(COEFFICIENTS))
        reverse_kernel[(triton.cdiv(batch, SEQUENCES),)](
            data,
            factors,
            upstream,
            final,
            grads,
            grads if grad_initial is None else grad_initial,
            SPEC=reverse,
            num_warps=STEP_WARPS[scan.units],
        )
        gradients_kernel[tiles(GRADIENTS)](
            data, states, starts, grads, errors, grad_inputs, kept, **passes(GRADIENTS)
        )
        weights_kernel[(parts, 6)](data, states, starts, errors, weights, biases, share, **passes(WEIGHTS))
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
