"""What the kernels of pairwise_pool share: their arguments, and the way from two fields to the units of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pairwise_pool_settings as settings
from .arguments import get
from .primitives import columns, dot, load_rows, slab_count, split_tf32


class Data(NamedTuple):
    fields: Tensor  # [B, F, K]
    weight: Tensor  # [A, K]
    bias: Tensor  # [A]
    projection: Tensor  # [A]
    seed: Tensor  # [1], of dropout
    batch: int


class Rows(NamedTuple):
    place: Any  # [ROWS], int64
    valid: Any  # [ROWS]


class Network(NamedTuple):
    weight: Any  # slabs [16, 16], those of all columns of fields for the first units, then the next
    bias: Any  # slabs [16]
    projection: Any  # slabs [16]


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Nothing here depends on the size of the batch."""

    count: int  # of fields
    dim: int
    hidden: int
    batch_stride: int
    field_stride: int
    dropout: float
    scores: bool  # forward writes them, backward gets the gradient of the weights
    precision: str  # of products, as tl.dot takes it
    part_precision: str  # of products with ones, of a tile in parts
    sum_precision: str  # of products with ones, of one that is not
    approx: bool  # approximate instructions of NVIDIA GPUs
    rows: int  # samples of a program
    group: int  # most fields that a program holds at a time
    stages: int

    @property
    def groups(self) -> int:
        return -(-self.count // self.group)

    @property
    def first(self) -> int:
        """Fields of the first group, where all others are full."""
        return self.count - (self.groups - 1) * self.group

    @property
    def pairs(self) -> int:
        return self.count * (self.count - 1) // 2

    @property
    def few(self) -> bool:
        """Whether pairs are so few that backward sums up their delta itself, where products are exact."""
        return 1 < self.pairs <= settings.FEW_PAIRS and self.precision != "tf32"

    @property
    def gain(self) -> float:
        return 1 / (1 - self.dropout)


# ------------------------------------------------------------------------------------------------ loads


@triton.jit
def rows_of(data, tile, ROWS: tl.constexpr):
    place = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
    return Rows(place, place < data.batch)


@triton.jit
def group_start(group, SPEC: tl.constexpr):
    """The first field of a group but the first."""
    return get(SPEC, "first") + (group - 1) * get(SPEC, "group")


@triton.jit
def load_field(data, rows, f, SPEC: tl.constexpr):
    """`[ROWS, K]` as slabs of 16 columns, zero past the batch."""
    DIM: tl.constexpr = get(SPEC, "dim")
    pointer = data.fields + f * get(SPEC, "field_stride")
    return load_rows(pointer, rows.place, get(SPEC, "batch_stride"), rows.valid, DIM, 16)


@triton.jit
def load_group(data, rows, i, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """COUNT fields from field i on, all slabs of one after those of the other."""
    group = ()
    for c in tl.static_range(COUNT):
        group = group + load_field(data, rows, i + c, SPEC)
    return group


@triton.jit
def load_vector_slabs(pointer, WIDTH: tl.constexpr):
    """`[WIDTH]` as slabs of 16, zero past its end."""
    slabs = ()
    for i in tl.static_range(slab_count(WIDTH, 16)):
        column = columns(i, WIDTH, 16)
        slabs = slabs + (tl.load(pointer + column, mask=column < WIDTH, other=0.0),)
    return slabs


@triton.jit
def load_weight(data, BY_UNIT: tl.constexpr, SPEC: tl.constexpr):
    """Slabs `[units, columns of fields]`, or without BY_UNIT transposed."""
    DIM: tl.constexpr = get(SPEC, "dim")
    HIDDEN: tl.constexpr = get(SPEC, "hidden")
    slabs = ()
    for a in tl.static_range(slab_count(HIDDEN, 16)):
        for k in tl.static_range(slab_count(DIM, 16)):
            unit = columns(a, HIDDEN, 16)
            column = columns(k, DIM, 16)
            unit = unit[:, None] if BY_UNIT else unit[None, :]
            column = column[None, :] if BY_UNIT else column[:, None]
            inside = (unit < HIDDEN) & (column < DIM)
            slabs = slabs + (tl.load(data.weight + unit * DIM + column, mask=inside, other=0.0),)
    return slabs


@triton.jit
def load_network(data, SPEC: tl.constexpr):
    HIDDEN: tl.constexpr = get(SPEC, "hidden")
    return Network(
        load_weight(data, False, SPEC),
        load_vector_slabs(data.bias, HIDDEN),
        load_vector_slabs(data.projection, HIDDEN),
    )


# ------------------------------------------------------------------------------------------------ arithmetic


@triton.jit
def product(a, b, APPROX: tl.constexpr):
    """`a·b`, rounded to the dtype of a."""
    if APPROX and a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [a, b],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif APPROX and a.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def narrow_relu(z, DTYPE: tl.constexpr, APPROX: tl.constexpr):
    """`max(z, 0)` rounded to DTYPE."""
    if APPROX and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,f,f", [z], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif APPROX and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,f,f", [z], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.maximum(z, 0.0).to(DTYPE)


@triton.jit
def pair_products(own, c: tl.constexpr, v, SPEC: tl.constexpr):
    """Of field c of a group with `v`, slabs `[ROWS, 16]`."""
    products = ()
    for k in tl.static_range(len(v)):
        products = products + (product(own[c * len(v) + k], v[k], get(SPEC, "approx")),)
    return products


@triton.jit
def units(products, net, SPEC: tl.constexpr):
    """The hidden layer before its ReLU, slabs `[ROWS, 16]`."""
    SLABS: tl.constexpr = len(products)
    out = ()
    for a in tl.static_range(len(net.bias)):
        bias = net.bias[a].to(tl.float32)[None, :]
        z = tl.zeros([products[0].shape[0], 16], tl.float32) + bias
        for k in tl.static_range(SLABS):
            z = dot(products[k], net.weight[a * SLABS + k], z, get(SPEC, "precision"))
        out = out + (z,)
    return out


@triton.jit
def in_parts(x, DTYPE: tl.constexpr):
    """Weights `[rows, n]`, at most 1, as `[rows, 2n]`, each in two parts side by side: float32 as two of tf32, and for
    products of 16 bits, which want 16 columns, float16, which is finer than bfloat16, and zero."""
    if DTYPE == tl.float32:
        high, low = split_tf32(x)
    else:
        high = x.to(tl.float16)
        low = tl.zeros(x.shape, tl.float16)
    return tl.reshape(tl.join(high, low), [x.shape[0], 2 * x.shape[1]])


@triton.jit
def widened(slabs):
    """Slabs `[rows, 16]` in float32, from 16 bits by a product with ones: where the products that follow want them."""
    if slabs[0].dtype == tl.float32:
        return slabs
    else:
        eye = tl.arange(0, 16)[:, None] == tl.arange(0, 16)[None, :]
        ones = tl.where(eye, tl.full([16, 16], 1.0, tl.float32), 0.0).to(slabs[0].dtype)
        wide = ()
        for i in tl.static_range(len(slabs)):
            wide = wide + (dot(slabs[i], ones, tl.zeros(slabs[i].shape, tl.float32), "tf32"),)
        return wide


@triton.jit
def part(slabs, c: tl.constexpr, SLABS: tl.constexpr):
    """The slabs of field c of a group."""
    out = ()
    for k in tl.static_range(SLABS):
        out = out + (slabs[c * SLABS + k],)
    return out


@triton.jit
def multiplied(x, y):
    out = ()
    for k in tl.static_range(len(x)):
        out = out + (x[k] * y[k],)
    return out


@triton.jit
def add_products(acc, x, y):
    out = ()
    for k in tl.static_range(len(acc)):
        out = out + (acc[k] + x[k] * y[k],)
    return out


@triton.jit
def add_multiplied(acc, factor, x):
    out = ()
    for k in tl.static_range(len(acc)):
        out = out + (acc[k] + factor * x[k],)
    return out


@triton.jit
def pair_place(i, j, SPEC: tl.constexpr):
    """The place of the pair of fields j < i among all."""
    return j * get(SPEC, "count") - j * (j + 1) // 2 + i - j - 1


# ------------------------------------------------------------------------------------------------ the host's side


def uncovered(call: Any) -> str | None:
    """Why no kernel here takes this call, or None if one does."""
    _, count, dim = call.fields.shape
    hidden = call.weight.shape[0]
    if call.fields.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel computes in {call.fields.dtype}"
    if max(dim, hidden) > settings.WIDEST:
        return f"kernels take fields and networks up to {settings.WIDEST} wide, not {max(dim, hidden)}"
    if count > settings.MOST_FIELDS:
        return f"kernels take up to {settings.MOST_FIELDS} fields, not {count}"
    return None


def arguments(call: Any) -> Data:
    fields = call.fields
    if fields.stride(2) != 1 or fields.stride(0) < fields.stride(1) * fields.shape[1]:
        fields = fields.contiguous()
    weight, bias, projection = (x.contiguous() for x in (call.weight, call.bias, call.projection))
    return Data(fields, weight, bias, projection, bias if call.seed is None else call.seed, fields.shape[0])


def spec_of(call: Any, data: Data, launch: settings.PairsLaunch, scores: bool | None = None) -> Spec:
    approx = torch.version.hip is None and not triton.knobs.runtime.interpret
    precision, parts, sums = "tf32", "tf32", "tf32"
    if call.fields.dtype == torch.float32:
        sums = "tf32x3" if approx else "ieee"
        if settings.precision(call.fields.dtype) == "ieee":
            precision = sums
        if not approx:
            parts = "ieee"
    return Spec(
        count=call.fields.shape[1],
        dim=call.fields.shape[2],
        hidden=call.weight.shape[0],
        batch_stride=data.fields.stride(0),
        field_stride=data.fields.stride(1),
        dropout=call.dropout if call.seed is not None else 0.0,
        scores=call.return_weights if scores is None else scores,
        precision=precision,
        part_precision=parts,
        sum_precision=sums,
        approx=approx,
        rows=launch.rows,
        group=settings.group(launch, call),
        stages=launch.num_stages,
    )
