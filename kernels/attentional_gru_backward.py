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

ROWS = 64  # of a tile of the passes over tokens
PASS_WARPS = {16: 4, 32: 4, 64: 4, 128: 8}  # by the number of units, rounded up
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
    step = load_factors(factors, grad_states, begin + steps - 1, steps <= length, SPEC)
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
def add_product(data, states, starts, errors, row, valid, acc, total, slot: tl.constexpr, of_state: tl.constexpr,
                SPEC: tl.constexpr):  # fmt: skip
    """Adds a tile of rows to a gate's weight gradient and to its bias gradient, this before it is summed over rows."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    e = load_rows(errors + slot * SIZE, row, 4 * SIZE, valid, SIZE, UNITS)
    if of_state and slot == 2 and not get(SPEC, "reset_after"):
        operand = load_rows(errors + 3 * SIZE, row, 4 * SIZE, valid, SIZE, UNITS)
    elif of_state:
        operand = load_before(data, states, starts, row, valid, SPEC)
    else:
        operand = load_inputs(data, row, load_attention(data, row, valid, SPEC), valid, SPEC)
    return dot(tl.trans(e), operand, acc, get(SPEC, "precision")), total + e.to(tl.float32)


@triton.jit
def sum_products(
    data, states, starts, errors, weights, biases, share, slot: tl.constexpr, of_state: tl.constexpr,
    SPEC: tl.constexpr,
):  # fmt: skip
    """A program's rows of one gate, of the inputs or of the states."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    BLOCK: tl.constexpr = get(SPEC, "block")
    WIDTH: tl.constexpr = SIZE if of_state else get(SPEC, "width")
    COLUMNS: tl.constexpr = UNITS if of_state else get(SPEC, "columns")
    acc = tl.zeros([UNITS, COLUMNS], tl.float32)
    total = tl.zeros([BLOCK, UNITS], tl.float32)
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, tl.load(data.offsets + data.batch).to(tl.int64))
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        acc, total = add_product(
            data, states, starts, errors, row, row < end, acc, total, slot, of_state, SPEC
        )
    unit = tl.arange(0, UNITS)
    store_rows(weights, acc, unit, WIDTH, unit < SIZE, WIDTH)
    tl.store(biases + unit, tl.sum(total, 0), mask=unit < SIZE)


@triton.jit
def weights_kernel(data, states, starts, errors, weights, biases, share, SPEC: tl.constexpr):
    """One program per part of the rows and gate: its sums for `weight_ih`, `weight_hh` and both biases."""
    SIZE: tl.constexpr = get(SPEC, "size")
    WIDTH: tl.constexpr = get(SPEC, "width")
    part = tl.program_id(0).to(tl.int64)
    ih = weights + part * 3 * SIZE * (WIDTH + SIZE)
    hh = ih + 3 * SIZE * WIDTH
    b_ih = biases + part * 6 * SIZE
    b_hh = b_ih + 3 * SIZE
    for gate in tl.static_range(3):
        if (gate != 1) or get(SPEC, "keeps"):
            slot: tl.constexpr = 3 if gate == 2 and get(SPEC, "reset_after") else gate
            if tl.program_id(1) == gate:
                sum_products(
                    data, states, starts, errors, ih + gate * SIZE * WIDTH, b_ih + gate * SIZE, share, gate, False,
                    SPEC,
                )  # fmt: skip
            if tl.program_id(1) == 3 + gate:
                sum_products(
                    data, states, starts, errors, hh + gate * SIZE * SIZE, b_hh + gate * SIZE, share, slot, True,
                    SPEC,
                )  # fmt: skip


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
        rowwise = replace(reverse, block=ROWS, upstream=False, final=False)
        upstream, final = (grads if g is None else g.contiguous() for g in (grad_states, grad_last))
        tiles, warps = (triton.cdiv(rows, ROWS),), PASS_WARPS[scan.units]
        coefficients_kernel[tiles](data, states, starts, factors, SPEC=rowwise, num_warps=warps)
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
        gradients_kernel[tiles](
            data, states, starts, grads, errors, grad_inputs, kept, SPEC=rowwise, num_warps=warps
        )
        weights_kernel[(parts, 6)](
            data, states, starts, errors, weights, biases, share, SPEC=rowwise, num_warps=warps
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
