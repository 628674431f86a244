"""attentional_gru, what is done token by token: where weights are many the projections of the inputs, and of backward
the factors before the recurrence and the sums behind it."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get
from .attentional_gru_cell import (
    bias,
    both_biases,
    input_weight,
    load_attention,
    move_to,
    sigmoid,
    source,
    state_weight,
    weight,
)
from .primitives import dot, tanh

SLAB = tl.constexpr(32)  # of what products sum over, where they read it slab by slab

# ------------------------------------------------------------------------------------------------ tiles


@triton.jit
def load_rows(pointer, row, stride, valid, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, first=0):
    """Rows of a matrix, from the first column on, zero where they are not valid: `[rows, COLUMNS]`."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    mask = valid[:, None] & (column < WIDTH)
    return tl.load(pointer + row[:, None] * stride + column, mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, tile, row, stride, valid, WIDTH: tl.constexpr):
    column = tl.arange(0, tile.shape[1])[None, :]
    mask = valid[:, None] & (column < WIDTH)
    tl.store(pointer + row[:, None] * stride + column, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_before(data, states, starts, row, valid, first, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    """The states that rows start from: `[rows, COLUMNS]`."""
    SIZE: tl.constexpr = get(SPEC, "size")
    started = tl.load(starts + row, mask=valid, other=0)  # the sequence that begins here, or -1
    h = load_rows(states, row - 1, SIZE, valid & (started < 0), SIZE, COLUMNS, first)
    if get(SPEC, "initial"):
        begun = valid & (started >= 0)
        given = load_rows(data.initial, started.to(tl.int64), SIZE, begun, SIZE, COLUMNS, first)
        return tl.where((started >= 0)[:, None], given, h)
    else:
        return h


@triton.jit
def load_inputs(data, at, a, valid, first, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    """What the products read: `[rows, COLUMNS]`."""
    x = load_rows(data.inputs, at, get(SPEC, "stride"), valid, get(SPEC, "width"), COLUMNS, first)
    if get(SPEC, "scaled"):
        x = (x.to(tl.float32) * a[:, None]).to(x.dtype)
    return x


# ------------------------------------------------------------------------------------------------ factors


@triton.constexpr_function
def place(name, spec):
    """Where a factor lies in a row of `[T, factors, pitch]`: of the gradients of the pre-activations, "r", "z" and "n",
    and "hidden" of what the reset gate scales; of the gradient of the attention, "score"; what is "kept", and the gate
    "reset"."""
    return spec.factor_names.index(name) * spec.pitch


@triton.jit
def load_factor(factors, row, valid, name: tl.constexpr, first, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    """`[rows, COLUMNS]` in float32."""
    PITCH: tl.constexpr = get(SPEC, "pitch")
    pointer = factors + place(name, SPEC)
    return load_rows(pointer, row, get(SPEC, "factors"), valid, PITCH, COLUMNS, first).to(tl.float32)


@triton.jit
def store_factor(factors, tile, row, valid, name: tl.constexpr, SPEC: tl.constexpr):
    PITCH: tl.constexpr = get(SPEC, "pitch")
    store_rows(factors + place(name, SPEC), tile, row, get(SPEC, "factors"), valid, PITCH)


@triton.jit
def load_error(factors, dh, row, valid, name: tl.constexpr, first, SPEC: tl.constexpr):
    """The gradient of a pre-activation where dh is that of the state: `[rows, columns]`."""
    e = load_factor(factors, row, valid, name, first, dh.shape[1], SPEC)
    if (name != "r") or get(SPEC, "reset_after"):
        e = e * dh
    return e


@triton.jit
def error(factors, dh, row, valid, name: tl.constexpr, first, SPEC: tl.constexpr):
    """The same in the dtype of products."""
    return load_error(factors, dh, row, valid, name, first, SPEC).to(factors.dtype.element_ty)


# ------------------------------------------------------------------------------------------------ the cell


@triton.jit
def resident(data, of_inputs: tl.constexpr, SPEC: tl.constexpr):
    """The weights of all gates for inputs or for states, if programs keep them."""
    weights = ()
    if get(SPEC, "resident"):
        for gate in tl.static_range(3):
            if of_inputs:
                weights = weights + (input_weight(data, gate, SPEC),)
            else:
                weights = weights + (state_weight(data, gate, SPEC),)
    return weights


@triton.jit
def gate_weight(weights, data, gate: tl.constexpr, of_inputs: tl.constexpr, SPEC: tl.constexpr):
    if get(SPEC, "resident"):
        return weights[gate]
    elif of_inputs:
        return input_weight(data, gate, SPEC)
    else:
        return state_weight(data, gate, SPEC)


@triton.jit
def read_inputs(data, row, valid, SPEC: tl.constexpr):
    """Where the inputs of rows are, the attention, and the inputs `[rows, columns]`, but where products read slabs."""
    at = source(data, row, valid, SPEC)
    a = load_attention(data, row, at, valid, SPEC)
    if get(SPEC, "slabs"):
        return at, a, 0
    else:
        return at, a, load_inputs(data, at, a, valid, 0, get(SPEC, "columns"), SPEC)


@triton.jit
def project(data, weights, inputs, valid, vector, gate: tl.constexpr, SPEC: tl.constexpr):
    """What `read_inputs` returned times a gate's weights: `[rows, units]`."""
    UNITS: tl.constexpr = get(SPEC, "units")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    WIDTH: tl.constexpr = get(SPEC, "width")
    at, a, x = inputs
    acc = tl.zeros([valid.shape[0], UNITS], tl.float32) + vector[None, :]
    if get(SPEC, "slabs"):
        for first in tl.range(0, WIDTH, SLAB, num_stages=1):
            slab = load_inputs(data, at, a, valid, first, SLAB, SPEC)
            w = weight(data.weight_ih, gate, 0, first, UNITS, SLAB, WIDTH, SPEC)
            acc = dot(slab, tl.trans(w), acc, PRECISION)
        return acc
    else:
        return dot(x, tl.trans(gate_weight(weights, data, gate, True, SPEC)), acc, PRECISION)


@triton.jit
def recur(data, weights, states, starts, factors, row, h, valid, acc, gate: tl.constexpr, SPEC: tl.constexpr):
    """Adds a gate's weights times the states h, which slabs are read of again; in the candidate's, where the reset gate
    comes before, `factors` has its part."""
    SIZE: tl.constexpr = get(SPEC, "size")
    UNITS: tl.constexpr = get(SPEC, "units")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    if get(SPEC, "slabs"):
        for first in tl.range(0, SIZE, SLAB, num_stages=1):
            slab = load_before(data, states, starts, row, valid, first, SLAB, SPEC)
            if (gate == 2) and not get(SPEC, "reset_after"):
                slab *= load_rows(
                    factors + place("reset", SPEC), row, get(SPEC, "factors"), valid, SIZE, SLAB, first
                )
            w = weight(data.weight_hh, gate, 0, first, UNITS, SLAB, SIZE, SPEC)
            acc = dot(slab, tl.trans(w), acc, PRECISION)
        return acc
    else:
        return dot(h, tl.trans(gate_weight(weights, data, gate, False, SPEC)), acc, PRECISION)


@triton.jit
def gates(data, weights, states, starts, factors, row, inputs, h, valid, SPEC: tl.constexpr):
    """The gates r, z (r again where there is none) and n, and what the reset gate scales: `[rows, units]`. It is
    stored where slabs of what it leaves are read."""
    APPROX: tl.constexpr = get(SPEC, "approx")
    r = project(data, weights[0], inputs, valid, both_biases(data, 0, SPEC), 0, SPEC)
    r = sigmoid(recur(data, weights[1], states, starts, factors, row, h, valid, r, 0, SPEC), APPROX)
    z = r
    if get(SPEC, "keeps"):
        z = project(data, weights[0], inputs, valid, both_biases(data, 1, SPEC), 1, SPEC)
        z = sigmoid(recur(data, weights[1], states, starts, factors, row, h, valid, z, 1, SPEC), APPROX)
    if get(SPEC, "reset_after"):
        hidden = tl.zeros_like(r) + bias(data.bias_hh, 2, SPEC)[None, :]
        hidden = recur(data, weights[1], states, starts, factors, row, h, valid, hidden, 2, SPEC)
        n = project(data, weights[0], inputs, valid, bias(data.bias_ih, 2, SPEC), 2, SPEC) + r * hidden
    else:
        hidden = h.to(tl.float32)
        if get(SPEC, "slabs"):
            store_factor(factors, r, row, valid, "reset", SPEC)
            tl.debug_barrier()  # other threads read it
        n = project(data, weights[0], inputs, valid, both_biases(data, 2, SPEC), 2, SPEC)
        reset = (r * hidden).to(h.dtype)
        n = recur(data, weights[1], states, starts, factors, row, reset, valid, n, 2, SPEC)
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
def project_kernel(data, projections, SPEC: tl.constexpr):
    """`projections [T, 3H]` of the inputs, without a bias."""
    SIZE: tl.constexpr = get(SPEC, "size")
    row = tl.program_id(0).to(tl.int64) * get(SPEC, "block") + tl.arange(0, get(SPEC, "block"))
    valid = row < tl.load(data.offsets + data.batch)
    inputs = read_inputs(data, row, valid, SPEC)
    nothing = tl.zeros([get(SPEC, "units")], tl.float32)
    for gate in tl.static_range(3):
        if gate != 1 or get(SPEC, "keeps"):
            projection = project(data, (), inputs, valid, nothing, gate, SPEC)
            store_rows(projections + gate * SIZE, projection, row, 3 * SIZE, valid, SIZE)


@triton.jit
def store_coefficients(data, weights, states, starts, factors, row, valid, SPEC: tl.constexpr):
    inputs = read_inputs(data, row, valid, SPEC)
    h = load_before(data, states, starts, row, valid, 0, get(SPEC, "units"), SPEC)
    r, z, n, hidden = gates(data, weights, states, starts, factors, row, inputs, h, valid, SPEC)
    a = inputs[1][:, None]
    move = move_to(z, a, SPEC)
    through = move * (1 - n * n)
    slope = r * (1 - r) * hidden
    distance = n - h.to(tl.float32)
    store_factor(factors, through, row, valid, "n", SPEC)
    if get(SPEC, "reset_after"):
        store_factor(factors, slope * through, row, valid, "r", SPEC)
        store_factor(factors, through * r, row, valid, "hidden", SPEC)
    else:
        store_factor(factors, slope, row, valid, "r", SPEC)
        if not get(SPEC, "slabs"):
            store_factor(factors, r, row, valid, "reset", SPEC)
    if get(SPEC, "keeps"):
        store_factor(factors, distance * z * (1 - z) * move_by_keep(a, SPEC), row, valid, "z", SPEC)
    if get(SPEC, "weighs"):
        store_factor(factors, distance * move_by_attention(z, SPEC), row, valid, "score", SPEC)
    store_factor(factors, tl.zeros_like(n) + (1 - move), row, valid, "kept", SPEC)


@triton.jit
def coefficients_kernel(data, states, starts, factors, SPEC: tl.constexpr):
    BLOCK: tl.constexpr = get(SPEC, "block")
    weights = (resident(data, True, SPEC), resident(data, False, SPEC))
    end = tl.load(data.offsets + data.batch)
    for tile in tl.range(tl.program_id(0), tl.cdiv(data.rows, BLOCK), tl.num_programs(0), num_stages=1):
        row = (tl.zeros([BLOCK], tl.int64) + tile) * BLOCK + tl.arange(0, BLOCK)
        store_coefficients(data, weights, states, starts, factors, row, row < end, SPEC)


@triton.jit
def back_through(
    data,
    weights,
    factors,
    grads,
    dh,
    row,
    valid,
    acc,
    name: tl.constexpr,
    gate: tl.constexpr,
    SPEC: tl.constexpr,
):
    """Adds a gate's part of the gradient of the inputs, `[rows, columns]`."""
    SIZE: tl.constexpr = get(SPEC, "size")
    COLUMNS: tl.constexpr = get(SPEC, "columns")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    if get(SPEC, "slabs"):
        for first in tl.range(0, SIZE, SLAB, num_stages=1):
            slab = load_rows(grads, row, get(SPEC, "pitch"), valid, get(SPEC, "pitch"), SLAB, first).to(
                tl.float32
            )
            w = weight(data.weight_ih, gate, first, 0, SLAB, COLUMNS, get(SPEC, "width"), SPEC)
            acc = dot(error(factors, slab, row, valid, name, first, SPEC), w, acc, PRECISION)
        return acc
    else:
        e = error(factors, dh, row, valid, name, 0, SPEC)
        return dot(e, gate_weight(weights, data, gate, True, SPEC), acc, PRECISION)


@triton.jit
def store_score(grad_scores, score, data, row, at, valid, SPEC: tl.constexpr):
    score = score.to(grad_scores.dtype.element_ty)
    if get(SPEC, "scatter") and get(SPEC, "scored"):
        tl.store(grad_scores + at, score, mask=valid)
    else:
        tl.store(grad_scores + row, score, mask=row < data.rows)


@triton.jit
def store_gradients(data, weights, factors, grads, grad_inputs, grad_scores, row, valid, SPEC: tl.constexpr):
    WIDTH: tl.constexpr = get(SPEC, "width")
    COLUMNS: tl.constexpr = get(SPEC, "columns")
    at = source(data, row, valid, SPEC)
    dh = load_rows(grads, row, get(SPEC, "pitch"), valid, get(SPEC, "pitch"), get(SPEC, "units")).to(
        tl.float32
    )
    grad = tl.zeros([get(SPEC, "block"), COLUMNS], tl.float32)
    grad = back_through(data, weights, factors, grads, dh, row, valid, grad, "r", 0, SPEC)
    if get(SPEC, "keeps"):
        grad = back_through(data, weights, factors, grads, dh, row, valid, grad, "z", 1, SPEC)
    grad = back_through(data, weights, factors, grads, dh, row, valid, grad, "n", 2, SPEC)
    if get(SPEC, "scaled"):
        x = load_rows(data.inputs, at, get(SPEC, "stride"), valid, WIDTH, COLUMNS).to(tl.float32)
        score = tl.sum(grad * x, 1)
        store_score(grad_scores, score, data, row, at, valid, SPEC)
        grad = grad * load_attention(data, row, at, valid, SPEC)[:, None]
    if get(SPEC, "weighs"):
        score = load_factor(factors, row, valid, "score", 0, get(SPEC, "units"), SPEC)
        score = tl.sum(dh * score, 1)
        store_score(grad_scores, score, data, row, at, valid, SPEC)
    if get(SPEC, "scatter"):
        store_rows(grad_inputs, grad, at, WIDTH, valid, WIDTH)
    else:
        store_rows(grad_inputs, grad, row, WIDTH, row < data.rows, WIDTH)


@triton.jit
def gradients_kernel(data, factors, grads, grad_inputs, grad_scores, SPEC: tl.constexpr):
    """The gradients of the inputs and the scores: of the positions, zero for slack, or of the rows that these read."""
    BLOCK: tl.constexpr = get(SPEC, "block")
    weights = resident(data, True, SPEC)
    end = tl.load(data.offsets + data.batch)
    for tile in tl.range(tl.program_id(0), tl.cdiv(data.rows, BLOCK), tl.num_programs(0), num_stages=1):
        row = (tl.zeros([BLOCK], tl.int64) + tile) * BLOCK + tl.arange(0, BLOCK)
        store_gradients(data, weights, factors, grads, grad_inputs, grad_scores, row, row < end, SPEC)
