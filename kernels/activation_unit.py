"""activation_unit forward: one kernel for all of it, one that joins what the schedule cut apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activation_unit_candidates, settings
from .activation_unit_packed import packed_forward_kernel
from .activation_unit_wide import score_all
from .arguments import Histories, Spec, get
from .dropout import noise_of
from .histories import load_tile, part_at, position_of, share_of
from .mlp import hidden_zero
from .mlp_backward import layers_in_tile
from .normal_form import NormalForm, normal_form
from .packed import one_hot_rows
from .pooling import pool, pool_rows, pooled, weigh
from .primitives import (
    exp2,
    load_vector,
    scale,
    store_row,
    vector_max,
    vector_sum,
    zero_rows,
)
from .schedule import find_sequence, merge, slot_of
from .streamed import first_layer, load_layers, score_tokens
from .tuning import tuned


@triton.jit(do_not_specialize=["batch"])
def _forward_kernel(data, batch, net, out, peak_mass, scores, part, part_state, SPEC: tl.constexpr):
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    BLOCK: tl.constexpr = get(SPEC, "block")
    SOFTMAX: tl.constexpr = get(SPEC, "softmax")
    APPROX: tl.constexpr = get(SPEC, "approx")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    EXACT: tl.constexpr = get(SPEC, "split") or PRECISION == "ieee"
    program = tl.program_id(0)
    begin, end = share_of(program, data, batch, SPEC)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, batch, begin)
    if not get(SPEC, "scored"):
        layers, _params, last = load_layers(net, SPEC)
    token = tl.arange(0, BLOCK)
    while begin < end:
        sequence, first_row, last_row, stop = part_at(data, batch, sequence, begin, end)
        owner = sequence.to(tl.int64)
        if not get(SPEC, "scored"):
            query = data.query + owner * get(SPEC, "query_stride") + hidden_zero(stop - begin)
            q = load_vector(query, D, SLAB)
            first = first_layer(net, q, owner, SPEC)
        peak = tl.full([], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK], tl.float32)
        acc = zero_rows(pool_rows(BLOCK, EXACT), DV, SLAB)
        position = position_of(data, sequence, first_row, begin, SPEC)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            valid = token < (stop - start)
            k, v = load_tile(data, position, valid, SPEC)
            if get(SPEC, "scored"):
                s = tl.load(scores + position + token, mask=valid, other=0.0)
            else:
                noise = noise_of(net, start + token, SPEC)
                again = layers_in_tile(net, owner, first, layers, last, stop - start, SPEC)
                s = score_tokens(k, again[0], again[1], again[3], again[2], SPEC, noise)  # [BLOCK]
            if SOFTMAX:
                if get(SPEC, "with_scores") and not get(SPEC, "scored"):
                    tl.store(scores + position + token, s, mask=valid)
                s = tl.where(valid, s, float("-inf"))
                top = vector_max(s)
                # Rescaling waits until the maximum has grown 2^8 times: as exact, and rare.
                if top > peak + 8:
                    factor = exp2(peak - top, APPROX)
                    peak = top
                    mass = mass * factor
                    acc = scale(acc, factor)
                p = exp2(s - peak, APPROX)
                mass += p
            else:
                p = weigh(s, get(SPEC, "normalize"), APPROX)
                if get(SPEC, "with_scores"):
                    tl.store(scores + position + token, p, mask=valid)
                p = tl.where(valid, p, 0.0)
            acc = pool(p, v, acc, EXACT, PRECISION)
            position += BLOCK
        slot = slot_of(program, begin, stop, first_row, last_row)
        norm = vector_sum(mass)
        row = pooled(acc, EXACT)
        if slot < 0:
            if SOFTMAX:
                row = scale(row, 1 / norm)
                tl.store(peak_mass + 2 * owner, peak)
                tl.store(peak_mass + 2 * owner + 1, norm)
            store_row(out + owner * DV, row, DV, SLAB)
        else:
            store_row(part + slot * DV, row, DV, SLAB)
            tl.store(part_state + 2 * slot, peak)
            tl.store(part_state + 2 * slot + 1, norm)
        begin = stop
        sequence += 1


def uncovered(unit: Any) -> str | None:
    """Why no kernel here takes this call, or None if one does."""
    if unit.keys.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel computes in {unit.keys.dtype}"
    if not 1 <= len(unit.weights) <= 3:
        return f"kernels have 1 to 3 hidden layers, not {len(unit.weights)}"
    dim, hidden = max(unit.keys.shape[1], unit.values.shape[1]), hidden_widths(unit)
    if not settings.is_wide(dim, hidden):
        return None
    if unit.candidates is not None:
        return (
            f"kernels of queries that share histories take keys, values and hidden layers up to {settings.WIDEST} "
            f"wide, not {max(dim, *hidden)}"
        )
    if dim > settings.WIDEST_DIM or max(hidden) > settings.WIDEST_HIDDEN:
        return (
            f"kernels take keys and values up to {settings.WIDEST_DIM} and hidden layers up to "
            f"{settings.WIDEST_HIDDEN} wide, not {dim} and {max(hidden)}"
        )
    precision = settings.precision(unit.keys.dtype)
    if not settings.wide_fits(precision, unit.keys.shape[1], hidden, unit.keys.device):
        return f"the shared memory of this device does not hold a tile of keys {dim} and layers {hidden} wide"
    return None


def kernel_of(unit: Any) -> settings.Kernel:
    """The kernel that forward launches for a call that is covered."""
    dim, hidden = max(unit.keys.shape[1], unit.values.shape[1]), hidden_widths(unit)
    precision = settings.precision(unit.keys.dtype)
    if settings.is_wide(dim, hidden):
        return settings.Kernel("wide", f"a width of {max(dim, *hidden)}, above {settings.WIDEST}")
    if settings.share_tiles(precision, dim, unit):
        return settings.Kernel(
            "candidates", f"{settings.CANDIDATES} or more queries of a history share a tile"
        )
    if settings.packs_forward(precision, dim, unit):
        return settings.Kernel(
            "packed", f"histories of less than {settings.SHORT_FORWARD} items on average share a tile"
        )
    return settings.Kernel("classic", f"widths up to {settings.WIDEST}")


def hidden_widths(unit: Any) -> list[int]:
    return [unit.first.bias.shape[1], *(b.shape[0] for b in unit.biases[:-1])]


def forward(unit: Any, with_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, Dv]`, the attention `[T]` if asked for, and of the softmax the maximum in base 2 and the sum, `[B, 2]`,
    of a folded call, in float32.

    `unit` is a `recattn.composite.activation_unit.Unit`.
    """
    hidden, device = hidden_widths(unit), unit.keys.device
    dim, precision = max(unit.keys.shape[1], unit.values.shape[1]), settings.precision(unit.keys.dtype)
    kernel = kernel_of(unit).name
    launch, split = settings.forward(precision, dim, hidden, device)
    split = split and kernel != "wide"
    net = normal_form(unit, bounded_half=True, split=split)
    data = histories(unit)
    batch, value_dim = unit.query.shape[0], data.value.shape[1]
    peak_mass = data.key.new_ones(batch, 2, dtype=torch.float32)
    out = peak_mass.new_zeros(batch, value_dim)
    scores = peak_mass.new_zeros(unit.positions if with_scores or kernel == "wide" else 0)
    if batch == 0 or unit.positions == 0:
        return out, scores, peak_mass
    if kernel == "candidates":
        launch = settings.choose(settings.CANDIDATES_FORWARD, precision, device)
        launch = tuned("candidates", precision, launch, dim, hidden, device)
        spec = specialize(unit, data, net, launch, False)
        activation_unit_candidates.forward(unit, data, net.network, out, peak_mass, spec, launch)
        return out, scores, peak_mass
    if kernel == "packed":
        launch = settings.choose(settings.PACKED_FORWARD, precision, device)
    launch = tuned(
        "packed forward" if kernel == "packed" else "forward",
        "split" if split else precision,
        launch,
        dim,
        hidden,
        device,
    )
    programs = settings.programs(launch, unit.most_rows, data.key.device)
    spec = specialize(unit, data, net, launch, with_scores)
    if split:
        spec = replace(spec, precision="tf32", split=True)
    if kernel == "wide":
        scoring = settings.wide(settings.WIDE_SCORES, precision, unit.keys.shape[1], hidden, device)
        scoring = tuned("wide scores", precision, scoring, dim, hidden, device)
        products = settings.wide_products(precision)
        scoring_spec = replace(specialize(unit, data, net, scoring, with_scores), precision=products)
        score_all(data, net, scoring_spec, scoring, scores)
        # Pooling is all that is left to compute, so it can be exact: then Σ_t dL/ds_t of a sequence is as near zero as
        # backward expects, which does not round dL/da either.
        spec = replace(spec, scored=True, precision="ieee")
    part, part_state = peak_mass.new_empty(2 * programs, value_dim), peak_mass.new_empty(2 * programs, 2)
    results = (out, peak_mass, scores, part, part_state)
    if kernel != "packed":
        _forward_kernel[(programs,)](
            data, batch, net.network, *results, SPEC=spec, num_warps=launch.num_warps
        )
    else:
        identity = one_hot_rows(net.network.key)
        packed_forward_kernel[(programs,)](
            data, batch, net.network, identity, *results, SPEC=spec, num_warps=launch.num_warps
        )
    merge(
        part, part_state if spec.softmax else None, data.offsets, out, peak_mass, programs, launch.least_rows
    )
    if with_scores and spec.softmax:
        scores = _attention(scores, data.offsets, peak_mass)
    return out, scores, peak_mass


def histories(unit: Any) -> Histories:
    """The data of a call. Rows may lie apart, as long as 32 bits reach across a tile; their elements may not."""
    query, keys, values = (
        x if x.stride(1) == 1 and x.stride(0) < 1 << 24 else x.contiguous()
        for x in (unit.query, unit.keys, unit.values)
    )
    offsets = unit.offsets
    starts = offsets if unit.candidates is None else unit.candidates.starts
    rows = offsets if unit.rows is None else unit.rows
    return Histories(query, keys, values, offsets, starts, rows)


def specialize(
    unit: Any, data: Histories, net: NormalForm, launch: settings.Launch, with_scores: bool
) -> Spec:
    return Spec(
        dim=unit.keys.shape[1],
        value_dim=unit.values.shape[1],
        hidden=net.hidden,
        activation=net.form.kernel,
        normalize=unit.normalize,
        separate_values=unit.values is not unit.keys,
        query_stride=data.query.stride(0),
        key_stride=data.key.stride(0),
        value_stride=data.value.stride(0),
        shared=unit.candidates is not None,
        indexed=unit.rows is not None,
        scatter=unit.unique_rows,
        with_scores=with_scores,
        precision="ieee" if net.precision == "ieee" else "tf32",
        approx=net.approx,
        block=launch.block,
        slab=launch.slab,
        last_slab=launch.last_slab,
        dim_slab=launch.dim_slab,
        least_rows=launch.least_rows,
        stages=launch.num_stages,
        warps=launch.num_warps,
        fresh=launch.fresh,
        dropped=0 if unit.dropout is None else unit.dropout.dropped,
        zero=net.form.zero,
    )


def _attention(scores: Tensor, offsets: Tensor, peak_mass: Tensor) -> Tensor:
    """Softmax, from scores in base 2 and each sequence's maximum and sum; zero for slack rows."""
    rows = torch.arange(scores.shape[0], device=scores.device, dtype=offsets.dtype)
    sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
    normalizer = torch.nn.functional.pad(peak_mass, (0, 0, 0, 1), value=torch.inf)  # the last for slack rows
    peak, mass = normalizer[sequence].unbind(1)
    return (scores - peak).exp2_().div_(mass)
