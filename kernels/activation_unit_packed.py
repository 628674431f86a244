"""activation_unit forward for short sequences: tiles of tokens of several sequences."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import get
from .dropout import noise_of
from .histories import load_tile, share_of
from .mlp import hidden_zero
from .mlp_backward import with_fresh_vectors
from .packed import (
    GROUP,
    add_rows,
    first_layer,
    group_at,
    load_queries,
    load_resident,
    member_of,
    member_rows,
    multiply,
    multiply_slab,
    one_hot,
    store_members,
)
from .pooling import weigh
from .primitives import dot, exp2, scale, vector_max, zero_rows
from .schedule import find_sequence, slot_of
from .streamed import load_layers, score_tokens


@triton.jit(do_not_specialize=["batch"])
def packed_forward_kernel(
    data, batch, net, identity, out, peak_mass, scores, part, part_state, SPEC: tl.constexpr
):
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    BLOCK: tl.constexpr = get(SPEC, "block")
    SOFTMAX: tl.constexpr = get(SPEC, "softmax")
    APPROX: tl.constexpr = get(SPEC, "approx")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = net.key.dtype.element_ty
    LEAST_MASS: tl.constexpr = 2.0**-6 if DTYPE == tl.float16 else 2.0**-60
    program = tl.program_id(0)
    begin, end = share_of(program, data, batch, SPEC)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, batch, begin)
    layers, _params, last = load_layers(net, SPEC)
    key, product = load_resident(net.key, True, SPEC), load_resident(net.product, True, SPEC)
    token = tl.arange(0, BLOCK)
    ones = tl.full([BLOCK, 8], 1.0, tl.float32).to(DTYPE)
    most = 1 * GROUP
    while begin < end:
        sequence, count, stop = group_at(data, batch, sequence, begin, end, most)
        weight, bias = first_layer(net, key, product, sequence, count, True, SPEC)
        peak = tl.full([], float("-inf"), tl.float32)
        mass = tl.zeros([GROUP, 8], tl.float32)
        acc = zero_rows(GROUP, DV, SLAB)
        row = begin.to(tl.int64)
        zero = hidden_zero(stop - begin)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            valid = token < (stop - start)
            member = member_of(data, start + token, sequence, count)  # [BLOCK]
            k, v = load_tile(data, row, valid, SPEC, zero)
            q = load_queries(data, sequence, member, SPEC)
            chosen = one_hot(identity, tl.where(valid, member, GROUP))  # [BLOCK, GROUP]
            x = k + multiply(q, k, APPROX) + (chosen,)
            first = ((weight,), bias)
            again = with_fresh_vectors(net, 0, first, layers, last, (stop - start).to(tl.int32), SPEC)
            noise = noise_of(net, row + token, SPEC)
            s = score_tokens(x, first, again[1], again[3], again[2], SPEC, noise)  # [BLOCK]
            if SOFTMAX:
                if get(SPEC, "with_scores"):
                    tl.store(scores + row + token, s, mask=valid)
                s = tl.where(valid, s, float("-inf"))
                top = vector_max(s)
                if top > peak + 8:
                    factor = exp2(peak - top, APPROX)
                    peak = top
                    mass = mass * factor
                    acc = scale(acc, factor)
                p = exp2(s - peak, APPROX)
            else:
                p = weigh(s, get(SPEC, "normalize"), APPROX)
                if get(SPEC, "with_scores"):
                    tl.store(scores + row + token, p, mask=valid)
                p = tl.where(valid, p, 0.0)
            p_rows = tl.trans(multiply_slab(p.to(DTYPE)[:, None], chosen, APPROX))  # [GROUP, BLOCK]
            acc = add_rows(p_rows, v, acc, PRECISION)
            if SOFTMAX:
                mass = dot(p_rows, ones, mass, PRECISION)
            row += BLOCK
        first_row, last_row = member_rows(data, sequence, count)  # [GROUP]
        from_row, to_row = tl.maximum(first_row, begin), tl.minimum(last_row, stop)
        here = from_row < to_row
        norm = tl.max(mass, 1)
        # One peak serves all members. Where it lies so far above a member's scores that its weights vanish, or where
        # a member is not a number, which products pass on, members are taken one by one.
        if SOFTMAX and most > 1 and tl.min(tl.where(here & ~(norm >= LEAST_MASS), 0, 1)) == 0:
            most = 1
        else:
            slot = slot_of(program, from_row, to_row, first_row, last_row)
            whole = here & (slot < 0)
            cut = here & (slot >= 0)
            if SOFTMAX:
                member = peak_mass + 2 * (sequence + tl.arange(0, GROUP))
                tl.store(member, tl.broadcast_to(peak, [GROUP]), mask=whole)
                tl.store(member + 1, norm, mask=whole)
                tl.store(part_state + 2 * slot, tl.broadcast_to(peak, [GROUP]), mask=cut)
                tl.store(part_state + 2 * slot + 1, norm, mask=cut)
                acc = scale(acc, tl.where(whole, 1 / norm, 1.0)[:, None])
            place = (sequence.to(tl.int64) + tl.arange(0, GROUP)) * DV
            store_members(out + place, part + slot * DV, acc, whole, cut, DV, SLAB)
            begin = stop
            sequence += count
            most = 1 * GROUP
