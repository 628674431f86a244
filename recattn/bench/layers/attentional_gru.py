"""DIEN's recurrences in other libraries. Their update gate is of what is taken over, 1 less what is kept here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from recattn.bench.packing import Packing
from recattn.bench.peers import import_peer
from recattn.bench.task import Prepared

if TYPE_CHECKING:
    from recattn.bench.tasks.attentional_gru import Inputs

KINDS = ("agru", "augru")  # the others are torch.nn.GRU in all of them, so that those have no providers here


def deepctr_torch(inputs: Inputs) -> Prepared:
    """DeepCTR-Torch's `DynamicGRU`. Its two biases are one, by mistake; here they are two."""
    cells = import_peer("deepctr_torch.layers.sequence").DynamicGRU(**_options(inputs))
    rnn = cells.rnn
    rnn.bias_ih = nn.Parameter(torch.empty_like(rnn.bias_hh))
    return _prepared(inputs, cells, [rnn.weight_ih, rnn.weight_hh, rnn.bias_ih, rnn.bias_hh], (0, 1, 2))


def fuxictr(inputs: Inputs) -> Prepared:
    """The `DynamicGRU` of FuxiCTR's DIEN, whose gates are in another order."""
    if inputs.grad.dtype != torch.float32:
        raise NotImplementedError("DynamicGRU keeps states in float32")
    cells = import_peer("model_zoo.LongCTR.DIEN.DIEN").DynamicGRU(**_options(inputs))
    cell = cells.gru_cell
    parameters = [cell.x2h.weight, cell.h2h.weight, cell.x2h.bias, cell.h2h.bias]

    def call(x: PackedSequence, a: PackedSequence) -> PackedSequence:
        return cells(x, PackedSequence(a.data.squeeze(1), *a[1:]))[0]

    return _prepared(inputs, call, parameters, (1, 0, 2))


def recbole(inputs: Inputs) -> Prepared:
    """The `DynamicRNN` of RecBole's DIEN."""
    dien = import_peer("recbole.model.sequential_recommender.dien")
    dim, kind = inputs.case.dim, inputs.case.kind.upper()
    cells = dien.DynamicRNN(dim, dim, gru=kind)
    rnn = cells.rnn
    return _prepared(inputs, cells, [rnn.weight_ih, rnn.weight_hh, rnn.bias_ih, rnn.bias_hh], (0, 1, 2))


def _options(inputs: Inputs) -> dict[str, Any]:
    dim = inputs.case.dim
    return {"input_size": dim, "hidden_size": dim, "gru_type": inputs.case.kind.upper()}


def _prepared(
    inputs: Inputs, call: Callable[..., Any], parameters: Sequence[nn.Parameter], order: tuple[int, int, int]
) -> Prepared:
    """A call of packed items and scores.

    Args:
        order: which of r, z, n each third of a parameter is, or the other way round: it is its own inverse.
    """

    def mapped(x: Tensor) -> Tensor:
        r, z, n = x.chunk(3)
        return torch.cat([(r, -z, n)[i] for i in order])

    def unmapped(x: Tensor) -> Tensor:
        thirds = x.chunk(3)
        r, z, n = (thirds[i] for i in order)
        return torch.cat([r, -z, n])

    with torch.no_grad():
        for parameter, value in zip(parameters, inputs.parameters, strict=True):
            parameter.data = mapped(value)
    packing = Packing(inputs)
    prepared = packing.prepared(lambda x, a: call(x, a).data, list(parameters))

    def comparable(result: Sequence[Tensor]) -> list[Tensor]:
        first = 1 + inputs.inputs
        return prepared.comparable([*result[:first], *map(unmapped, result[first:])])

    return prepared._replace(comparable=comparable)


# By `KINDS`.
LAYERS: dict[str, Callable[[Inputs], Prepared]] = {
    "deepctr_torch": deepctr_torch,
    "fuxictr": fuxictr,
    "recbole": recbole,
}
