"""activation_unit of few rows on the CPU: few calls, and hidden units that are kept.

With some ten thousand rows or less the calls of `composite.activation_unit` take as long as what they compute, and to
keep all hidden units is cheaper than to compute them again. Blocks are of whole sequences, so that each sequence's sums
are made at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.activations import FROM_OUTPUT, activate, activation_backward_
from recattn.composite.network import Unit
from recattn.composite.segments import Segments

LN_2, LOG2_E = math.log(2), 1 / math.log(2)

# Bytes of the hidden units of all rows up to which they are kept.
KEPT_BYTES = 8 << 20
# Bytes of the hidden units of a block, where there is more than one.
BLOCK_BYTES = 5 << 19


def covers(unit: Unit) -> bool:
    """Whether a call is of few rows. Decided by shapes alone."""
    usual = unit.keys.is_cpu and unit.candidates is None and unit.dropout is None
    return usual and fits(unit.positions, unit.widths, unit.dtype)


def fits(positions: int, widths: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether as many positions' hidden units, of layers of these widths, may be kept."""
    return positions * sum(widths) * dtype.itemsize <= KEPT_BYTES


class Block(NamedTuple):
    """The rows of some sequences, and what is read of them."""

    rows: slice
    sequence: Tensor  # [n], of each row
    nth: Tensor  # [n], which of the block's sequences that is
    keys: Tensor  # [n, D]
    values: Tensor  # [n, Dv]
    segments: Segments


class Rows:
    """All rows of a call, without slack, in the dtype to compute in."""

    def __init__(self, unit: Unit) -> None:
        self.offsets = unit.offsets.to(torch.int64)
        self.lengths = self.offsets[1:] - self.offsets[:-1]
        self.sequence = torch.repeat_interleave(self.lengths)
        self.total = self.sequence.numel()
        self.places = torch.arange(self.total)
        self.keys = self._read(unit.keys, unit)
        self.values = self.keys if unit.values is unit.keys else self._read(unit.values, unit)
        self.row_bytes = sum(unit.widths) * unit.dtype.itemsize

    def _read(self, x: Tensor, unit: Unit) -> Tensor:
        x = x[: self.total] if unit.rows is None else x.index_select(0, unit.rows[: self.total])
        return x.to(unit.dtype)

    def blocks(self) -> Iterator[Block]:
        """All rows of all sequences, in turn; none if there are no rows."""
        batch, size = self.offsets.numel() - 1, BLOCK_BYTES // self.row_bytes
        if self.total <= size:
            if self.total:
                rows, sequence = slice(0, self.total), self.sequence
                yield Block(rows, sequence, sequence, self.keys, self.values, self.segments)
            return
        bounds = self.offsets.tolist()
        size = -(-self.total // -(-self.total // size))
        first = 0
        while first < batch:
            begin = bounds[first]
            least = bounds[bisect_right(bounds, begin)]  # the end of the first sequence that has rows
            last = bisect_right(bounds, max(begin + size, least)) - 1
            rows = slice(begin, bounds[last])
            keys, sequence = self.keys[rows], self.sequence[rows]
            values = keys if self.values is self.keys else self.values[rows]
            offsets = self.offsets[first : last + 1] - begin
            segments = Segments.of(offsets, rows.stop - begin, self.lengths[first:last])
            yield Block(rows, sequence, sequence - first, keys, values, segments)
            first = last

    @cached_property
    def segments(self) -> Segments:
        return Segments.of(self.offsets, self.total, self.lengths)


def forward(unit: Unit, keep: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What `composite.activation_unit.forward` returns, and what `backward` takes, if it is to be kept: of each hidden
    layer what the derivative of its activation is a function of, and the attention, of all positions."""
    rows, query = Rows(unit), unit.query.to(unit.dtype)
    scores = query.new_empty(unit.positions)
    kept = [query.new_empty(unit.positions, width) for width in unit.widths] if keep else []
    if rows.total < unit.positions:
        for x in (scores, *kept):
            x[rows.total :].zero_()
    weights, biases = _scaled(unit)
    for block in rows.blocks():
        units = _first(unit, query, block, kept[0][block.rows] if keep else None)
        for layer, (params, weight, bias) in enumerate(zip(unit.params, weights, biases, strict=True), 1):
            units = activate(units, unit.activation, params)
            if layer < len(weights):
                z = kept[layer][block.rows] if keep else units.new_empty(units.shape[0], weight.shape[0])
                units = torch.mm(units, weight.t(), out=z).add_(bias)
        torch.addmv(biases[-1], units, weights[-1][0], out=scores[block.rows])
    attention = scores[: rows.total]
    match unit.normalize:
        case "softmax":
            peak_mass = _softmax_(attention, rows)
        case "exp" | "sigmoid":
            getattr(attention, unit.normalize + "_")()
    if unit.normalize != "softmax":
        peak_mass = query.new_ones(query.shape[0], 2)
    out = rows.segments.sum(rows.values, attention, rows.places)
    return out, scores, peak_mass, [*kept, scores] if keep else []


def _scaled(unit: Unit) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The weights and biases behind the first layer; the last ones include the scale of the scores."""
    if unit.scale == 1:
        return unit.weights, unit.biases
    return tuple([*group[:-1], group[-1] * unit.scale] for group in (unit.weights, unit.biases))  # type: ignore[return-value]


def _first(unit: Unit, query: Tensor, block: Block, out: Tensor | None) -> Tensor:
    """`z1 [n, H1]`."""
    z = torch.index_select(unit.first.bias, 0, block.sequence, out=out)
    z.addmm_(block.keys, unit.first.key.t())
    return z.addmm_(query.index_select(0, block.sequence).mul_(block.keys), unit.first.product.t())


def _softmax_(scores: Tensor, rows: Rows) -> Tensor:
    """Softmax over each sequence, in place; returns its maximum in base 2 and its sum, `[B, 2]`, from which the
    backward of `composite.activation_unit` may compute it again."""
    if rows.total == 0:
        return scores.new_ones(rows.offsets.numel() - 1, 2)
    peak = torch.segment_reduce(scores, "max", offsets=rows.offsets, unsafe=True).mul_(LOG2_E)
    scores.sub_((peak * LN_2).index_select(0, rows.sequence)).exp_()
    mass = rows.segments.sum_numbers(scores)
    scores.div_(mass.index_select(0, rows.sequence))
    return torch.stack((peak, mass), 1)


class Sums(NamedTuple):
    """Gradients that are summed over all rows, as far as some have them."""

    weights: list[Tensor]  # but the first layer's
    biases: list[Tensor]
    params: list[Tensor]
    folded: list[Tensor]  # of key and product, `[H1, D]`

    def add_(self, other: Sums) -> Sums:
        for mine, others in zip(self, other, strict=True):
            for total, term in zip(mine, others, strict=True):
                total += term
        return self


def backward(
    unit: Unit, grad_out: Tensor, grad_scores: Tensor | None, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """As that of `composite.activation_unit`, from what forward kept. What softmax subtracts is the sum over the very
    numbers that it is subtracted from: that of out, rounded, may leave more than eager code does."""
    *known, attention = kept
    rows, query, grad_out = Rows(unit), unit.query.to(unit.dtype), grad_out.to(unit.dtype)
    first, (weights, _) = unit.first, _scaled(unit)
    grad_query: list[Tensor] = []
    grad_bias: list[Tensor] = []
    grad_keys = query.new_empty(unit.positions, query.shape[1])
    separate = rows.values is not rows.keys
    grad_values = query.new_empty(unit.positions, rows.values.shape[1]) if separate else None
    total: Sums | None = None
    for block in rows.blocks():
        weight = attention[block.rows]
        upstream = grad_out.index_select(0, block.sequence)
        grad = torch.mul(block.values, upstream).sum(1)  # dL/da
        if grad_scores is not None:
            grad += grad_scores[block.rows]
        match unit.normalize:
            case "softmax":
                delta = block.segments.sum_numbers(grad * weight)
                grad.sub_(delta.index_select(0, block.nth)).mul_(weight)
            case "exp":
                grad.mul_(weight)
            case "sigmoid":
                torch.ops.aten.sigmoid_backward.grad_input(grad, weight, grad_input=grad)
        grad, sums = _back(unit, weights, grad.unsqueeze(1), [z[block.rows] for z in known])

        queries, places = query.index_select(0, block.sequence), rows.places[: grad.shape[0]]
        sums.folded.extend((torch.mm(grad.t(), block.keys), torch.mm(grad.t(), queries * block.keys)))
        total = sums if total is None else total.add_(sums)
        grad_bias.append(block.segments.sum(grad, rows=places))
        through = torch.mm(grad, first.product)
        of_keys = torch.mm(grad, first.key, out=grad_keys[block.rows]).addcmul_(through, queries)
        if grad_values is None:
            of_keys.addcmul_(upstream, weight.unsqueeze(1))
        else:
            torch.mul(upstream, weight.unsqueeze(1), out=grad_values[block.rows])
        grad_query.append(block.segments.sum(through.mul_(block.keys), rows=places))
    if total is None:
        total, grad_query = _no_rows(unit), [torch.zeros_like(query)]
        grad_bias = [query.new_zeros(query.shape[0], first.key.shape[0])]
    if unit.scale != 1:
        total.weights[-1].mul_(unit.scale)
        total.biases[-1].mul_(unit.scale)
    key, product = total.folded
    return (
        _joined(grad_query),
        _finished(grad_keys, unit, rows, unit.keys),
        None if grad_values is None else _finished(grad_values, unit, rows, unit.values),
        key,
        product,
        _joined(grad_bias),
        total.weights,
        total.biases,
        total.params,
    )


def _back(
    unit: Unit, weights: Sequence[Tensor], grad: Tensor, known: Sequence[Tensor]
) -> tuple[Tensor, Sums]:
    """dL/dz of the first layer, `[n, H1]`, from that of the last, `[n, 1]`; and the gradients of those behind it."""
    sums = Sums([], [], [], [])
    for z, params, weight in zip(reversed(known), reversed(unit.params), reversed(weights), strict=True):
        units = z if unit.activation in FROM_OUTPUT else activate(z, unit.activation, params)
        sums.weights.insert(0, torch.mm(grad.t(), units))
        sums.biases.insert(0, grad.sum(0))
        grad = grad * weight if weight.shape[0] == 1 else torch.mm(grad, weight)
        sums.params[:0] = activation_backward_(grad, z, unit.activation, params)
    return grad, sums


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _no_rows(unit: Unit) -> Sums:
    params = [p for params in unit.params for p in params if isinstance(p, Tensor)]
    groups = (unit.weights, unit.biases, params, (unit.first.key, unit.first.product))
    return Sums(*([torch.zeros_like(x) for x in group] for group in groups))


def _finished(gradient: Tensor, unit: Unit, rows: Rows, of: Tensor) -> Tensor:
    """The gradient `[T, C]` of what lies at the positions: of rows that are all different, or else as it is."""
    if unit.unique_rows:
        assert unit.rows is not None
        index = unit.rows[: rows.total].to(torch.int64)
        return torch.zeros_like(of).index_copy_(0, index, gradient[: rows.total].to(of.dtype))
    gradient[rows.total :].zero_()
    return gradient.to(of.dtype)
