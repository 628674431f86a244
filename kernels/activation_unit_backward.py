"""activation_unit backward: a kernel for the gradients of the tokens, one for those of the weights.

Both compute the scores again. Given the log-sum-exp of a sequence its tokens are independent, so nothing
passes from tile to tile but sums. Weight gradients are summed per program, then over programs in order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .activation_unit import histories
from .activation_unit_keys import keys_backward, keys_kernel, zero_gradients
from .activation_unit_packed_backward import packed_backward
from .activation_unit_weights import weights_kernel
from .activation_unit_wide_backward import wide_backward
from .arguments import PARAMS, Spec, Upstream, get, widest, width
from .attend_backward import attend_backward, load_sequence
from .backward import Call, WeightSums, program_sums
from .dropout import noise_of
from .fragments import Fragments, add_fragments, fragment_count, load_fragments
from .histories import load_tile, part_at, position_of, share_of, store_tile
from .mlp import hidden_zero, load_network, run_layers, score
from .mlp_backward import first_dz, load_back, run_layers_backward, with_fresh_network
from .normal_form import NormalForm, backward_weights, gradients, normal_form, param_gradients
from .primitives import load_vector, slab_count
from .schedule import find_sequence, merge, slot_of
from .sums import column_sum, in_dtype, outer_sum, store_column, zero_matrix


@triton.jit(do_not_specialize=["batch"])
def tokens_kernel(
    data,
    batch,
    net,
    product,
    upstream,
    grad_key,
    grad_value,
    grad_first,
    part,
    grad_key_weight,
    grad_product_weight,
    SPEC: tl.constexpr,
):
    """dL/dk and dL/dv per token; dL/dq but for its way through c, and dL/dc, per sequence, side by side in
    `grad_first [B, D + H1]`; the gradients of the first layer's key and product per program."""
    D: tl.constexpr = get(SPEC, "dim")
    DV: tl.constexpr = get(SPEC, "value_dim")
    SLAB: tl.constexpr = get(SPEC, "dim_slab")
    BLOCK: tl.constexpr = get(SPEC, "block")
    WARPS: tl.constexpr = get(SPEC, "warps")
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = net.key.dtype.element_ty
    H1: tl.constexpr = width(0, SPEC)
    H1_SLAB: tl.constexpr = widest(0, SPEC)
    program = tl.program_id(0)
    begin, end = share_of(program, data, batch, SPEC)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, batch, begin)
    layers, _params, _last = load_network(net, SPEC)
    back = load_back(upstream.back, 0, SPEC)
    token = tl.arange(0, BLOCK)
    own = program.to(tl.int64) * fragment_count(D, SLAB, H1, H1_SLAB)
    while begin < end:
        sequence, first_row, last_row, stop = part_at(data, batch, sequence, begin, end)
        owner = sequence.to(tl.int64)
        _q, first, grads = load_sequence(data, net, upstream, owner, get(SPEC, "shared"), SPEC)
        moment = zero_matrix(D, SLAB, H1, H1_SLAB)  # Σ_t k_t dL/dz1_tᵀ, the gradient of W_effᵀ
        grad_c = zero_matrix(H1, H1_SLAB, 8, 8, 16, 8)
        position = position_of(data, owner, first_row, begin, SPEC)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            rest = (stop - start).to(tl.int32)
            valid = token < rest
            k, v = load_tile(data, position, valid, SPEC)
            again = with_fresh_network(net, owner, first, layers, rest, SPEC)
            noise = noise_of(net, start + token, SPEC)
            zs, hs, outputs = run_layers(k, again[0], again[1], again[3], noise, DTYPE, SPEC)
            s = score(hs[len(hs) - 1], again[2])  # [BLOCK]
            a, ds = attend_backward(s, v, grads, upstream.grad_scores + position, rest, SPEC)
            _dhs, dzs = run_layers_backward(ds, zs, hs, outputs, back, again[3], noise, SPEC)
            dz = in_dtype(first_dz(dzs, again[2], SPEC), DTYPE)
            if not get(SPEC, "shared"):
                dk, dv = zero_gradients(SPEC)
                dk, dv = keys_backward(a, dz, first, grads, dk, dv, SPEC)
                store_tile(grad_key, dk, data, position, valid, D, SPEC)
                if get(SPEC, "separate_values"):
                    store_tile(grad_value, dv, data, position, valid, DV, SPEC)
            moment = outer_sum(k, dz, moment, PRECISION)
            grad_c = column_sum(dz, grad_c, DTYPE, PRECISION)
            position += BLOCK
        slot = slot_of(program, begin, stop, first_row, last_row)
        target = grad_first + owner * (D + H1)
        if slot >= 0:
            target = part + slot * (D + H1)
        # Loaded again, so that it takes no registers in the loop.
        query = data.query + owner * get(SPEC, "query_stride") + hidden_zero(stop - begin)
        q = load_vector(query, D, SLAB)
        by_query = ()
        grad_q = ()
        COUNT: tl.constexpr = slab_count(H1, H1_SLAB)
        for i in tl.static_range(len(q)):
            octets = tl.zeros([q[i].shape[0], 8], tl.float32)
            for j in tl.static_range(COUNT):
                weight = load_fragments(product, i, j, D, SLAB, H1, H1_SLAB, WARPS)
                terms = weight.to(tl.float32) * moment[i * COUNT + j]
                octets += tl.sum(tl.reshape(terms, [terms.shape[0], terms.shape[1] // 8, 8]), 1)
                by_query = by_query + (moment[i * COUNT + j] * q[i].to(tl.float32)[:, None],)
            grad_q = grad_q + (tl.broadcast_to(tl.sum(octets, 1)[:, None], [q[i].shape[0], 8]),)
        store_column(target, grad_q, D, SLAB)
        store_column(target + D, grad_c, H1, H1_SLAB)
        add_fragments(grad_key_weight + own, moment, D, SLAB, H1, H1_SLAB, WARPS)
        add_fragments(grad_product_weight + own, by_query, D, SLAB, H1, H1_SLAB, WARPS)
        begin = stop
        sequence += 1


def _shared_keys(call: Call, spec: Spec, launch: settings.Launch) -> None:
    """The gradients of keys and values that several queries share."""
    least = max(launch.least_rows // launch.block, 1)
    tiles = call.unit.candidates.tiles(launch.block, call.unit.positions)
    programs, zeros = call.programs(launch), call.upstream.peak_mass.new_zeros
    grads = [call.grad_key] if call.grad_value is None else [call.grad_key, call.grad_value]
    parts = [zeros(2 * programs, launch.block * grad.shape[1]) for grad in grads]
    keys_kernel[(programs,)](
        call.data,
        tiles,
        tiles.begin.numel(),
        call.net.network,
        call.upstream,
        grads[0],
        grads[-1],
        parts[0],
        parts[-1],
        SPEC=replace(spec, least_rows=least),
        num_warps=launch.num_warps,
    )
    for part, grad in zip(parts, grads, strict=True):
        merge(
            part,
            None,
            tiles.offsets,
            grad,
            call.upstream.peak_mass,
            programs,
            least,
            (tiles.begin, tiles.end),
        )


def _streamed(call: Call) -> WeightSums:
    """Where each sequence has tiles of its own."""
    batch, peak_mass = call.unit.query.shape[0], call.upstream.peak_mass
    split = call.net.precision == "ieee" and settings.can_split(
        call.data.key.shape[1], call.net.hidden, peak_mass.device
    )
    row = "split" if split else call.net.precision
    gate = "gate " if row == "half" and PARAMS.get(call.net.form.kernel, 0) > 1 else ""
    device = peak_mass.device
    tokens = call.tuned("tokens", row, settings.choose(settings.BACKWARD_TOKENS, row, device))
    weights = call.tuned(
        "weights", gate + row, settings.choose(settings.BACKWARD_WEIGHTS, gate + row, device)
    )
    first, later = call.programs(tokens), call.programs(weights)
    spec = call.spec(tokens, settings.SPLIT_TOKENS if split else None)
    part = peak_mass.new_empty(2 * first, call.grad_first.shape[1])
    order = Fragments(spec.dim, spec.hidden[0], spec.dim_slab, widest(0, spec), spec.warps)
    sums = program_sums(call, first, later, later, order)
    tokens_kernel[(first,)](
        call.data,
        batch,
        call.net.network,
        order.flat(call.net.network.product.t()),
        call.upstream,
        call.grad_key,
        call.grad_key if call.grad_value is None else call.grad_value,
        call.grad_first,
        part,
        sums["key"],
        sums["product"],
        SPEC=spec,
        num_warps=tokens.num_warps,
    )
    merge(part, None, call.data.offsets, call.grad_first, peak_mass, first, tokens.least_rows)
    if spec.shared:
        _shared_keys(call, spec, tokens)
    spec = call.spec(weights, settings.SPLIT_WEIGHTS if split else None)
    # Sums for several vectors per unit take registers that a launch of their own has.
    for part_of_sums in ("weights", "params") if spec.params_each > 1 else ("all",):
        spec = replace(spec, sums=part_of_sums)
        if spec.param_layers or spec.weight_layers or spec.last_layer:
            weights_kernel[(later,)](
                call.data,
                batch,
                call.net.network,
                call.upstream,
                sums["weights"],
                sums["biases"],
                sums["params"],
                sums["last_weight"],
                sums["last_bias"],
                SPEC=spec,
                num_warps=weights.num_warps,
            )
    return WeightSums.of_programs(**sums, order=order)


def backward(
    unit: Any, grad_out: Tensor, grad_scores: Tensor | None, delta: Tensor | None, peak_mass: Tensor
) -> tuple[Any, ...]:
    """As `recattn.composite.activation_unit.backward`."""
    net = normal_form(unit)
    upstream = Upstream(
        grad_out.contiguous(),
        peak_mass if grad_scores is None else grad_scores.contiguous(),
        peak_mass if delta is None else delta,
        peak_mass,
        backward_weights(unit, net),
    )
    return run_backward(unit, net, upstream, with_scores=grad_scores is not None)


def run_backward(
    unit: Any, net: NormalForm, upstream: Upstream, with_scores: bool = False, statistics: bool = False
) -> tuple[Any, ...]:
    """The gradients of a network in normal form."""
    data, peak_mass = histories(unit), upstream.peak_mass
    dim, value_dim = data.key.shape[1], data.value.shape[1]
    count = data.key.shape[0] if unit.unique_rows else unit.positions
    call = Call(
        unit,
        data,
        net,
        upstream,
        data.key.new_zeros(count, dim),
        None if unit.values is unit.keys else data.value.new_zeros(count, value_dim),
        peak_mass.new_zeros(unit.query.shape[0], dim + net.hidden[0]),
        with_scores,
        statistics,
    )
    if unit.query.shape[0] == 0 or unit.positions == 0:
        sums = WeightSums.of_programs(**program_sums(call, 1, 1, 1))
    elif settings.is_wide(max(dim, value_dim), net.hidden):
        sums = wide_backward(call)
    elif not statistics and settings.packs_backward(net.precision, max(dim, value_dim), unit):
        sums = packed_backward(call)
    else:
        sums = _streamed(call)
    if sums.weights:  # their sums are of e, see mlp_backward
        sums.weights[-1] = sums.weights[-1] * net.network.last_weight[:, None]
        sums.biases[-1] = sums.biases[-1] * net.network.last_weight
    if not statistics:
        for index in range(len(sums.params) - PARAMS.get(net.form.kernel, 0), len(sums.params)):
            sums.params[index] = sums.params[index] * net.network.last_weight
    grads = gradients(
        net,
        sums.key,
        sums.product,
        call.grad_first[:, dim:],
        sums.weights,
        sums.biases,
        sums.last_weight,
        sums.last_bias,
    )
    grad_params = param_gradients(unit, net, sums.params)
    return call.grad_first[:, :dim], call.grad_key, call.grad_value, *grads, grad_params
