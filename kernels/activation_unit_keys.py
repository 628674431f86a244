"""activation_unit backward, the kernel of the keys and values that several queries share.

The schedule's sequences are tiles of positions here, and its rows the queries that read a tile: one tile's gradient
is summed over queries in registers, and over the programs that a tile is cut between by `merge`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get
from .attend_backward import attend_backward, load_sequence, spread
from .dropout import noise_of
from .histories import load_tile, part_at, share_of, store_tile
from .mlp import load_network, run_layers, score
from .mlp_backward import first_dz, load_back, run_layers_backward, times_weight, with_fresh_network
from .primitives import store_rows
from .schedule import find_sequence, slot_of
from .sums import in_dtype, zero_matrix


@triton.jit
def zero_gradients(SPEC: tl.constexpr):
    """Of the keys of a tile, and of the values if they are others."""
    BLOCK: tl.constexpr = get(SPEC, "block")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    dk = zero_matrix(BLOCK, BLOCK, get(SPEC, "dim"), SLAB)
    if get(SPEC, "separate_values"):
        return dk, zero_matrix(BLOCK, BLOCK, get(SPEC, "value_dim"), SLAB)
    else:
        return dk, ()


@triton.jit
def keys_backward(a, dz, first, grads, dk, dv, SPEC: tl.constexpr):
    """dL/dk and dL/dv with what one query adds to a tile; all in the former where the keys are the values."""
    if get(SPEC, "statistics"):
        return times_weight(dz, first[0], dk, SPEC), dv
    elif get(SPEC, "separate_values"):
        return times_weight(dz, first[0], dk, SPEC), spread(a, grads, dv, SPEC)
    else:
        return times_weight(dz, first[0], spread(a, grads, dk, SPEC), SPEC), dv


@triton.jit(do_not_specialize=["batch"])
def keys_kernel(
    data, tiles, batch, net, upstream, grad_key, grad_value, key_part, value_part, SPEC: tl.constexpr
):
    """dL/dk and dL/dv per position."""
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    BLOCK: tl.constexpr = get(SPEC, "block")
    DTYPE: tl.constexpr = net.key.dtype.element_ty
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    program = tl.program_id(0)
    begin, end = share_of(program, tiles, batch, SPEC)
    if begin >= end:
        return
    tile = find_sequence(tiles.offsets, batch, begin)
    layers, _params, _last = load_network(net, SPEC)
    back = load_back(upstream.back, 0, SPEC)
    token = tl.arange(0, BLOCK)
    while begin < end:
        tile, first_query, last_query, stop = part_at(tiles, batch, tile, begin, end)
        position = tl.load(tiles.begin + tile)
        rest = (tl.load(tiles.end + tile) - position).to(tl.int32)
        valid = token < rest
        k, v = load_tile(data, position, valid, SPEC)
        owner = tl.load(tiles.query + tile) + (begin - first_query)
        dk, dv = zero_gradients(SPEC)
        for _query in tl.range(begin, stop, num_stages=1):
            _q, first, grads = load_sequence(data, net, upstream, owner, False, SPEC)
            again = with_fresh_network(net, owner, first, layers, rest, SPEC)
            row = tl.load(data.offsets + owner) + (position - tl.load(data.starts + owner))
            noise = noise_of(net, row + token, SPEC)
            zs, hs, outputs = run_layers(k, again[0], again[1], again[3], noise, DTYPE, SPEC)
            s = score(hs[len(hs) - 1], again[2])  # [BLOCK]
            a, ds = attend_backward(s, v, grads, upstream.grad_scores, rest, SPEC)
            _dhs, dzs = run_layers_backward(ds, zs, hs, outputs, back, again[3], noise, SPEC)
            dz = in_dtype(first_dz(dzs, again[2], SPEC), DTYPE)
            dk, dv = keys_backward(a, dz, first, grads, dk, dv, SPEC)
            owner += 1
        slot = slot_of(program, begin, stop, first_query, last_query)
        if slot < 0:
            store_tile(grad_key, dk, data, position, valid, D, SPEC)
            if get(SPEC, "separate_values"):
                store_tile(grad_value, dv, data, position, valid, DV, SPEC)
        else:
            store_rows(key_part + slot * (BLOCK * D), dk, token, D, token < BLOCK, D, SLAB)
            if get(SPEC, "separate_values"):
                store_rows(value_part + slot * (BLOCK * DV), dv, token, DV, token < BLOCK, DV, SLAB)
        begin = stop
        tile += 1
