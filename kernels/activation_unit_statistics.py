"""activation_unit_statistics: a pass over the histories that sums up the last hidden layer, before its activation.

Each program sums distances from a vector of its own, the mean over its first tile, so that no digits are lost where a
mean is large. Backward is that of activation_unit for a score that sums up a quadratic function of each unit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activation_unit, settings
from .activation_unit_backward import run_backward
from .activation_unit_statistics_wide import moments_of_tiles
from .arguments import Upstream, depth, get, narrowest, widest, width
from .dropout import noise_of
from .histories import load_tile, part_at, position_of, share_of
from .mlp import hidden_zero
from .mlp_backward import with_fresh_vectors
from .normal_form import backward_weights, normal_form
from .primitives import columns, load_vector, slab_count
from .schedule import find_sequence
from .streamed import first_layer, last_sums, load_layers
from .sums import add_octets, store_octets, zero_octets


@triton.jit
def tile_mean(slabs, valid):
    """Over the valid tokens of a tile, per slab `[units]`."""
    count = tl.sum(valid.to(tl.float32))
    out = ()
    for j in tl.static_range(len(slabs)):
        out = out + (tl.sum(tl.where(valid[:, None], slabs[j], 0.0), 0) / count,)
    return out


@triton.jit
def distances(slabs, centre, valid):
    """Of the valid tokens, and their squares."""
    distance = ()
    square = ()
    for j in tl.static_range(len(slabs)):
        d = tl.where(valid[:, None], slabs[j] - centre[j][None, :], 0.0)
        distance = distance + (d,)
        square = square + (d * d,)
    return distance, square


@triton.jit(do_not_specialize=["batch"])
def _statistics_kernel(data, batch, net, counts, centres, totals, squares, SPEC: tl.constexpr):
    """Per program the number of its rows, its centre, and the sums of distances and of their squares."""
    BLOCK: tl.constexpr = get(SPEC, "block")
    LAST: tl.constexpr = depth(SPEC) - 1
    UNITS: tl.constexpr = width(LAST, SPEC)
    WIDEST: tl.constexpr = widest(LAST, SPEC)
    NARROWEST: tl.constexpr = narrowest(LAST, SPEC)
    program = tl.program_id(0)
    begin, end = share_of(program, data, batch, SPEC)
    if begin >= end:
        return
    tl.store(counts + program, (end - begin).to(tl.int64))
    sequence = find_sequence(data.offsets, batch, begin)
    layers, _params, last = load_layers(net, SPEC)
    token = tl.arange(0, BLOCK)
    centre = ()
    for j in tl.static_range(slab_count(UNITS, WIDEST, NARROWEST)):
        centre = centre + (tl.zeros([columns(j, UNITS, WIDEST, NARROWEST).shape[0]], tl.float32),)
    total = zero_octets(get(SPEC, "warps"), UNITS, WIDEST, NARROWEST)
    square = zero_octets(get(SPEC, "warps"), UNITS, WIDEST, NARROWEST)
    fresh = 1
    while begin < end:
        sequence, first_row, _last_row, stop = part_at(data, batch, sequence, begin, end)
        owner = sequence.to(tl.int64)
        query = data.query + owner * get(SPEC, "query_stride") + hidden_zero(stop - begin)
        q = load_vector(query, get(SPEC, "dim"), get(SPEC, "dim_slab"))
        first = first_layer(net, q, owner, SPEC)
        position = position_of(data, sequence, first_row, begin, SPEC)
        for start in tl.range(begin, stop, BLOCK, num_stages=get(SPEC, "stages")):
            valid = token < (stop - start)
            k, _v = load_tile(data, position, valid, SPEC)
            # Read in every tile: kept, they would fill the registers.
            again = with_fresh_vectors(net, owner, first, layers, last, stop - start, SPEC)
            z = last_sums(k, again[0], again[1], again[3], noise_of(net, start + token, SPEC), SPEC)
            if fresh == 1:
                centre = tile_mean(z, valid)
                fresh = 0
            d, d_squared = distances(z, centre, valid)
            total = add_octets(d, total)
            square = add_octets(d_squared, square)
            position += BLOCK
        begin = stop
        sequence += 1
    own = program.to(tl.int64) * UNITS
    for j in tl.static_range(len(centre)):
        column = columns(j, UNITS, WIDEST, NARROWEST)
        tl.store(centres + own + column, centre[j], mask=column < UNITS)
    store_octets(totals + own, total, UNITS, WIDEST, NARROWEST)
    store_octets(squares + own, square, UNITS, WIDEST, NARROWEST)


def uncovered(unit: Any) -> str | None:
    """Why no kernel here takes this call, or None if one does."""
    return activation_unit.uncovered(_summed(unit))


def kernel_of(unit: Any) -> settings.Kernel:
    dim, hidden = unit.keys.shape[1], [unit.first.bias.shape[1], *(b.shape[0] for b in unit.biases)]
    if settings.is_wide(dim, hidden):
        return settings.Kernel("wide", f"a width of {max(dim, *hidden)}, above {settings.WIDEST}")
    return settings.Kernel("classic", f"widths up to {settings.WIDEST}")


def forward(unit: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `recattn.composite.activation_unit_statistics.forward`."""
    wide = kernel_of(unit).name == "wide"
    unit = _summed(unit)
    if wide:
        return _wide_forward(unit)
    data, batch = activation_unit.histories(unit), unit.query.shape[0]
    hidden = activation_unit.hidden_widths(unit)
    launch, split = settings.forward(
        settings.precision(unit.keys.dtype), unit.keys.shape[1], hidden, unit.keys.device
    )
    # A thread adds up rows that lie 8 apart, of 16 that a warp has.
    launch = launch._replace(block=max(launch.block, 16 * launch.num_warps))
    if settings.architecture(unit.keys.device) == settings.CDNA:
        launch = launch._replace(num_stages=1)  # registers do not hold the next tile's keys beside the sums
    net = normal_form(unit, bounded_half=True, split=split)
    programs = settings.programs(launch, unit.most_rows, data.key.device)
    zeros = unit.first.bias.new_zeros
    counts = zeros(programs, dtype=torch.int64)
    centres, totals, squares = (zeros(programs, hidden[-1]) for _ in range(3))
    if batch and unit.positions:
        spec = activation_unit.specialize(unit, data, net, launch, False)
        spec = replace(spec, statistics=True)
        if split:
            spec = replace(spec, precision="tf32", split=True)
        _statistics_kernel[(programs,)](
            data, batch, net.network, counts, centres, totals, squares, SPEC=spec, num_warps=launch.num_warps
        )
    inner = net.form.inner
    return counts, centres / inner, totals / inner, squares / inner**2


def _wide_forward(unit: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    precision, dim, device = settings.precision(unit.keys.dtype), unit.keys.shape[1], unit.keys.device
    hidden = activation_unit.hidden_widths(unit)
    launch = settings.wide(settings.WIDE_SCORES, precision, dim, hidden, device)
    net, data = normal_form(unit, bounded_half=True), activation_unit.histories(unit)
    spec = activation_unit.specialize(unit, data, net, launch, False)
    spec = replace(spec, statistics=True, precision=settings.wide_products(precision))
    counts, centres, squares = moments_of_tiles(data, net, spec, launch, unit.positions)
    inner = net.form.inner
    return counts, centres / inner, torch.zeros_like(centres), squares / inner**2


def backward(unit: Any, linear: Tensor, quadratic: Tensor) -> tuple[Any, ...]:
    """As `recattn.composite.activation_unit_statistics.backward`."""
    unit = _summed(unit)
    net = normal_form(unit)
    inner, gain = net.form.inner, net.form.gain
    # By the kernel's z and h, which are `inner·z` and what `gain` and the last weight make the function itself of.
    factor = 1 / (inner * gain)
    params = (*net.network.params, linear * factor, quadratic * (factor / inner))
    net = net._replace(network=net.network._replace(params=params))
    nothing = linear.new_zeros(1)
    upstream = Upstream(
        nothing,
        nothing,
        nothing,
        nothing,
        backward_weights(unit, net),
    )
    query, keys, _, key, product, bias, weights, biases, grads = run_backward(
        unit, net, upstream, statistics=True
    )
    return query, keys, key, product, bias, weights[:-1], biases[:-1], grads


def _summed(unit: Any) -> Any:
    """The call of activation_unit that scores by the sum of the units of the last hidden layer."""
    width = unit.biases[-1].shape[0] if unit.biases else unit.first.bias.shape[1]
    ones = unit.first.bias.new_ones(1, width)
    return unit._replace(
        weights=[*unit.weights, ones],
        biases=[*unit.biases, ones.new_zeros(1)],
        params=[*unit.params, ()],
    )
