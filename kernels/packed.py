"""Short sequences that share a tile: what the packed kernels have in common.

A *group* is up to GROUP consecutive sequences, its *members*. Its rows are cut into tiles without regard to where
sequences begin, so that no tile but a group's last has rows to spare. As the tokens of a tile have several queries,
the first layer is not folded into one matrix per sequence; it reads `[k, q·k, one-hot of the member]`, 2 D + 16
columns, and its weight is `[key, product, c of the members]`. So one set of weights serves all sequences, and c needs
no gather. Sums over tokens by member are products with the one-hot matrix too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import get, narrowest, widest, width
from .primitives import columns, dot, load_matrix, load_rows, slab_count, slab_inside, slab_start
from .schedule import find_sequence, slot_of

GROUP = tl.constexpr(16)  # rows of the smallest product


@triton.jit
def group_at(data, batch, sequence, begin, end, most):
    """The group of up to `most` members that begins with row `begin`: `(sequence, members, stop)`, where the first is
    `sequence` or one behind it, and the last where the group's rows before `end` stop."""
    if tl.load(data.offsets + sequence + 1) <= begin:  # empty
        sequence = find_sequence(data.offsets, batch, begin)
    members = tl.minimum(batch - sequence, most)
    return sequence, members, tl.minimum(tl.load(data.offsets + sequence + members), end)


@triton.jit
def member_rows(data, sequence, members):
    """`(first_row, last_row)` of each member, `[GROUP]`; none past the last member."""
    member = tl.arange(0, GROUP)
    inside = member < members
    first_row = tl.load(data.offsets + sequence + member, mask=inside, other=0)
    return first_row, tl.load(data.offsets + sequence + member + 1, mask=inside, other=0)


@triton.jit
def member_of(data, row, sequence, members):
    """The member that each row is of, by bisection: the last that begins at or before it."""
    member = row.to(tl.int32) * 0
    for bit in tl.static_range(4):
        probe = member + (GROUP >> (bit + 1))
        begin = tl.load(data.offsets + sequence + probe, mask=probe < members, other=0)
        member = tl.where((probe < members) & (begin <= row), probe, member)
    return member


@triton.jit
def load_queries(data, sequence, member, SPEC: tl.constexpr):
    """Of each token its query."""
    D: tl.constexpr = get(SPEC, "dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    STRIDE: tl.constexpr = get(SPEC, "query_stride")
    query = data.query + sequence.to(tl.int64) * STRIDE
    slabs = ()
    for i in tl.static_range(slab_count(D, SLAB)):
        column = columns(i, D, SLAB)[None, :]
        place = query + member[:, None] * STRIDE + column
        if slab_inside(i, D, SLAB):
            slabs = slabs + (tl.load(place),)
        else:
            slabs = slabs + (tl.load(place, mask=column < D, other=0.0),)
    return slabs


@triton.jit
def load_members(pointer, members, WIDTH: tl.constexpr, WIDEST: tl.constexpr, zero=0):
    """A contiguous row of each member, slabs `[GROUP, size]`; zero past the last member. `zero` is added to the rows,
    see `mlp.hidden_zero`."""
    member = tl.arange(0, GROUP)
    return load_rows(pointer, member + zero, WIDTH, member < members, WIDTH, WIDEST)


@triton.jit
def one_hot(identity, member):
    """`[tokens, GROUP]`, of member GROUP all zero. Looked up, as that costs a tenth of comparisons."""
    return tl.load(identity + member[:, None] * GROUP + tl.arange(0, GROUP)[None, :])


@triton.jit
def multiply(a, b, APPROX: tl.constexpr):
    """`a·b` of slabs, in their dtype."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (multiply_slab(a[i], b[i], APPROX),)
    return out


@triton.jit
def multiply_slab(a, b, APPROX: tl.constexpr):
    a, b = tl.broadcast(a, b)
    if APPROX and a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [a, b],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def resident(x, PURE: tl.constexpr, SPEC: tl.constexpr):
    """x, but as a value that a compiler does not make again for each product that reads it, nor keep in registers as
    an operand of that product: it goes to shared memory, once. Where products read it in two layouts a PURE one goes
    there twice; one that is not Triton 3.9 keeps in registers, where they read it in one."""
    if get(SPEC, "approx") and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=PURE, pack=2)
    else:
        return x


@triton.jit
def load_biases(net, sequence, members, j: tl.constexpr, SPEC: tl.constexpr, zero=0):
    """c of the members, slab j of the units, as a weight `[units, GROUP]`."""
    H1: tl.constexpr = width(0, SPEC)
    unit = columns(j, H1, widest(0, SPEC), narrowest(0, SPEC))
    member = tl.arange(0, GROUP)
    c = net.first_bias + sequence.to(tl.int64) * H1
    inside = (unit < H1)[:, None] & (member < members)[None, :]
    return tl.load(c + (member + zero)[None, :] * H1 + unit[:, None], mask=inside, other=0.0)


@triton.jit
def load_resident(pointer, PURE: tl.constexpr, SPEC: tl.constexpr):
    """A matrix `[H1, D]` of the first layer, which all sequences share, as slabs."""
    D: tl.constexpr = get(SPEC, "dim")
    slabs = load_matrix(
        pointer, width(0, SPEC), widest(0, SPEC), narrowest(0, SPEC), D, get(SPEC, "dim_slab")
    )
    return all_resident(slabs, PURE, SPEC)


@triton.jit
def all_resident(slabs, PURE: tl.constexpr, SPEC: tl.constexpr):
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (resident(slabs[i], PURE, SPEC),)
    return out


@triton.jit
def first_layer(net, key, product, sequence, members, PURE: tl.constexpr, SPEC: tl.constexpr, zero=0):
    """The first layer of a group, `(weight, bias)`; its bias is zero. `zero` is added to the rows of c."""
    COUNT: tl.constexpr = slab_count(get(SPEC, "dim"), get(SPEC, "dim_slab"))
    weight = ()
    bias = ()
    for j in tl.static_range(len(key) // COUNT):
        for i in tl.static_range(COUNT):
            weight = weight + (key[j * COUNT + i],)
        for i in tl.static_range(COUNT):
            weight = weight + (product[j * COUNT + i],)
        c = load_biases(net, sequence, members, j, SPEC, zero)
        weight = weight + (resident(c.to(net.key.dtype.element_ty), PURE, SPEC),)
        bias = bias + (tl.zeros([c.shape[0]], tl.float32),)
    return weight, bias


@triton.jit
def add_rows(rows, slabs, acc, PRECISION: tl.constexpr):
    """`acc + rows·slabs`."""
    out = ()
    for i in tl.static_range(len(slabs)):
        out = out + (dot(rows, slabs[i], acc[i], PRECISION),)
    return out


@triton.jit
def store_members(
    whole,
    cut,
    slabs,
    is_whole,
    is_cut,
    WIDTH: tl.constexpr,
    WIDEST: tl.constexpr,
    NARROWEST: tl.constexpr = 16,
):
    """Each member's row of slabs `[GROUP, size]`, to where `whole` points or to where `cut` does."""
    for i in tl.static_range(slab_count(WIDTH, WIDEST, NARROWEST)):
        column = columns(i, WIDTH, WIDEST, NARROWEST)[None, :]
        inside = column < WIDTH
        tl.store(whole[:, None] + column, slabs[i], mask=is_whole[:, None] & inside)
        tl.store(cut[:, None] + column, slabs[i], mask=is_cut[:, None] & inside)


@triton.jit
def held_rows(data, sequence, members, begin, stop, program):
    """What becomes of the row of a member that a thread holds elements of, in a product `[rows, GROUP]`, see
    `fragments`, for products of 16, 32, 64 and 128 rows: per octet of members and place in a pair
    `(sequence, slot, whether it is whole, whether it is cut)`, `[2 rows]`."""
    held = ()
    for size in tl.static_range(4):
        lane = tl.arange(0, 32 << size)
        for i in tl.static_range(4):
            member = i // 2 * 8 + lane % 4 * 2 + i % 2
            inside = member < members
            first_row = tl.load(data.offsets + sequence + member, mask=inside, other=0)
            last_row = tl.load(data.offsets + sequence + member + 1, mask=inside, other=0)
            from_row, to_row = tl.maximum(first_row, begin), tl.minimum(last_row, stop)
            slot = slot_of(program, from_row, to_row, first_row, last_row)
            here = from_row < to_row
            held = held + ((sequence.to(tl.int64) + member, slot, here & (slot < 0), here & (slot >= 0)),)
    return held


@triton.jit
def store_held_slab(
    whole, cut, held, slab, i: tl.constexpr, WIDTH: tl.constexpr, WIDEST: tl.constexpr, STRIDE: tl.constexpr
):
    size: tl.constexpr = slab.shape[0]
    parts = tl.permute(tl.reshape(slab, [size // 16, 2, 8, 2, 4, 2]), (0, 2, 4, 3, 5, 1))
    halves = tl.split(tl.reshape(parts, [2 * size, 2, 2, 2]))  # of 16 rows
    lane = tl.arange(0, 2 * size)
    row = slab_start(i, WIDTH, WIDEST) + lane // 32 * 16 + lane // 4 % 8
    for half in tl.static_range(2):
        places = tl.split(halves[half])  # in a pair
        for place in tl.static_range(2):
            octets = tl.split(places[place])
            for octet in tl.static_range(2):
                member, slot, is_whole, is_cut = held[(size // 32 - size // 128) * 4 + octet * 2 + place]
                at = row + 8 * half
                tl.store(whole + member * STRIDE + at, octets[octet], mask=is_whole & (at < WIDTH))
                tl.store(cut + slot * STRIDE + at, octets[octet], mask=is_cut & (at < WIDTH))


@triton.jit
def store_held(whole, cut, held, slabs, WIDTH: tl.constexpr, WIDEST: tl.constexpr, STRIDE: tl.constexpr):
    """As store_members, of slabs `[size, GROUP]`. Each thread stores what it holds: rows would pass shared memory, at
    addresses that take registers in the loop over tokens."""
    for i in tl.static_range(slab_count(WIDTH, WIDEST)):
        store_held_slab(whole, cut, held, slabs[i], i, WIDTH, WIDEST, STRIDE)


def one_hot_rows(like: Tensor) -> Tensor:
    """What `one_hot` looks up: `[GROUP + 1, GROUP]`, in the dtype of `like`."""
    return torch.eye(GROUP.value + 1, GROUP.value, dtype=like.dtype, device=like.device)
