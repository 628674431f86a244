"""attentional_gru's recurrence back in 16 bits on NVIDIA GPUs, its layouts written out as those of the way there.

The gradients of pre-activations cross shared memory, in two buffers each that take turns: one barrier per step, two
if the reset gate comes before the product.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .arguments import get
from .attentional_gru_mma import (
    as_units,
    multiply,
    operand_layout,
    read,
    rows_of,
    staged_layout,
    tile_layout,
    unit_layout,
    unit_of,
)
from .attentional_gru_rows import place
from .primitives import slab_count, slab_size, slab_start


@gluon.jit
def load_weight(pointer, gate: gl.constexpr, SPEC: gl.constexpr):
    """A gate's third of `[3H, H]`, transposed, as slabs `[units, size]`, in the registers of its products."""
    SIZE: gl.constexpr = get(SPEC, "size")
    LAYOUT: gl.constexpr = operand_layout(0, SPEC)
    row = unit_of(gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, LAYOUT)))[:, None]
    slabs = ()
    for i in gl.static_range(slab_count(SIZE, 64)):
        column = (
            slab_start(i, SIZE, 64) + gl.arange(0, slab_size(i, SIZE, 64), gl.SliceLayout(0, LAYOUT))[None, :]
        )
        inside = (row < SIZE) & (column < SIZE)
        slabs = slabs + (gl.load(pointer + (gate * SIZE + column) * SIZE + row, mask=inside, other=0.0),)
    return slabs


@gluon.jit
def at(pointer, begin, unit, t, STRIDE: gl.constexpr):
    """Where the units of step t lie, rows `STRIDE` apart: `[units, block]`. But for the last term, no step's own."""
    return pointer + begin[None, :] * STRIDE + unit + t.to(gl.int64) * STRIDE


@gluon.jit
def load_grad(grad_states, begin, length, t, SPEC: gl.constexpr):
    """The upstream gradient of step t, zero if there is none."""
    SIZE: gl.constexpr = get(SPEC, "size")
    LAYOUT: gl.constexpr = unit_layout(SPEC)
    if get(SPEC, "upstream"):
        unit = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, LAYOUT))[:, None]
        mask = ((t >= 0) & (t < length))[None, :] & (unit < SIZE)
        return gl.load(at(grad_states, begin, unit, t, SIZE), mask=mask, other=0.0)
    else:
        return gl.zeros([get(SPEC, "units"), get(SPEC, "block")], grad_states.dtype.element_ty, LAYOUT)


@gluon.jit
def load_step(factors, grad_states, begin, length, t, SPEC: gl.constexpr):
    """What step t reads, and the upstream gradient of the step before it. A step that there is not keeps all."""
    PITCH: gl.constexpr = get(SPEC, "pitch")
    LAYOUT: gl.constexpr = unit_layout(SPEC)
    unit = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, LAYOUT))[:, None]
    mask = ((t >= 0) & (t < length))[None, :] & (unit < PITCH)
    grad = load_grad(grad_states, begin, length, t - 1, SPEC)
    factor = at(factors, begin, unit, t, get(SPEC, "factors"))
    kept = gl.load(factor + place("kept", SPEC), mask=mask, other=1.0)
    r = gl.load(factor + place("r", SPEC), mask=mask, other=0.0)
    z = r
    if get(SPEC, "keeps"):
        z = gl.load(factor + place("z", SPEC), mask=mask, other=0.0)
    if get(SPEC, "reset_after"):
        return grad, kept, r, z, gl.load(factor + place("hidden", SPEC), mask=mask, other=0.0)
    else:
        n = gl.load(factor + place("n", SPEC), mask=mask, other=0.0)
        return grad, kept, r, z, n, gl.load(factor + place("reset", SPEC), mask=mask, other=0.0)


@gluon.jit
def times(x, y):
    """The product in 16 bits, two at a time."""
    if x.dtype == gl.bfloat16:  # sm_80 has no other
        return gl.inline_asm_elementwise(
            "{\n .reg .b32 zero;\n mov.b32 zero, 0x80008000;\n fma.rn.bf16x2 $0, $1, $2, zero;\n}",
            "=r,r,r", [x, y], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=x.dtype, is_pure=True, pack=2
        )


@gluon.jit
def step_back(factors, grad_states, grads, t, dh, step, begin, length, buffers, weights, SPEC: gl.constexpr):
    """From the gradient of the state after step t to that of the state before it, and what step t - 2 reads."""
    SIZE: gl.constexpr = get(SPEC, "size")
    PITCH: gl.constexpr = get(SPEC, "pitch")
    dtype: gl.constexpr = factors.dtype.element_ty
    rounded = dh.to(dtype)
    if get(SPEC, "reset_after"):
        buffers[0].store(times(rounded, step[2]))
    if get(SPEC, "keeps"):
        buffers[1].store(times(rounded, step[3]))
    buffers[2].store(times(rounded, step[4]))
    unit = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, unit_layout(SPEC)))[:, None]
    mask = ((t >= 0) & (t < length))[None, :] & (unit < PITCH)
    gl.store(at(grads, begin, unit, t, PITCH), rounded, mask=mask)
    ahead = load_step(factors, grad_states, begin, length, t - 2, SPEC)
    dh = dh * step[1].to(gl.float32) + step[0].to(gl.float32)
    zero = gl.zeros([get(SPEC, "units"), get(SPEC, "block")], gl.float32, tile_layout(SPEC))
    n = as_units(multiply(weights[2], read(buffers[2], SIZE, SPEC), zero), SPEC)
    z = zero
    if get(SPEC, "keeps"):
        z = multiply(weights[1], read(buffers[1], SIZE, SPEC), zero)
    if get(SPEC, "reset_after"):
        r = multiply(weights[0], read(buffers[0], SIZE, SPEC), zero)
        if get(SPEC, "keeps"):
            r += z
        dh = (dh + n) + as_units(r, SPEC)
    else:
        e_r = (n * step[2].to(gl.float32)).to(dtype)
        buffers[0].store(e_r)
        gl.store(at(factors + place("r", SPEC), begin, unit, t, get(SPEC, "factors")), e_r, mask=mask)
        dh += n * step[5].to(gl.float32)
        dh += as_units(multiply(weights[0], read(buffers[0], SIZE, SPEC), z), SPEC)
    return dh, ahead


@gluon.jit
def reverse_mma_kernel(data, factors, grad_states, grad_last, grads, grad_initial, SPEC: gl.constexpr):
    SIZE: gl.constexpr = get(SPEC, "size")
    UNITS: gl.constexpr = get(SPEC, "units")
    BLOCK: gl.constexpr = get(SPEC, "block")
    LAYOUT: gl.constexpr = unit_layout(SPEC)
    BUFFER: gl.constexpr = staged_layout(UNITS)
    dtype: gl.constexpr = factors.dtype.element_ty
    sequence, live, begin, length = rows_of(data, SPEC, LAYOUT)
    unit = gl.arange(0, UNITS, gl.SliceLayout(1, LAYOUT))[:, None]
    kept = live[None, :] & (unit < SIZE)
    where = sequence[None, :] * SIZE + unit
    steps = gl.max(length, 0)
    dh = load_grad(grad_states, begin, length, steps - 1, SPEC).to(gl.float32)
    if get(SPEC, "final"):
        dh += gl.load(grad_last + where, mask=kept, other=0.0).to(gl.float32)
    weights = ()
    even = ()
    odd = ()
    for gate in gl.static_range(3):
        weights = weights + (load_weight(data.weight_hh, gate, SPEC),)
        even = even + (gl.allocate_shared_memory(dtype, [UNITS, BLOCK], BUFFER),)
        odd = odd + (gl.allocate_shared_memory(dtype, [UNITS, BLOCK], BUFFER),)
    step0 = load_step(factors, grad_states, begin, length, steps - 1, SPEC)
    step1 = load_step(factors, grad_states, begin, length, steps - 2, SPEC)
    for i in range(0, steps, 2):
        t = steps - 1 - i
        dh, step0 = step_back(factors, grad_states, grads, t, dh, step0, begin, length, even, weights, SPEC)
        dh, step1 = step_back(
            factors, grad_states, grads, t - 1, dh, step1, begin, length, odd, weights, SPEC
        )
    if get(SPEC, "initial"):
        gl.store(grad_initial + where, dh.to(grad_initial.dtype.element_ty), mask=kept)
