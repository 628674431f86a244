"""activation_unit_statistics in PyTorch, block by block as activation_unit is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from recattn.composite.blocks import Block
from recattn.composite.items import Items
from recattn.composite.network import Gradients, Layer, Network, Unit, items_of, slack_of


def forward(unit: Unit) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of parts of the rows, for the pre-activations z behind the last hidden layer: how many rows, `[parts]`, some
    vector near their mean, and the sums of z's distances from it and of the squares of these, `[parts, H]`."""
    width = unit.biases[-1].shape[0] if unit.biases else unit.first.bias.shape[1]
    empty = unit.first.bias.new_empty(0, width)
    parts: list[tuple[Tensor, ...]] = [(empty[:, 0], empty, empty, empty)]
    items = items_of(unit)
    network = Network(unit, items.histories.sequence.numel())
    for block, _, _, z in _blocks(unit, network, items):
        slack, count = slack_of(unit, block), z.new_full((1,), z.shape[0])
        if slack is not None:
            count -= slack.sum()
            z.masked_fill_(slack, 0)
        centre = z.sum(0, keepdim=True) / count.clamp_min(1)
        distance = z.sub_(centre)
        if slack is not None:
            distance.masked_fill_(slack, 0)
        total = distance.sum(0, keepdim=True)
        parts.append((count, centre, total, distance.square_().sum(0, keepdim=True)))
    counts, centres, totals, squares = (torch.cat(column) for column in zip(*parts, strict=True))
    return counts, centres, totals, squares


def backward(
    unit: Unit, linear: Tensor, quadratic: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients for dL/dz = linear + quadratic·z, `[H]` each: of query (but for its way through c), keys, key,
    product and bias of the folded layer, weights, biases, params."""
    items = items_of(unit)
    network = Network(unit, items.histories.sequence.numel())
    gradients, grad_keys = Gradients(unit, network), items.gradient_of(unit.keys)
    for block, keys, hidden, z in _blocks(unit, network, items):
        grad, slack = torch.addcmul(linear, z, quadratic), slack_of(unit, block)
        if slack is not None:
            grad.masked_fill_(slack, 0)
        rows = items.rows_of(grad_keys, block)
        gradients.first.add(block, keys, gradients.back(grad, hidden), rows)
        items.put(grad_keys, block, rows)
    keys = items.finished(grad_keys, unit.keys.dtype)
    return gradients.first.query, keys, *gradients.of_layers()


def _blocks(
    unit: Unit, network: Network, items: Items
) -> Iterator[tuple[Block, Tensor, list[Layer], Tensor]]:
    """The blocks of a call with their keys, hidden layers and pre-activations behind these."""
    for block in chain.from_iterable(span.pieces(network.size) for span in items.histories.spans()):
        keys, slack = items(unit.keys, block), slack_of(unit, block)
        if slack is not None:
            keys = keys.masked_fill(slack, 0)
        hidden = network.hidden(block, keys)
        yield block, keys, hidden, network.pre_activations(block, keys, hidden)
