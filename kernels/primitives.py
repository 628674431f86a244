"""Jit primitives that the kernels are written in: slabs, fast arithmetic, activations.

A width that is no power of two is cut into slabs whose widths are: `[L, 80]` becomes the tuple of a `[L, 64]` and
a `[L, 16]` tile, where padding to 128 would waste 1.6 times of everything. The cuts are known when a kernel is
compiled, so a loop over slabs unrolls.

APPROX is a constexpr everywhere: with it an NVIDIA GPU's approximate instructions are used, without it their
portable twin, which every target and the interpreter runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ------------------------------------------------------------------------------------------------ slabs


@triton.constexpr_function
def cuts(width, widest, narrowest):
    """`(start, size)` of each slab; the last may reach past `width`."""
    slabs, start, size = [], 0, widest
    while start < width:
        while size > narrowest and size > width - start:
            size //= 2
        slabs.append((start, size))
        start += size
    return slabs


@triton.constexpr_function
def slab_count(width, widest, narrowest=16):
    return len(cuts(width, widest, narrowest))


@triton.constexpr_function
def slab_size(i, width, widest, narrowest=16):
    return cuts(width, widest, narrowest)[i][1]


@triton.constexpr_function
def slab_start(i, width, widest, narrowest=16):
    return cuts(width, widest, narrowest)[i][0]


@triton.constexpr_function
def slab_inside(i, width, widest, narrowest=16):
    """Whether slab i ends at or before `width`, so that no mask is needed."""
    start, size = cuts(width, widest, narrowest)[i]
    return start + size <= width


@triton.jit
def columns(i: tl.constexpr, WIDTH: tl.constexpr, WIDEST: tl.constexpr, NARROWEST: tl.constexpr = 16):
    """The columns of slab i."""
    return slab_start(i, WIDTH, WIDEST, NARROWEST) + tl.arange(0, slab_size(i, WIDTH, WIDEST, NARROWEST))


@triton.jit
def load_vector(pointer, WIDTH: tl.constexpr, WIDEST: tl.constexpr, NARROWEST: tl.constexpr = 16):
    """`[WIDTH]` as slabs, zero past its end."""
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, WIDEST, NARROWEST)):
        column = columns(i, WIDTH, WIDEST, NARROWEST)
        if slab_inside(i, WIDTH, WIDEST, NARROWEST):
            slabs = slabs + (tl.load(pointer + column),)
        else:
            slabs = slabs + (tl.load(pointer + column, mask=column < WIDTH, other=0.0),)
    return slabs


@triton.jit
def load_slab(
    pointer,
    j: tl.constexpr,
    i: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_WIDEST: tl.constexpr,
    ROW_NARROWEST: tl.constexpr,
    COLS: tl.constexpr,
    COL_WIDEST: tl.constexpr,
):
    """Slab `[rows, cols]` in row j and column i of slabs of a contiguous `[ROWS, COLS]`; zero past the edges."""
    row = columns(j, ROWS, ROW_WIDEST, ROW_NARROWEST)[:, None]
    column = columns(i, COLS, COL_WIDEST)[None, :]
    if slab_inside(j, ROWS, ROW_WIDEST, ROW_NARROWEST) and slab_inside(i, COLS, COL_WIDEST):
        return tl.load(pointer + row * COLS + column)
    else:
        return tl.load(pointer + row * COLS + column, mask=(row < ROWS) & (column < COLS), other=0.0)


@triton.jit
def load_matrix(
    pointer,
    ROWS: tl.constexpr,
    ROW_WIDEST: tl.constexpr,
    ROW_NARROWEST: tl.constexpr,
    COLS: tl.constexpr,
    COL_WIDEST: tl.constexpr,
):
    """A contiguous `[ROWS, COLS]` as slabs `[rows, cols]`, one row of slabs after the other; zero past the edges."""
    slabs = ()
    for j in tl.static_range(slab_count(ROWS, ROW_WIDEST, ROW_NARROWEST)):
        for i in tl.static_range(slab_count(COLS, COL_WIDEST)):
            slabs = slabs + (load_slab(pointer, j, i, ROWS, ROW_WIDEST, ROW_NARROWEST, COLS, COL_WIDEST),)
    return slabs


@triton.jit
def load_rows(pointer, row, stride, valid, WIDTH: tl.constexpr, WIDEST: tl.constexpr):
    """Rows of a `[*, WIDTH]` matrix as slabs `[rows, size]`; zero where a row is not valid."""
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, WIDEST)):
        column = columns(i, WIDTH, WIDEST)
        mask = valid[:, None]
        if not slab_inside(i, WIDTH, WIDEST):
            mask = mask & (column < WIDTH)[None, :]
        slabs = slabs + (tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0),)
    return slabs


@triton.jit
def store_rows(pointer, slabs, row, stride, valid, WIDTH: tl.constexpr, WIDEST: tl.constexpr):
    """The inverse of load_rows."""
    for i in tl.static_range(slab_count(WIDTH, WIDEST)):
        column = columns(i, WIDTH, WIDEST)
        mask = valid[:, None]
        if not slab_inside(i, WIDTH, WIDEST):
            mask = mask & (column < WIDTH)[None, :]
        value = slabs[i].to(pointer.dtype.element_ty)
        tl.store(pointer + row[:, None] * stride + column[None, :], value, mask=mask)


# ------------------------------------------------------------------------------------------------ arithmetic


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`a @ b + acc`, accumulated in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # there bfloat16 is held as integers, which it would multiply
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def split_tf32(x):
    """`(high, low)`, whose sum is x: the first x rounded to tf32, the second what is missing. Products of two low
    parts can be left out, as they are below fp32's last bit; had high been truncated, they were not."""
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def split_bfloat16(x):
    """Three parts in bfloat16, whose sum is x but for its last bit."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    return high, middle, (x - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def exp2(x, APPROX: tl.constexpr):
    if APPROX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2_once(x, APPROX: tl.constexpr):
    """log2. The asm is volatile: what is pure is made again, its loads included, in every layout that it is read in."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def tanh(x, APPROX: tl.constexpr):
    if APPROX:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp(-2 * tl.abs(x))  # of |x|, so that it cannot overflow
        t = (1 - e) / (1 + e)
        return tl.where(x < 0, -t, t)


@triton.jit
def vector_max(x):
    """Of a vector. Through a column, which stays in the threads where x is: a scalar is reduced through memory."""
    return tl.max(tl.max(x[:, None], 0), 0)


@triton.jit
def vector_sum(x):
    return tl.sum(tl.sum(x[:, None], 0), 0)


@triton.jit
def multiply_add(a, b, c, APPROX: tl.constexpr, PURE: tl.constexpr = False):
    """`a·b + c` in the dtype of a, rounded once.

    The asm is volatile unless PURE: a pure value may be computed again, in registers, for every product that
    reads it, instead of being kept in shared memory. A volatile one is written there by every tile that reads
    it, where a compiler does not move the write out of the loop over tiles: Triton 3.9 does not.
    """
    if APPROX and a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.bfloat16, is_pure=PURE, pack=2
        )
    elif APPROX and a.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=PURE, pack=2
        )
    elif APPROX:
        return tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=PURE, pack=1
        )
    else:
        return (a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)).to(a.dtype)


# ------------------------------------------------------------------------------------------------ activations


@triton.jit
def gate(z, params, ACTIVATION: tl.constexpr, APPROX: tl.constexpr):
    """What dice multiplies z by, and its derivatives by `scale·z + shift` and by alpha.

    With (alpha, scale, shift) it is `alpha + (1 - alpha)·sigmoid(scale·z + shift)`; for half_dice, which has other
    ones, `1 - alpha + alpha·tanh(scale·z + shift)`."""
    alpha, scale, shift = params
    if ACTIVATION == "dice":
        p = 1 / (1 + tl.exp(-(scale * z + shift)))
        return alpha + (1 - alpha) * p, (1 - alpha) * p * (1 - p), 1 - p
    else:
        t = tanh(scale * z + shift, APPROX)
        return alpha * t + (1 - alpha), alpha - alpha * t * t, t - 1


@triton.jit
def param_terms(z, params, ACTIVATION: tl.constexpr, APPROX: tl.constexpr):
    """The derivatives of activate(z) by its params, tiles as z."""
    if ACTIVATION == "leaky_relu":
        return (tl.minimum(z, 0.0),)
    else:
        _gate, by_argument, by_alpha = gate(z, params, ACTIVATION, APPROX)
        through = z * by_argument
        return z * by_alpha, through * z, through


@triton.jit
def activate(z, params, ACTIVATION: tl.constexpr, APPROX: tl.constexpr):
    """`half_silu(z)` is silu(2z) = z·tanh(z) + z, `logistic2(z)` sigmoid(-z·ln 2); the others are what they are called.
    `params` are vectors over the units, `[1, units]`: a slope, or those of `gate`."""
    if ACTIVATION == "tanh":
        return tanh(z, APPROX)
    elif ACTIVATION == "sigmoid":
        return 1 / (1 + tl.exp(-z))
    elif ACTIVATION == "logistic2":
        return 1 / (1 + tl.exp2(z))
    elif ACTIVATION == "dice" or ACTIVATION == "half_dice":
        return z * gate(z, params, ACTIVATION, APPROX)[0]
    elif ACTIVATION == "half_silu":
        return z * tanh(z, APPROX) + z
    elif ACTIVATION == "silu":
        return z / (1 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, z, params[0] * z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def activate_backward(grad, z, h, params, ACTIVATION: tl.constexpr, APPROX: tl.constexpr):
    """dL/dz from dL/dh, where h = activate(z)."""
    if ACTIVATION == "tanh":
        return grad * (1 - h * h)
    elif ACTIVATION == "sigmoid":
        return grad * h * (1 - h)
    elif ACTIVATION == "dice" or ACTIVATION == "half_dice":
        g, slope, _by_alpha = gate(z, params, ACTIVATION, APPROX)
        return grad * (g + z * slope * params[1])
    elif ACTIVATION == "half_silu":
        t = tanh(z, APPROX)
        return grad * (1 + t + z * (1 - t * t))
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-z))
        return grad * s * (1 + z * (1 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return grad * (0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density)
    elif ACTIVATION == "relu":
        return tl.where(h > 0, grad, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, grad, params[0] * grad)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return grad


@triton.jit
def times_tanh_slope(grad, h, APPROX: tl.constexpr):
    """`grad·(h² - 1)`, in 16 bits: minus the way back through h = tanh(z). The sign belongs to the weights."""
    if APPROX and h.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 slope, one, zero;
            mov.b32 one, 0xbf80bf80;
            mov.b32 zero, 0x80008000;
            fma.rn.bf16x2 slope, $2, $2, one;
            fma.rn.bf16x2 $0, $1, slope, zero;
            }""",
            "=r,r,r",
            [grad.to(h.dtype), h],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif APPROX and h.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 slope, one;
            mov.b32 one, 0xbc00bc00;
            fma.rn.f16x2 slope, $2, $2, one;
            mul.rn.f16x2 $0, $1, slope;
            }""",
            "=r,r,r",
            [grad.to(h.dtype), h],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        h = h.to(tl.float32)
        return grad * (h * h - 1)


# ------------------------------------------------------------------------------------------------ rows


@triton.jit
def zero_rows(ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDEST: tl.constexpr):
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, WIDEST)):
        slabs = slabs + (tl.zeros([ROWS, slab_size(i, WIDTH, WIDEST)], tl.float32),)
    return slabs


@triton.jit
def scale(slabs, factor):
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (slabs[i] * factor,)
    return out


@triton.jit
def store_row(pointer, slabs, WIDTH: tl.constexpr, WIDEST: tl.constexpr):
    """The first row of the slabs, to `pointer[:WIDTH]`."""
    for i in tl.static_range(slab_count(WIDTH, WIDEST)):
        row = tl.arange(0, slabs[i].shape[0])[:, None]
        column = columns(i, WIDTH, WIDEST)[None, :]
        inside = (row == 0) & (column < WIDTH)
        tl.store(pointer + row * 0 + column, slabs[i].to(pointer.dtype.element_ty), mask=inside)
