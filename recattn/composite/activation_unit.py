"""activation_unit in PyTorch: only valid positions, the folded first layer, blocks that stay in cache.

Passes over the history in blocks of rows. A block runs the layers of the MLP one after the other, so what is
alive at any time is a block's hidden units, never `[T, H]`. Backward recomputes them block by block.
On an accelerator nothing is copied to the host.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor

from recattn.composite.blocks import Block
from recattn.composite.items import zero_slack_
from recattn.composite.network import BLOCK_BYTES, Gradients, Network, Unit, items_of, slack_of

LN_2, LOG2_E = math.log(2), 1 / math.log(2)

__all__ = ["BLOCK_BYTES", "Unit", "backward", "forward"]


def forward(unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, Dv]`, the attention `a [T]` and the log-sum-exp `[B]` of the scores, in `unit.dtype`."""
    items = items_of(unit)
    batch, total = unit.query.shape[0], items.histories.sequence.numel()
    if unit.candidates is None:
        total = unit.positions
    scores = unit.keys.new_zeros(total, dtype=unit.dtype)
    out = unit.values.new_zeros(batch, unit.values.shape[1], dtype=unit.dtype)
    peak_mass = scores.new_ones(batch, 2)
    network = Network(unit, total)
    for span in items.histories.spans():
        for block in span.pieces(network.size):
            hidden = network.hidden(block, items(unit.keys, block))
            network.scores(hidden[-1].units, out=scores[block.rows])
        attention = scores[span.rows]
        match unit.normalize:
            case "softmax":
                _softmax_(attention, peak_mass, span)
            case "exp" | "sigmoid":
                getattr(attention, unit.normalize + "_")()
        out[span.owners] = items.pool(unit.values, span, attention)
    return out, zero_slack_(scores, unit.offsets), peak_mass


def _softmax_(scores: Tensor, peak_mass: Tensor, span: Block) -> None:
    """Softmax over each sequence of a span, in place; its maximum in base 2 and its sum go into `peak_mass [B, 2]`."""
    peak, mass = peak_mass[span.owners].unbind(1)
    peak.copy_(span.reduce(scores, "max")).mul_(LOG2_E)
    _exponentials_(span.split(scores), peak_mass, span)
    mass.copy_(span.reduce(scores, "sum"))
    span.split(scores).mul_(span.take(peak_mass[:, 1]).reciprocal())


def _exponentials_(scores: Tensor, peak_mass: Tensor, block: Block) -> Tensor:
    """`exp(s - maximum)`, in place."""
    return scores.sub_(block.take(peak_mass[:, 0] * LN_2)).exp_()


def backward(
    unit: Unit, grad_out: Tensor, grad_scores: Tensor | None, delta: Tensor | None, peak_mass: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of query (but for its way through c), keys, values, key, product and bias of the folded
    layer, weights, biases, params; the last three as lists. `delta [B]` is Σ_t a_t dL/da_t, for softmax."""
    separate = unit.values is not unit.keys
    items = items_of(unit)
    network = Network(unit, items.histories.sequence.numel())
    workspace, gradients = network.workspace, Gradients(unit, network)
    grad_keys = items.gradient_of(unit.keys)
    grad_values = items.gradient_of(unit.values) if separate else None
    grad_out = grad_out.to(unit.dtype)
    spans = items.histories.spans()
    for block in chain.from_iterable(span.pieces(network.size) for span in spans):
        rows = block.rows
        keys = items(unit.keys, block)
        values = items(unit.values, block) if separate else keys
        slack = slack_of(unit, block)
        if slack is not None:  # as rows of zeros without a gradient it leaves the sums over all rows alone
            keys = keys.masked_fill(slack, 0)
        hidden = network.hidden(block, keys)
        attention = block.split(network.scores(hidden[-1].units))

        upstream = block.take(grad_out, out=workspace("upstream", *values.shape))
        grad = block.dot(values, upstream, out=workspace("scratch", *values.shape))  # dL/da, [n, length]
        if grad_scores is not None:
            grad += block.split(grad_scores[rows])
        match unit.normalize:
            case "softmax":
                assert delta is not None
                _exponentials_(attention, peak_mass, block).mul_(block.take(peak_mass[:, 1]).reciprocal())
                grad.sub_(block.take(delta)).mul_(attention)
            case "exp":
                grad.mul_(attention.exp_())
            case "sigmoid":
                attention.sigmoid_()
                torch.ops.aten.sigmoid_backward.grad_input(grad, attention, grad_input=grad)
        grad = grad.view(-1, 1)
        if slack is not None:
            grad.masked_fill_(slack, 0)
        grad = gradients.back(grad, hidden)
        grad_rows = items.rows_of(grad_keys, block)
        gradients.first.add(block, keys, grad, grad_rows)
        if grad_values is None:
            block.split(grad_rows).addcmul_(upstream, attention.unsqueeze(2))
        else:
            value_rows = items.rows_of(grad_values, block)
            torch.mul(upstream, attention.unsqueeze(2), out=block.split(value_rows))
            items.put(grad_values, block, value_rows)
        items.put(grad_keys, block, grad_rows)
    for gradient in (gradients.weights[-1], gradients.biases[-1]):
        gradient.mul_(unit.scale)
    return (
        gradients.first.query,
        items.finished(grad_keys, unit.keys.dtype),
        None if grad_values is None else items.finished(grad_values, unit.values.dtype),
        *gradients.of_layers(),
    )
