"""What the kernels of target_attention share: their arguments, loads, and the way from scores to attention and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import target_attention_settings as settings
from .arguments import get
from .primitives import LOG2_E, columns, dot, exp2, log2_once, slab_count, slab_inside

# Stands for the maximum of no scores: finite, so that its difference from a score of -inf is no NaN.
LOWEST = tl.constexpr(-3.0e38)


class Data(NamedTuple):
    """Rows of queries, keys and values lie `stride`s apart; what is not used is some other tensor."""

    query: Tensor  # [N, H·d]
    key: Tensor  # [T, H·d], or [R, H·d] with rows
    value: Tensor  # as many rows, H·dv wide
    offsets: Tensor  # [B + 1]
    rows: Tensor  # [T]
    bias: Tensor  # [T, 1] or [T, H]
    batch: int
    total: int  # T
    query_stride: int
    scale: float


class Upstream(NamedTuple):
    """What backward begins with."""

    grad_out: Tensor  # [N, H·dv]
    delta: Tensor  # [N, H], Σ_t a_t dL/da_t - dL/dlse
    peak_mass: Tensor  # [N, H, 2], of the softmax the maximum in base 2 and the sum


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Nothing here depends on a length or on the size of the batch."""

    dim: int  # of a head
    value_dim: int
    heads: int  # of the call
    heads_together: int  # that a program computes
    key_stride: int
    value_stride: int
    indexed: bool  # rows of keys and values come by index
    bias_heads: int  # 0 for none, 1 or all
    normalize: str
    precision: str  # of products, as tl.dot takes it
    approx: bool  # approximate instructions of NVIDIA GPUs
    block: int  # tokens per tile
    tail: int  # tokens per tile where a history ends
    dim_slab: int  # widest slab of keys and values
    stages: int
    least_rows: int = 0  # fewest rows worth a program
    together: int = 1  # histories that share a tile
    columns: int = 8  # of scores, one per history and head, or candidates per tile


@triton.constexpr_function
def key_width(spec):
    return spec.heads_together * spec.dim


@triton.constexpr_function
def value_width(spec):
    return spec.heads_together * spec.value_dim


@triton.constexpr_function
def base_two(spec):
    """Whether scores are in base 2."""
    return spec.normalize != "none"


# ------------------------------------------------------------------------------------------------ loads


@triton.jit
def load_tile(
    pointer, row, valid, STRIDE: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr, FULL: tl.constexpr
):
    """Rows as slabs `[rows, size]`; zero where a row is not valid, which FULL says none is."""
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, SLAB)):
        column = columns(i, WIDTH, SLAB)[None, :]
        place = pointer + row[:, None] * STRIDE + column
        if slab_inside(i, WIDTH, SLAB):
            if FULL:
                slabs = slabs + (tl.load(place),)
            else:
                slabs = slabs + (tl.load(place, mask=valid[:, None], other=0.0),)
        else:
            slabs = slabs + (tl.load(place, mask=valid[:, None] & (column < WIDTH), other=0.0),)
    return slabs


@triton.jit
def store_tile(
    pointer,
    slabs,
    row,
    valid,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SLAB: tl.constexpr,
    FULL: tl.constexpr,
):
    """The inverse of load_tile."""
    for i in tl.static_range(slab_count(WIDTH, SLAB)):
        column = columns(i, WIDTH, SLAB)[None, :]
        place = pointer + row[:, None] * STRIDE + column
        x = slabs[i].to(pointer.dtype.element_ty)
        if not slab_inside(i, WIDTH, SLAB):
            tl.store(place, x, mask=valid[:, None] & (column < WIDTH))
        elif FULL:
            tl.store(place, x)
        else:
            tl.store(place, x, mask=valid[:, None])


@triton.jit
def zero_flat(pointer, begin, count, WIDTH: tl.constexpr, program, programs):
    """Zeroes a program's share of `count` rows from `begin` on, of a contiguous `[*, WIDTH]`."""
    PIECE: tl.constexpr = 512
    place = tl.arange(0, PIECE)
    pointer += begin * WIDTH
    size = count.to(tl.int64) * WIDTH
    step = program.to(tl.int64) * PIECE
    while step < size:
        tl.store(
            pointer + step + place, tl.zeros([PIECE], pointer.dtype.element_ty), mask=step + place < size
        )
        step += tl.cast(programs, tl.int64) * PIECE


@triton.jit
def load_keys_values(data, start, valid, group, SPEC: tl.constexpr, FULL: tl.constexpr):
    """The keys and values of the tokens from `start` on, an int64, of one group of heads."""
    KS: tl.constexpr = get(SPEC, "key_stride")
    VS: tl.constexpr = get(SPEC, "value_stride")
    token = tl.arange(0, valid.shape[0])
    key = data.key + group * key_width(SPEC)
    value = data.value + group * value_width(SPEC)
    if get(SPEC, "indexed"):
        row = tl.load(data.rows + start + token, mask=valid, other=0).to(tl.int64)
    else:
        row = token
        key += start * KS
        value += start * VS
    k = load_tile(key, row, valid, KS, key_width(SPEC), get(SPEC, "dim_slab"), FULL)
    v = load_tile(value, row, valid, VS, value_width(SPEC), get(SPEC, "dim_slab"), FULL)
    return k, v


@triton.jit
def transposed(slabs):
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (tl.trans(slabs[i]),)
    return out


@triton.jit
def products(rows, cols, acc, PRECISION: tl.constexpr):
    """`acc + Σ_i rows_i cols_i`, of slabs `[m, size]` and `[size, n]`."""
    for i in tl.static_range(len(rows)):
        acc = dot(rows[i], cols[i], acc, PRECISION)
    return acc


@triton.jit
def accumulate(rows, weights, acc, PRECISION: tl.constexpr):
    """`acc + rowsᵀ weights`, slabs `[size, n]`, of slabs `[m, size]` and of weights `[m, n]`."""
    out = ()
    for i in tl.static_range(len(rows)):
        out = out + (dot(tl.trans(rows[i]), weights, acc[i], PRECISION),)
    return out


@triton.jit
def outer(weights, rows, PRECISION: tl.constexpr):
    """`weights rows`, slabs `[m, size]`, of weights `[m, n]` and slabs `[n, size]`."""
    out = ()
    for i in tl.static_range(len(rows)):
        zero = tl.zeros([weights.shape[0], rows[i].shape[1]], tl.float32)
        out = out + (dot(weights.to(rows[i].dtype), rows[i], zero, PRECISION),)
    return out


# ------------------------------------------------------------------------------------------------ attention


@triton.jit
def finish_scores(s, scale, bias, SPEC: tl.constexpr):
    """Scores, in base 2 where they are exponents, of products `s` and of a bias that broadcasts."""
    FACTOR: tl.constexpr = LOG2_E if base_two(SPEC) else 1.0
    s = s * (scale * FACTOR)
    if get(SPEC, "bias_heads"):
        s += bias.to(tl.float32) * FACTOR
    return s


@triton.jit
def load_softmax(pointer, place, alive, SPEC: tl.constexpr):
    """`(shift, part)`: an attention is 2^(score - shift)·part. Who is not alive attends to nothing, whatever the
    bias."""
    shift = tl.load(pointer + 2 * place, mask=alive, other=float("inf"))
    mass = tl.load(pointer + 2 * place + 1, mask=alive, other=1.0)
    mass = tl.where(mass > 0, mass, 1.0)  # where a bias of -inf hides all, and for exp
    # In one exponent with it the sum costs all of a history some bits, in one direction.
    if get(SPEC, "approx"):
        shift += log2_once(mass, True)
    return shift, 1 / mass


@triton.jit
def attention(s, valid, softmax, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """The attention from scores, zero where MASKED and not valid; `softmax`, of `load_softmax`, broadcasts."""
    APPROX: tl.constexpr = get(SPEC, "approx")
    if get(SPEC, "normalize") == "softmax" or get(SPEC, "normalize") == "exp":
        shift, part = softmax
        s -= shift
        if MASKED:
            s = tl.where(valid, s, float("-inf"))
        a = exp2(s, APPROX)
        if get(SPEC, "normalize") == "softmax" and not APPROX:
            a *= part
        return a
    elif get(SPEC, "normalize") == "sigmoid":
        a = 1 / (1 + exp2(-s, APPROX))
        if MASKED:
            a = tl.where(valid, a, 0.0)
        return a
    else:
        if MASKED:
            s = tl.where(valid, s, 0.0)
        return s


@triton.jit
def bias_factor(scale, SPEC: tl.constexpr):
    """What dL/ds is multiplied with at once: the scale, unless the bias needs it without."""
    if get(SPEC, "bias_heads"):
        return 1.0
    else:
        return scale


@triton.jit
def attention_backward(grad, a, valid, scale, delta, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """`scale`·dL/ds from dL/da; `delta`, times `scale` already, broadcasts."""
    grad = grad * scale
    if get(SPEC, "normalize") == "softmax":
        return a * (grad - delta)
    elif get(SPEC, "normalize") == "exp":
        return a * grad
    elif get(SPEC, "normalize") == "sigmoid":
        return a * (1 - a) * grad
    else:
        if MASKED:
            grad = tl.where(valid, grad, 0.0)
        return grad


# ------------------------------------------------------------------------------------------------ launches


def uncovered(call: Any) -> str | None:
    """Why no kernel takes this call, or None if one does."""
    if call.keys.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel computes in {call.keys.dtype}"
    widest = max(call.keys.shape[1], call.values.shape[1]) // call.heads
    if widest > settings.WIDEST_HEAD:
        return f"kernels take heads up to {settings.WIDEST_HEAD} wide, not {widest}"
    return None


def heads_together(call: Any, widest: int, columns: int) -> int:
    """As many heads as divide all and fit side by side into `widest` columns of keys and `columns` of scores."""
    width = max(call.keys.shape[1], call.values.shape[1]) // call.heads
    most = max(1, min(widest // width, columns, call.heads))
    return next(n for n in range(most, 0, -1) if call.heads % n == 0)


def data_of(call: Any) -> Data:
    """The data of a call. Rows may lie apart, as long as 32 bits reach across a tile; their elements may not."""
    query, keys, values = (
        x if x.stride(1) == 1 and x.stride(0) < 1 << 24 else x.contiguous()
        for x in (call.query, call.keys, call.values)
    )
    rows = call.offsets if call.rows is None else call.rows.contiguous()
    bias = query if call.bias is None else call.bias.contiguous()
    return Data(
        query,
        keys,
        values,
        call.offsets.contiguous(),
        rows,
        bias,
        call.offsets.numel() - 1,
        call.total,
        query.stride(0),
        call.scale,
    )


def spec_of(
    call: Any, data: Data, launch: settings.Tiles | settings.Pairs, heads: int, **fields: Any
) -> Spec:
    precision = settings.precision(call.keys.dtype)
    nvidia = torch.version.hip is None and not triton.knobs.runtime.interpret
    products = "tf32"
    if precision == "ieee":  # by parts in tf32 where there are any: as exact, and faster than plain FMAs
        products = "tf32x3" if nvidia else "ieee"
    return Spec(
        dim=call.keys.shape[1] // call.heads,
        value_dim=call.values.shape[1] // call.heads,
        heads=call.heads,
        heads_together=heads,
        key_stride=data.key.stride(0),
        value_stride=data.value.stride(0),
        indexed=call.rows is not None,
        bias_heads=0 if call.bias is None else call.bias.shape[1],
        normalize=call.normalize,
        precision=products,
        approx=precision != "ieee" and nvidia,
        block=launch.block,
        tail=launch.tail,
        dim_slab=launch.dim_slab,
        stages=launch.num_stages,
        **fields,
    )


def add_rows(call: Any, gradient: Tensor, table: Tensor) -> Tensor:
    """The gradient of a table whose rows the tokens `[T]` are, from that of the tokens: sorted, then equal rows are
    summed in order. Those of slack may be anything, and are left out."""
    slack = torch.arange(call.total, device=table.device) >= call.offsets[-1]
    rows = call.rows.to(torch.int64).masked_fill(slack, table.shape[0])  # which is no row
    # Of a padding index no gradient is taken: here of the row behind the last.
    grown = torch.ops.aten.embedding_dense_backward(gradient, rows, table.shape[0] + 1, table.shape[0], False)
    return grown[:-1]
