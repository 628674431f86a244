"""Who computes `activation_unit`: recattn, and what it is compared with.

A provider is a function from a case and its tensors to a `Prepared` call. What it needs in another layout is
laid out beforehand, so that only the operator is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn import functional
from recattn.bench.cases import Case, Inputs
from recattn.bench.peers import import_peer
from recattn.jagged import Jagged
from recattn.reference import activation_unit_padded
from recattn.reference.activation_unit import hidden_activation, mlp


class Prepared(NamedTuple):
    """A call to time.

    Args:
        forward: computes `[B, D]`.
        leaves: what is differentiated, each requiring a gradient: query, keys (`[T, D]`, or padded
            `[B, L, D]`), weights, biases.
    """

    forward: Callable[[], Any]
    leaves: list[Tensor]


Provider = Callable[[Case, Inputs], Prepared]


class Leaves(NamedTuple):
    query: Tensor
    keys: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    @property
    def all(self) -> list[Tensor]:
        return [self.query, self.keys, *self.weights, *self.biases]


def _leaves(inputs: Inputs, keys: Tensor) -> Leaves:
    query, keys, *layers = (
        t.detach().clone().requires_grad_() for t in (inputs.query, keys, *inputs.weights, *inputs.biases)
    )
    return Leaves(query, keys, layers[: len(inputs.weights)], layers[len(inputs.weights) :])


def recattn(case: Case, inputs: Inputs) -> Prepared:
    """The operator, on histories that lie end to end."""
    query, keys, weights, biases = leaves = _leaves(inputs, inputs.keys.values)
    offsets = inputs.keys.offsets

    def forward() -> Any:
        return functional.activation_unit(query, keys, offsets, weights, biases, **case.options)

    return Prepared(forward, leaves.all)


def recattn_padded(case: Case, inputs: Inputs) -> Prepared:
    """The operator, on a padded batch that is packed first."""
    query, padded, weights, biases = leaves = _leaves(inputs, inputs.padded)
    lengths = inputs.keys.lengths

    def forward() -> Any:
        keys = Jagged.from_padded(padded, lengths=lengths)
        return functional.activation_unit(query, keys.values, keys.offsets, weights, biases, **case.options)

    return Prepared(forward, leaves.all)


def eager(case: Case, inputs: Inputs) -> Prepared:
    """Padded PyTorch code, as ranking libraries write it."""
    return _padded(case, inputs, activation_unit_padded)


def compiled(case: Case, inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly these shapes."""
    torch.compiler.reset()
    return _padded(case, inputs, torch.compile(activation_unit_padded, dynamic=False, fullgraph=True))


def eager_jagged(case: Case, inputs: Inputs) -> Prepared:
    """PyTorch code over the valid positions only: copy the queries, concatenate, reduce by segment."""
    query, keys, weights, biases = leaves = _leaves(inputs, inputs.keys.values)
    history = inputs.keys

    def forward() -> Tensor:
        sequence = history.segment_ids()
        act = hidden_activation(case.activation, None)
        a = mlp(query[sequence], keys.unsqueeze(1), weights, biases, functional.FEATURES, act).flatten()
        if case.normalize == "softmax":
            top = a.new_full(query.shape[:1], -torch.inf).scatter_reduce(0, sequence, a.detach(), "amax")
            a = (a - top[sequence]).exp()
            a = a / a.new_zeros(query.shape[:1]).index_add(0, sequence, a)[sequence]
        return torch.zeros_like(query).index_add(0, sequence, a.unsqueeze(1) * keys)

    return Prepared(forward, leaves.all)


def deepctr_torch(case: Case, inputs: Inputs) -> Prepared:
    """DeepCTR-Torch's `AttentionSequencePoolingLayer` with the same weights.

    Raises:
        ModuleNotFoundError: where it is not installed.
    """
    layer = import_peer("deepctr_torch.layers").AttentionSequencePoolingLayer(
        att_hidden_units=case.hidden,
        att_activation=case.activation,
        weight_normalization=case.normalize == "softmax",
        embedding_dim=case.dim,
    )
    layer.to(inputs.query.device, inputs.query.dtype)
    linears = [*layer.local_att.dnn.linears, layer.local_att.dense]
    with torch.no_grad():
        for linear, weight, bias in zip(linears, inputs.weights, inputs.biases, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    query, keys = (x.detach().clone().requires_grad_() for x in (inputs.query, inputs.padded))
    lengths = inputs.keys.lengths.unsqueeze(1)

    def forward() -> Tensor:
        return layer(query.unsqueeze(1), keys, lengths).squeeze(1)

    return Prepared(forward, [query, keys, *(n.weight for n in linears), *(n.bias for n in linears)])


PROVIDERS: dict[str, Provider] = {
    "recattn": recattn,
    "recattn_padded": recattn_padded,
    "eager": eager,
    "eager_jagged": eager_jagged,
    "compile": compiled,
    "deepctr_torch": deepctr_torch,
}


def _padded(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    query, keys, weights, biases = leaves = _leaves(inputs, inputs.padded)
    mask = inputs.mask
    return Prepared(lambda: function(query, keys, mask, weights, biases, **case.options), leaves.all)
