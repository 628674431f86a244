"""attentional_gru backward, the last pass over tokens: the gradients of weights and biases, in parts."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get
from .attentional_gru_cell import load_attention, source
from .attentional_gru_rows import load_before, load_error, load_factor, load_inputs, load_rows, store_rows
from .primitives import dot


@triton.jit
def accumulate(e, operand, acc, SPEC: tl.constexpr):
    """Adds eᵀ times what a product read: `[units, columns]`."""
    return dot(tl.trans(e.to(operand.dtype)), operand, acc, get(SPEC, "precision"))


@triton.jit
def sum_products(
    data, states, starts, factors, grads, weights, biases, begin, end, name: tl.constexpr, gate: tl.constexpr,
    of_inputs: tl.constexpr, of_states: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The rows from begin to end of a gate's gradients: its weights and biases for inputs, for states, or for both."""
    SIZE: tl.constexpr = get(SPEC, "size")
    WIDTH: tl.constexpr = get(SPEC, "width")
    UNITS: tl.constexpr = get(SPEC, "units")
    COLUMNS: tl.constexpr = get(SPEC, "columns")
    BLOCK: tl.constexpr = get(SPEC, "block")
    # Behind the reset gate, the candidate's product with the state has a gradient of its own.
    apart: tl.constexpr = (gate == 2) and get(SPEC, "reset_after")
    by_inputs = tl.zeros([UNITS, COLUMNS], tl.float32)
    by_states = tl.zeros([UNITS, UNITS], tl.float32)
    total = tl.zeros([BLOCK, UNITS], tl.float32)  # summed over rows at last
    hidden_total = tl.zeros([BLOCK, UNITS], tl.float32)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        valid = row < end
        dh = load_rows(grads, row, get(SPEC, "pitch"), valid, get(SPEC, "pitch"), UNITS).to(tl.float32)
        if of_inputs or not apart:
            e = load_error(factors, dh, row, valid, name, 0, SPEC)
            total += e
        if of_inputs:
            at = source(data, row, valid, SPEC)
            a = load_attention(data, row, at, valid, SPEC)
            x = load_inputs(data, at, a, valid, 0, COLUMNS, SPEC)
            by_inputs = accumulate(e, x, by_inputs, SPEC)
        if of_states:
            h = load_before(data, states, starts, row, valid, 0, UNITS, SPEC)
            if apart:
                e = load_error(factors, dh, row, valid, "hidden", 0, SPEC)
                hidden_total += e
            elif gate == 2:
                h = (load_factor(factors, row, valid, "reset", 0, UNITS, SPEC) * h.to(tl.float32)).to(h.dtype)
            by_states = accumulate(e, h, by_states, SPEC)
    unit = tl.arange(0, UNITS)
    if of_inputs:
        store_rows(weights + gate * SIZE * WIDTH, by_inputs, unit, WIDTH, unit < SIZE, WIDTH)
        tl.store(biases + gate * SIZE + unit, tl.sum(total, 0), mask=unit < SIZE)
    if of_states:
        weights += 3 * SIZE * WIDTH
        store_rows(weights + gate * SIZE * SIZE, by_states, unit, SIZE, unit < SIZE, SIZE)
        hidden_total = hidden_total if apart else total
        tl.store(biases + (3 + gate) * SIZE + unit, tl.sum(hidden_total, 0), mask=unit < SIZE)


@triton.jit
def sum_gate(
    data, states, starts, factors, grads, weights, biases, begin, end, name: tl.constexpr, gate: tl.constexpr,
    SPEC: tl.constexpr,
):  # fmt: skip
    if get(SPEC, "both"):
        sum_products(
            data, states, starts, factors, grads, weights, biases, begin, end, name, gate, True, True, SPEC
        )
    else:
        sum_products(
            data, states, starts, factors, grads, weights, biases, begin, end, name, gate, True, False, SPEC
        )
        sum_products(
            data, states, starts, factors, grads, weights, biases, begin, end, name, gate, False, True, SPEC
        )


@triton.jit
def weights_kernel(data, states, starts, factors, grads, weights, biases, share, SPEC: tl.constexpr):
    """One program per part of the rows, and gate."""
    SIZE: tl.constexpr = get(SPEC, "size")
    part = tl.program_id(0).to(tl.int64)
    begin = part * share
    end = tl.minimum(begin + share, tl.load(data.offsets + data.batch).to(tl.int64))
    weights += part * 3 * SIZE * (get(SPEC, "width") + SIZE)
    biases += part * 6 * SIZE
    if tl.program_id(1) == 0:
        sum_gate(data, states, starts, factors, grads, weights, biases, begin, end, "r", 0, SPEC)
    elif tl.program_id(1) == 1:
        sum_gate(data, states, starts, factors, grads, weights, biases, begin, end, "n", 2, SPEC)
    elif get(SPEC, "keeps"):
        sum_gate(data, states, starts, factors, grads, weights, biases, begin, end, "z", 1, SPEC)
