"""attentional_gru's recurrence back in 16 bits on NVIDIA GPUs, its layouts written out as those of the way there.

The gradients of pre-activations cross shared memory, in two buffers each that take turns: one barrier per step.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .arguments import get
from .attentional_gru_mma import multiply, operand_layout, rows_of, tile_layout
from .attentional_gru_rows import place
from .primitives import slab_count, slab_size, slab_start


@gluon.jit
def load_weight(pointer, gate: gl.constexpr, SPEC: gl.constexpr):
    """A gate's third of `[3H, H]`, transposed, as slabs `[units, size]`, in the registers of its products."""
    SIZE: gl.constexpr = get(SPEC, "size")
    LAYOUT: gl.constexpr = operand_layout(0, SPEC)
    row = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, LAYOUT))[:, None]
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
    LAYOUT: gl.constexpr = tile_layout(SPEC)
    unit = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, LAYOUT))[:, None]
    mask = ((t >= 0) & (t < length))[None, :] & (unit < SIZE)
    row = (begin + t)[None, :]
    grad = gl.zeros([get(SPEC, "units"), get(SPEC, "block")], factors.dtype.element_ty, LAYOUT)
    if get(SPEC, "upstream"):
        grad = gl.load(grad_states + row * SIZE + unit, mask=mask, other=0.0)
    factor = factors + row * get(SPEC, "factors") + unit
    kept = gl.load(factor + place("kept", SPEC), mask=mask, other=1.0)
    r = gl.load(factor + place("r", SPEC), mask=mask, other=0.0)
    n = gl.load(factor + place("hidden", SPEC), mask=mask, other=0.0)
    z = r
    if get(SPEC, "keeps"):
        z = gl.load(factor + place("z", SPEC), mask=mask, other=0.0)
    return grad, kept, r, z, n


@gluon.jit
def step_back(
    factors, grad_states, grads, t, carry, read, begin, length, buffers, weights, SPEC: gl.constexpr
):
    """Step t: the gradient of the state before it, and what step t - 2 reads."""
    SIZE: gl.constexpr = get(SPEC, "size")
    LAYOUT: gl.constexpr = tile_layout(SPEC)
    dtype: gl.constexpr = factors.dtype.element_ty
    grad, kept, r, z, n = read
    dh = grad.to(gl.float32) + carry
    buffers[0].store((dh * r.to(gl.float32)).to(dtype))
    if get(SPEC, "keeps"):
        buffers[1].store((dh * z.to(gl.float32)).to(dtype))
    buffers[2].store((dh * n.to(gl.float32)).to(dtype))
    unit = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, LAYOUT))[:, None]
    mask = ((t >= 0) & (t < length))[None, :] & (unit < SIZE)
    gl.store(grads + (begin + t)[None, :] * SIZE + unit, dh.to(dtype), mask=mask)
    read = load_step(factors, grad_states, begin, length, t - 2, SPEC)
    zero = gl.zeros([get(SPEC, "units"), get(SPEC, "block")], gl.float32, LAYOUT)
    carry = multiply(weights[0], buffers[0], dh * kept.to(gl.float32), SIZE, SPEC)
    if get(SPEC, "keeps"):
        carry += multiply(weights[1], buffers[1], zero, SIZE, SPEC)
    return carry + multiply(weights[2], buffers[2], zero, SIZE, SPEC), read


@gluon.jit
def reverse_mma_kernel(data, factors, grad_states, grad_last, grads, grad_initial, SPEC: gl.constexpr):
    SIZE: gl.constexpr = get(SPEC, "size")
    UNITS: gl.constexpr = get(SPEC, "units")
    BLOCK: gl.constexpr = get(SPEC, "block")
    LAYOUT: gl.constexpr = tile_layout(SPEC)
    BUFFER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
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
    read0 = load_step(factors, grad_states, begin, length, steps - 1, SPEC)
    read1 = load_step(factors, grad_states, begin, length, steps - 2, SPEC)
    for i in range(0, steps, 2):
        t = steps - 1 - i
        carry, read0 = step_back(
            factors, grad_states, grads, t, carry, read0, begin, length, even, weights, SPEC
        )
        carry, read1 = step_back(
            factors, grad_states, grads, t - 1, carry, read1, begin, length, odd, weights, SPEC
        )
    if get(SPEC, "initial"):
        gl.store(grad_initial + where, carry.to(grad_initial.dtype.element_ty), mask=kept)
