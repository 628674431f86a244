"""activation_unit in PyTorch: only valid positions, the folded first layer, blocks that stay in cache.

Passes over the history in blocks of rows. A block runs the layers of the MLP one after the other, so what is
alive at any time is a block's hidden units, never `[T, H]`. Backward recomputes them block by block.
On an accelerator nothing is copied to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.activations import FROM_OUTPUT, activate, activation_backward_
from recattn.composite.blocks import Block, Workspace, segment_sum
from recattn.composite.first_layer import FirstLayer, FirstLayerGradients
from recattn.composite.items import Items, zero_slack_
from recattn.ops.candidates import Candidates
from recattn.ops.fold import Folded

__all__ = ["Unit", "backward", "forward", "segment_sum"]

# Bytes of the keys and hidden units of a block, by device. On the CPU about a core's second cache: with more
# they leave it, with less the calls take longer than what they compute.
BLOCK_BYTES = {"cpu": 3 << 19, "cuda": 1 << 28}


class Unit(NamedTuple):
    """One call, its first layer folded; everything in the dtype to compute in but query, keys and values."""

    query: Tensor  # [B, D]
    keys: Tensor  # [R, D]
    values: Tensor  # [R, Dv]
    offsets: Tensor  # [B + 1], of the sequences, one per query
    candidates: Candidates | None  # where sequences share histories
    rows: Tensor | None  # [T], the row of keys and values at each position; the position itself without it
    unique_rows: bool  # whether gradients go to these rows, which are all different, else to the positions
    first: Folded
    weights: Sequence[Tensor]  # [H2, H1], ..., [1, Hn]
    biases: Sequence[Tensor]
    slopes: Sequence[Tensor | float]  # per hidden layer
    activation: str
    normalize: str
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.first.bias.dtype

    @property
    def positions(self) -> int:
        return self.keys.shape[0] if self.rows is None else self.rows.numel()

    @property
    def most_rows(self) -> int:
        """As many rows as all sequences may have."""
        return self.positions * (1 if self.candidates is None else self.query.shape[0])


class Network:
    """The MLP of a call on blocks of rows.

    Attributes:
        first: its first layer.
        weights, biases: of the layers behind it; the last ones include the scale of the scores.
        workspace: where blocks are computed.
        size: how many rows a block has at most.
    """

    def __init__(self, unit: Unit, rows: int) -> None:
        dim = unit.keys.shape[1]
        row_bytes = unit.dtype.itemsize * (dim + sum(weight.shape[1] for weight in unit.weights))
        block_bytes = BLOCK_BYTES.get(unit.keys.device.type, BLOCK_BYTES["cuda"])
        self.size = min(max(block_bytes // row_bytes, 1), max(rows, 1))
        self.workspace = Workspace(unit.first.bias, self.size)
        self.first = FirstLayer(unit.first, unit.query.to(unit.dtype), self.workspace)
        self.weights = [*unit.weights[:-1], unit.weights[-1] * unit.scale]
        self.biases = [*unit.biases[:-1], unit.biases[-1] * unit.scale]
        self.activation, self.slopes = unit.activation, unit.slopes

    def hidden(self, block: Block, keys: Tensor, pre: list[Tensor] | None = None) -> list[Tensor]:
        """The hidden units of each layer, `[rows, H]`. What went into each activation is put into `pre`."""
        z = self.first(block, keys)
        hidden: list[Tensor] = []
        for layer, slope in enumerate(self.slopes):
            if layer:
                weight, bias = self.weights[layer - 1], self.biases[layer - 1]
                z = self.workspace(f"hidden {layer}", z.shape[0], weight.shape[0])
                torch.mm(hidden[-1], weight.t(), out=z).add_(bias)
            if pre is not None:
                pre.append(z)
            hidden.append(activate(z, self.activation, slope))
        return hidden

    def scores(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Of the last hidden units, `[rows]`."""
        return torch.addmv(self.biases[-1], hidden, self.weights[-1][0], out=out)


def forward(unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, Dv]`, the attention `a [T]` and the log-sum-exp `[B]` of the scores, in `unit.dtype`."""
    items = _items(unit)
    batch, total = unit.query.shape[0], items.histories.sequence.numel()
    if unit.candidates is None:
        total = unit.positions
    scores = unit.keys.new_zeros(total, dtype=unit.dtype)
    out = unit.values.new_zeros(batch, unit.values.shape[1], dtype=unit.dtype)
    lse = scores.new_full((batch,), -torch.inf if unit.normalize == "softmax" else 0)
    network = Network(unit, total)
    for span in items.histories.spans():
        for block in span.pieces(network.size):
            hidden = network.hidden(block, items(unit.keys, block))
            network.scores(hidden[-1], out=scores[block.rows])
        attention = scores[span.rows]
        match unit.normalize:
            case "softmax":
                _softmax_(attention, lse, span)
            case "exp" | "sigmoid":
                getattr(attention, unit.normalize + "_")()
        out[span.owners] = items.pool(unit.values, span, attention)
    return out, zero_slack_(scores, unit.offsets), lse


def _items(unit: Unit) -> Items:
    starts = None if unit.candidates is None else unit.candidates.starts
    return Items(unit.offsets, starts, unit.rows, unit.positions, unit.unique_rows, unit.dtype)


def _softmax_(scores: Tensor, lse: Tensor, span: Block) -> None:
    """Softmax over each sequence of a span, in place; its log-sum-exp goes into `lse [B]`."""
    rows = span.split(scores)
    lse[span.owners] = span.reduce(scores, "max")
    rows.sub_(span.take(lse)).exp_()
    mass = torch.ones_like(lse)
    mass[span.owners] = span.reduce(scores, "sum")
    rows.div_(span.take(mass))
    lse.add_(mass.log_())


def backward(
    unit: Unit, grad_out: Tensor, grad_scores: Tensor | None, delta: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of query (but for its way through c), keys, values, key, product and bias of the folded
    layer, weights, biases, slopes; the last three as lists. `delta [B]` is Σ_t a_t dL/da_t, for softmax."""
    separate = unit.values is not unit.keys
    items = _items(unit)
    network = Network(unit, items.histories.sequence.numel())
    workspace, grad_first = network.workspace, FirstLayerGradients(network.first)
    grad_keys = items.gradient_of(unit.keys)
    grad_values = items.gradient_of(unit.values) if separate else None
    grad_weights = [torch.zeros_like(w) for w in unit.weights]
    grad_biases = [torch.zeros_like(b) for b in unit.biases]
    grad_slopes = [torch.zeros_like(s) for s in unit.slopes if isinstance(s, Tensor)]
    grad_out = grad_out.to(unit.dtype)
    spans = items.histories.spans()
    for block in chain.from_iterable(span.pieces(network.size) for span in spans):
        rows = block.rows
        keys = items(unit.keys, block)
        values = items(unit.values, block) if separate else keys
        slack = None
        if not keys.is_cpu:  # as rows of zeros without a gradient it leaves the sums over all rows alone
            slack = torch.arange(rows.start, rows.stop, device=keys.device) >= unit.offsets[-1]
            keys = keys.masked_fill(slack.unsqueeze(1), 0)
        pre: list[Tensor] = []
        hidden = network.hidden(block, keys, pre)
        attention = block.split(network.scores(hidden[-1]))

        upstream = block.take(grad_out, out=workspace("upstream", *values.shape))
        grad = block.dot(values, upstream, out=workspace("scratch", *values.shape))  # dL/da, [n, length]
        if grad_scores is not None:
            grad += block.split(grad_scores[rows])
        match unit.normalize:
            case "softmax":
                assert delta is not None
                attention.sub_(block.take(lse)).exp_()
                grad.sub_(block.take(delta)).mul_(attention)
            case "exp":
                grad.mul_(attention.exp_())
            case "sigmoid":
                attention.sigmoid_()
                torch.ops.aten.sigmoid_backward.grad_input(grad, attention, grad_input=grad)
        grad = grad.view(-1, 1)
        if slack is not None:
            grad.masked_fill_(slack.unsqueeze(1), 0)

        for layer in reversed(range(len(hidden))):
            grad_weights[layer].addmm_(grad.t(), hidden[layer])
            grad_biases[layer] += grad.sum(0)
            z = hidden[layer] if unit.activation in FROM_OUTPUT else pre[layer]
            grad = torch.mm(grad, network.weights[layer], out=workspace(f"gradient {layer}", *z.shape))
            slope = activation_backward_(grad, z, unit.activation, unit.slopes[layer])
            if slope is not None:
                grad_slopes[layer] += slope
        grad_rows = items.rows_of(grad_keys, block)
        grad_first.add(block, keys, grad, grad_rows)
        if grad_values is None:
            block.split(grad_rows).addcmul_(upstream, attention.unsqueeze(2))
        else:
            value_rows = items.rows_of(grad_values, block)
            torch.mul(upstream, attention.unsqueeze(2), out=block.split(value_rows))
            items.put(grad_values, block, value_rows)
        items.put(grad_keys, block, grad_rows)
    for gradient in (grad_weights[-1], grad_biases[-1]):
        gradient.mul_(unit.scale)
    grad_key, grad_product = grad_first.folded.permute(1, 2, 0)
    return (
        grad_first.query,
        items.finished(grad_keys, unit.keys.dtype),
        None if grad_values is None else items.finished(grad_values, unit.values.dtype),
        grad_key,
        grad_product,
        grad_first.bias,
        grad_weights,
        grad_biases,
        grad_slopes,
    )
