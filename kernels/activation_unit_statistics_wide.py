"""activation_unit_statistics forward where the MLP is wide: means of tiles, and squares of distances from them.

Tiles have tokens that follow each other, of whatever sequences, as in `wide`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .activation_unit_wide import owners
from .arguments import Histories, Spec, depth, get, width
from .normal_form import NormalForm
from .primitives import columns
from .wide import first_sums, held_slab, last_sums, load_tokens


@triton.jit
def store_moments(centres, squares, z, valid, size, unit, SPEC: tl.constexpr):
    """Of some units over the valid tokens of a tile, as many as `size`."""
    LAST: tl.constexpr = depth(SPEC) - 1
    inside = unit < width(LAST, SPEC)
    centre = tl.sum(tl.where(valid[:, None], z, 0.0), 0) / size
    distance = tl.where(valid[:, None], z - centre[None, :], 0.0)
    tl.store(centres + unit, centre, mask=inside)
    tl.store(squares + unit, tl.sum(distance * distance, 0), mask=inside)


@triton.jit(do_not_specialize=["batch", "count"])
def _moments_kernel(data, batch, owners, net, counts, centres, squares, count, SPEC: tl.constexpr):
    """Per tile the number of its tokens, their mean, and the sum of the squares of their distances from it."""
    BLOCK: tl.constexpr = get(SPEC, "block")
    LAST: tl.constexpr = depth(SPEC) - 1
    UNITS: tl.constexpr = width(LAST, SPEC)
    program = tl.program_id(0).to(tl.int64)
    begin = program * BLOCK
    total = tl.load(data.offsets + batch).to(tl.int64)
    if begin >= total:
        return
    size = tl.minimum(total - begin, BLOCK)
    tl.store(counts + program, size)
    _position, valid, pairs, owner, noise = load_tokens(data, batch, owners, net, begin, count, SPEC)
    centres += program * UNITS
    squares += program * UNITS
    if LAST == 0:
        for start in tl.range(0, UNITS, get(SPEC, "slab"), num_stages=get(SPEC, "stages")):
            unit = start + tl.arange(0, get(SPEC, "slab"))
            z = first_sums(net, pairs, owner, valid, unit, SPEC)
            store_moments(centres, squares, z, valid, size.to(tl.float32), unit, SPEC)
    else:
        zs = last_sums(net, pairs, owner, valid, noise, SPEC)
        for j in tl.static_range(len(zs)):
            unit = columns(j, UNITS, held_slab(SPEC))
            store_moments(centres, squares, zs[j], valid, size.to(tl.float32), unit, SPEC)


def moments_of_tiles(
    data: Histories, net: NormalForm, spec: Spec, launch: settings.Launch, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`counts [tiles]`, `centres [tiles, H]` and `squares [tiles, H]` of the last hidden layer's pre-activations."""
    tiles = triton.cdiv(count, launch.block)
    zeros = net.network.first_bias.new_zeros
    counts = zeros(tiles, dtype=torch.int64)
    centres, squares = zeros(tiles, net.hidden[-1]), zeros(tiles, net.hidden[-1])
    if count and data.offsets.numel() > 1:
        _moments_kernel[(tiles,)](
            data,
            data.offsets.numel() - 1,
            owners(data.offsets, count),
            net.network,
            counts,
            centres,
            squares,
            count,
            SPEC=spec,
            num_warps=launch.num_warps,
        )
    return counts, centres, squares
