"""attentional_gru's recurrence back in 16 bits on NVIDIA GPUs, its layouts written out as those of the way there.

The gradients of pre-activations cross shared memory, in two buffers each that take turns: one barrier per step.
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
def load_step(factors, grad_states, begin, length, t, SPEC: gl.constexpr):
    """What step t reads. One that there is not keeps all and adds nothing."""
    SIZE: gl.constexpr = get(SPEC, "size")
    LAYOUT: gl.constexpr = unit_layout(SPEC)
    unit = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, LAYOUT))[:, None]
    mask = ((t >= 0) & (t < length))[None, :] & (unit < SIZE)
    row = (begin + t)[None, :]
    grad = gl.zeros([get(SPEC, "units"), get(SPEC, "block")], factors.dtype.element_ty, LAYOUT)
    if get(SPEC, "upstream"):
        grad = gl.load(grad_states + row * SIZE + unit, mask=mask, other=0.0)
    factor = factors + row * get(SPEC, "factors") + unit
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
def step_back(
    factors, grad_states, grads, t, carry, step, begin, length, buffers, weights, SPEC: gl.constexpr
):
    """Step t: the gradient of the state before it, and what step t - 2 reads."""
    SIZE: gl.constexpr = get(SPEC, "size")
    dtype: gl.constexpr = factors.dtype.element_ty
    kept = step[1].to(gl.float32)
    r, z, n = step[2], step[3], step[4]
    dh = step[0].to(gl.float32) + carry
    rounded = dh.to(dtype)
    if get(SPEC, "reset_after"):
        buffers[0].store(times(rounded, r))
    if get(SPEC, "keeps"):
        buffers[1].store(times(rounded, z))
    buffers[2].store(times(rounded, n))
    unit = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, unit_layout(SPEC)))[:, None]
    mask = ((t >= 0) & (t < length))[None, :] & (unit < SIZE)
    row = (begin + t)[None, :]
    gl.store(grads + row * SIZE + unit, rounded, mask=mask)
    ahead = load_step(factors, grad_states, begin, length, t - 2, SPEC)
    zero = gl.zeros([get(SPEC, "units"), get(SPEC, "block")], gl.float32, tile_layout(SPEC))
    through = multiply(weights[2], read(buffers[2], SIZE, SPEC), zero)
    sides = zero
    if get(SPEC, "keeps"):
        sides = multiply(weights[1], read(buffers[1], SIZE, SPEC), zero)
    if get(SPEC, "reset_after"):
        through += sides + multiply(weights[0], read(buffers[0], SIZE, SPEC), zero)
        carry = dh * kept + as_units(through, SPEC)
    else:
        reset = as_units(through, SPEC)
        e_r = (reset * r.to(gl.float32)).to(dtype)
        buffers[0].store(e_r)
        gl.store(factors + place("r", SPEC) + row * get(SPEC, "factors") + unit, e_r, mask=mask)
        carry = dh * kept + reset * step[5].to(gl.float32)
        carry += as_units(multiply(weights[0], read(buffers[0], SIZE, SPEC), sides), SPEC)
    return carry, ahead


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
    carry = gl.zeros([UNITS, BLOCK], gl.float32, LAYOUT)
    if get(SPEC, "final"):
        carry = gl.load(grad_last + where, mask=kept, other=0.0).to(gl.float32)
    weights = ()
    even = ()
    odd = ()
    for gate in gl.static_range(3):
        weights = weights + (load_weight(data.weight_hh, gate, SPEC),)
        even = even + (gl.allocate_shared_memory(dtype, [UNITS, BLOCK], BUFFER),)
        odd = odd + (gl.allocate_shared_memory(dtype, [UNITS, BLOCK], BUFFER),)
    steps = gl.max(length, 0)
    step0 = load_step(factors, grad_states, begin, length, steps - 1, SPEC)
    step1 = load_step(factors, grad_states, begin, length, steps - 2, SPEC)
    for i in range(0, steps, 2):
        t = steps - 1 - i
        carry, step0 = step_back(
            factors, grad_states, grads, t, carry, step0, begin, length, even, weights, SPEC
        )
        carry, step1 = step_back(
            factors, grad_states, grads, t - 1, carry, step1, begin, length, odd, weights, SPEC
        )
    if get(SPEC, "initial"):
        gl.store(grad_initial + where, carry.to(grad_initial.dtype.element_ty), mask=kept)
