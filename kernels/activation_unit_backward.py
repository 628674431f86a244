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
from .activation_unit import histories, specialize
from .activation_unit_keys import keys_backward, keys_kernel, zero_gradients
from .activation_unit_weights import weights_kernel
from .activation_unit_wide_backward import wide_backward
from .arguments import Histories, Network, Spec, Upstream, get, widest, width
from .attend_backward import attend_backward, load_sequence
from .histories import load_tile, part_at, position_of, share_of, store_tile
from .mlp import load_network, run_layers, score
from .mlp_backward import first_dz, load_back, run_layers_backward, with_fresh_vectors
from .normal_form import NormalForm, WeightSums, backward_weights, gradients, normal_form
from .primitives import columns, load_matrix, slab_count
from .schedule import find_sequence, merge, slot_of
from .sums import add_matrix, column_sum, in_dtype, outer_sum, store_column, zero_matrix
from .wide_backward import FROM_UNITS


@triton.jit
def tokens_kernel(
    data,
    net,
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
    PRECISION: tl.constexpr = get(SPEC, "precision")
    DTYPE: tl.constexpr = net.key.dtype.element_ty
    H1: tl.constexpr = width(0, SPEC)
    H1_SLAB: tl.constexpr = widest(0, SPEC)
    program = tl.program_id(0)
    begin, end = share_of(program, data, SPEC)
    if begin >= end:
        return
    sequence = find_sequence(data.offsets, data.batch, begin)
    layers, slopes, last = load_network(net, SPEC)
    back = load_back(upstream.back, 0, SPEC)
    token = tl.arange(0, BLOCK)
    own = program.to(tl.int64) * (H1 * D)
    fresh = 1
    while begin < end:
        sequence, first_row, last_row, stop = part_at(data, sequence, begin, end)
        owner = sequence.to(tl.int64)
        q, first, grads = load_sequence(data, net, upstream, owner, SPEC)
        moment = zero_matrix(D, SLAB, H1, H1_SLAB)  # Σ_t k_t dL/dz1_tᵀ, the gradient of W_effᵀ
        grad_c = zero_matrix(H1, H1_SLAB, 8, 8, 16, 8)
        position = position_of(data, owner, first_row, begin, SPEC)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            rest = (stop - start).to(tl.int32)
            valid = token < rest
            k, v = load_tile(data, position, valid, SPEC)
            again = with_fresh_vectors(net, owner, first, layers, last, rest, SPEC)
            zs, hs, outputs = run_layers(k, again[0], again[1], slopes, DTYPE, SPEC)
            s = score(hs[len(hs) - 1], again[2])  # [BLOCK]
            a, ds = attend_backward(s, v, grads, upstream.grad_scores + position, rest, SPEC)
            _dhs, dzs = run_layers_backward(ds, zs, hs, outputs, back, slopes, SPEC)
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
        product = load_matrix(upstream.product, D, SLAB, 16, H1, H1_SLAB)
        by_query = ()
        COUNT: tl.constexpr = slab_count(H1, H1_SLAB)
        for i in tl.static_range(len(q)):
            grad_q = tl.zeros([q[i].shape[0]], tl.float32)
            for j in tl.static_range(COUNT):
                grad_q += tl.sum(product[i * COUNT + j].to(tl.float32) * moment[i * COUNT + j], 1)
                by_query = by_query + (moment[i * COUNT + j] * q[i].to(tl.float32)[:, None],)
            column = columns(i, D, SLAB)
            tl.store(target + column, grad_q, mask=column < D)
        store_column(target + D, grad_c, H1, H1_SLAB)
        add_matrix(grad_key_weight + own, moment, fresh, D, SLAB, H1, H1_SLAB)
        add_matrix(grad_product_weight + own, by_query, fresh, D, SLAB, H1, H1_SLAB)
        fresh = 0
        begin = stop
        sequence += 1


def _spec(
    unit: Any, data: Histories, net: NormalForm, launch: settings.Launch, with_scores: bool, split: str | None
) -> Spec:
    spec = specialize(unit, data, net, launch, with_scores)
    widest_last, narrowest_last = spec.last_slab
    # A product that reads the gradient of the last layer needs 16 columns of it.
    if len(spec.hidden) > 2 or spec.activation == "leaky_relu":
        narrowest_last = max(narrowest_last, 16)
    return replace(
        spec,
        warps=launch.num_warps,
        last_slab=(widest_last, narrowest_last),
        precision=split or spec.precision,
    )


def _shared_keys(
    unit: Any,
    data: Histories,
    network: Network,
    upstream: Upstream,
    grad_key: Tensor,
    grad_value: Tensor | None,
    spec: Spec,
    launch: settings.Launch,
) -> None:
    """The gradients of keys and values that several queries share, into `grad_key` and `grad_value`."""
    least = max(launch.least_rows // launch.block, 1)
    tiles = unit.candidates.tiles(launch.block, unit.positions)
    programs = settings.programs(launch, unit.most_rows, data.key.device)
    grads = [grad_key] if grad_value is None else [grad_key, grad_value]
    parts = [upstream.lse.new_empty(2 * programs, launch.block * grad.shape[1]) for grad in grads]
    keys_kernel[(programs,)](
        data,
        network,
        upstream,
        tiles,
        grads[0],
        grads[-1],
        parts[0],
        parts[-1],
        SPEC=replace(spec, least_rows=least),
        num_warps=launch.num_warps,
    )
    for part, grad in zip(parts, grads, strict=True):
        merge(part, None, tiles.offsets, grad, upstream.lse, programs, least, (tiles.begin, tiles.end))


def _backward(
    unit: Any,
    data: Histories,
    net: NormalForm,
    upstream: Upstream,
    grad_key: Tensor,
    grad_value: Tensor | None,
    grad_first: Tensor,
    with_scores: bool,
) -> WeightSums:
    """Where programs can keep all weights. Writes the gradients of keys, values, and of queries and c."""
    dim, lse = unit.keys.shape[1], upstream.lse
    zeros = lse.new_zeros  # float32
    split = net.precision == "ieee" and settings.can_split(dim, net.hidden, data.key.device)
    row = "split" if split else net.precision
    tokens, weights = settings.BACKWARD_TOKENS[row], settings.BACKWARD_WEIGHTS[row]
    token_programs = settings.programs(tokens, unit.most_rows, data.key.device)
    weight_programs = settings.programs(weights, unit.most_rows, data.key.device)

    by_program = {
        "key": zeros(token_programs, *net.network.key.t().shape),
        "product": zeros(token_programs, *net.network.product.t().shape),
    }
    grad_weights = tuple(zeros(weight_programs, *w.t().shape) for w in net.network.weights)
    grad_biases = tuple(zeros(weight_programs, *b.shape) for b in net.network.biases)
    grad_slopes = tuple(zeros(weight_programs, *s.shape) for s in net.network.slopes)
    grad_last_weight = zeros(weight_programs, net.hidden[-1])
    grad_last_bias = zeros(weight_programs, 1)
    if data.batch and unit.positions:
        spec = _spec(unit, data, net, tokens, with_scores, settings.SPLIT_TOKENS if split else None)
        part = grad_first.new_empty(2 * token_programs, grad_first.shape[1])
        tokens_kernel[(token_programs,)](
            data,
            net.network,
            upstream,
            grad_key,
            grad_key if grad_value is None else grad_value,
            grad_first,
            part,
            by_program["key"],
            by_program["product"],
            SPEC=spec,
            num_warps=tokens.num_warps,
        )
        merge(part, None, data.offsets, grad_first, lse, token_programs, tokens.least_rows)
        if spec.shared:
            _shared_keys(unit, data, net.network, upstream, grad_key, grad_value, spec, tokens)
        weights_kernel[(weight_programs,)](
            data,
            net.network,
            upstream,
            grad_weights,
            grad_biases,
            grad_slopes,
            grad_last_weight,
            grad_last_bias,
            SPEC=_spec(unit, data, net, weights, with_scores, settings.SPLIT_WEIGHTS if split else None),
            num_warps=weights.num_warps,
        )
    return WeightSums(
        by_program["key"].sum(0).t(),
        by_program["product"].sum(0).t(),
        [w.sum(0).t() for w in grad_weights],
        [b.sum(0) for b in grad_biases],
        [g.sum(0) for g in grad_slopes],
        grad_last_weight.sum(0),
        grad_last_bias.sum(0),
    )


def _wide_backward(
    unit: Any,
    data: Histories,
    net: NormalForm,
    upstream: Upstream,
    grad_key: Tensor,
    grad_value: Tensor | None,
    grad_first: Tensor,
    with_scores: bool,
) -> WeightSums:
    """Where they cannot, see activation_unit_wide_backward."""
    dim, device = unit.keys.shape[1], unit.keys.device
    both = net.form.kernel not in FROM_UNITS  # units, and what went into their activation
    launch = settings.wide(settings.WIDE_BACKWARD, net.precision, dim, net.hidden, device, both)
    spec = specialize(unit, data, net, launch, with_scores)
    return wide_backward(data, net, upstream, grad_key, grad_value, grad_first, unit.positions, spec, launch)


def backward(
    unit: Any, grad_out: Tensor, grad_scores: Tensor | None, delta: Tensor | None, lse: Tensor
) -> tuple[Any, ...]:
    """As `recattn.composite.activation_unit.backward`."""
    net = normal_form(unit)
    data = histories(unit)
    dim, value_dim = data.key.shape[1], data.value.shape[1]
    zeros = net.network.first_bias.new_zeros  # float32
    count = data.key.shape[0] if unit.unique_rows else unit.positions
    grad_key = data.key.new_zeros(count, dim)
    separate = unit.values is not unit.keys
    grad_value = data.value.new_zeros(count, value_dim) if separate else None
    grad_first = zeros(data.batch, dim + net.hidden[0])
    upstream = Upstream(
        grad_out.contiguous(),
        lse if grad_scores is None else grad_scores.contiguous(),
        lse if delta is None else delta,
        lse,
        backward_weights(unit, net),
        net.network.product.t().contiguous(),
    )
    call = (unit, data, net, upstream, grad_key, grad_value, grad_first, grad_scores is not None)
    wide = settings.is_wide(max(dim, value_dim), net.hidden)
    sums = _wide_backward(*call) if wide else _backward(*call)
    if sums.weights:  # their sums are of e, see mlp_backward
        sums.weights[-1] = sums.weights[-1] * net.network.last_weight[:, None]
        sums.biases[-1] = sums.biases[-1] * net.network.last_weight
    if sums.slopes:
        sums.slopes[-1] = sums.slopes[-1] * net.network.last_weight
    grads = gradients(
        net,
        sums.key,
        sums.product,
        grad_first[:, dim:],
        sums.weights,
        sums.biases,
        sums.last_weight,
        sums.last_bias,
    )
    slopes = [
        g.sum_to_size(s.shape)
        for g, s in zip(sums.slopes, unit.slopes, strict=False)
        if isinstance(s, Tensor)
    ]
    return grad_first[:, :dim], grad_key, grad_value, *grads, slopes
