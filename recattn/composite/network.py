"""The scoring MLP over blocks of rows, and the way back through it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.activations import FROM_OUTPUT, Params, activate, activation_backward_
from recattn.composite.blocks import Block, Workspace
from recattn.composite.first_layer import FirstLayer, FirstLayerGradients
from recattn.composite.items import Items
from recattn.ops.candidates import Candidates
from recattn.ops.dropout import Dropout
from recattn.ops.fold import Folded

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
    params: Sequence[Params]  # of the activation, per hidden layer
    activation: str
    dropout: Dropout | None  # of the hidden units
    normalize: str
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.first.bias.dtype

    @property
    def widths(self) -> list[int]:
        """Of the hidden layers."""
        return [weight.shape[1] for weight in self.weights]

    @property
    def positions(self) -> int:
        return self.keys.shape[0] if self.rows is None else self.rows.numel()

    @property
    def most_rows(self) -> int:
        """As many rows as all sequences may have."""
        return self.positions * (1 if self.candidates is None else self.query.shape[0])


class Layer(NamedTuple):
    """A hidden layer over some rows, and what its way back needs."""

    units: Tensor  # [rows, H], as the next layer reads them
    known: Tensor  # [rows, H], what the activation's derivative is a function of: its input or its value
    factors: Tensor | None  # [rows, H], by dropout


class Network:
    """The MLP of a call on blocks of rows.

    Attributes:
        first: its first layer.
        weights, biases: of the layers behind it; the last ones include the scale of the scores.
        workspace: where blocks are computed.
        size: how many rows a block has at most.
    """

    def __init__(self, unit: Unit, rows: int) -> None:
        widths = [unit.keys.shape[1], unit.first.bias.shape[1], *(w.shape[1] for w in unit.weights[1:])]
        row_bytes = unit.dtype.itemsize * sum(widths)
        block_bytes = BLOCK_BYTES.get(unit.keys.device.type, BLOCK_BYTES["cuda"])
        self.size = min(max(block_bytes // row_bytes, 1), max(rows, 1))
        self.workspace = Workspace(unit.first.bias, self.size)
        self.first = FirstLayer(unit.first, unit.query.to(unit.dtype), self.workspace)
        self.weights, self.biases = list(unit.weights), list(unit.biases)
        for group in (self.weights, self.biases):
            group[-1:] = [last * unit.scale for last in group[-1:]]
        self.activation, self.params, self.dropout = unit.activation, unit.params, unit.dropout

    def hidden(self, block: Block, keys: Tensor) -> list[Layer]:
        """The hidden layers over the rows of a block."""
        layers: list[Layer] = []
        for index, params in enumerate(self.params):
            z = self.pre_activations(block, keys, layers)
            units = activate(z, self.activation, params)
            known, factors = units if self.activation in FROM_OUTPUT else z, None
            if self.dropout is not None:
                rows = torch.arange(block.rows.start, block.rows.stop, device=keys.device)
                factors = self.dropout.kept(rows, index, z.shape[1]).to(z.dtype).mul_(self.dropout.gain)
                units = torch.mul(units, factors, out=self.workspace(f"kept {index}", *z.shape))
            layers.append(Layer(units, known, factors))
        return layers

    def pre_activations(self, block: Block, keys: Tensor, layers: Sequence[Layer]) -> Tensor:
        """`[rows, H]` of the layer behind some hidden ones."""
        if not layers:
            return self.first(block, keys)
        weight, bias = self.weights[len(layers) - 1], self.biases[len(layers) - 1]
        z = self.workspace(f"hidden {len(layers)}", keys.shape[0], weight.shape[0])
        return torch.mm(layers[-1].units, weight.t(), out=z).add_(bias)

    def scores(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Of the last hidden units, `[rows]`."""
        return torch.addmv(self.biases[-1], hidden, self.weights[-1][0], out=out)


class Gradients:
    """Gradients of the layers, summed over blocks.

    Attributes:
        first: of the first layer.
        weights, biases: of the layers behind it.
        params: of the activations, per hidden layer.
    """

    def __init__(self, unit: Unit, network: Network) -> None:
        self.network, self.first = network, FirstLayerGradients(network.first)
        self.weights = [torch.zeros_like(w) for w in unit.weights]
        self.biases = [torch.zeros_like(b) for b in unit.biases]
        self.params = [
            [torch.zeros_like(p) for p in params if isinstance(p, Tensor)] for params in unit.params
        ]

    def back(self, grad: Tensor, layers: Sequence[Layer]) -> Tensor:
        """dL/dz of the first layer, `[rows, H1]`, from that of the layer behind the hidden ones."""
        for index in reversed(range(len(layers))):
            units, known, factors = layers[index]
            self.weights[index].addmm_(grad.t(), units)
            self.biases[index] += grad.sum(0)
            weight, room = self.network.weights[index], f"gradient {index}"
            grad = torch.mm(grad, weight, out=self.network.workspace(room, *units.shape))
            if factors is not None:
                grad.mul_(factors)
            terms = activation_backward_(grad, known, self.network.activation, self.network.params[index])
            for total, term in zip(self.params[index], terms, strict=True):
                total += term
        return grad

    def of_layers(
        self,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Of key, product and bias of the folded layer, and of weights, biases and params."""
        key, product = self.first.folded.permute(1, 2, 0)
        return key, product, self.first.bias, self.weights, self.biases, list(chain(*self.params))


def items_of(unit: Unit) -> Items:
    starts = None if unit.candidates is None else unit.candidates.starts
    return Items(unit.offsets, starts, unit.rows, unit.positions, unit.unique_rows, unit.dtype)


def slack_of(unit: Unit, block: Block) -> Tensor | None:
    """`[rows, 1]`: which rows of a block are slack, where a block may have such."""
    if unit.keys.is_cpu:
        return None
    rows = torch.arange(block.rows.start, block.rows.stop, device=unit.keys.device)
    return (rows >= unit.offsets[-1]).unsqueeze(1)
