"""DIN's activation unit in other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recattn.bench.peers import import_peer
from recattn.bench.task import Prepared, leaves_of

if TYPE_CHECKING:
    from recattn.bench.tasks.activation_unit import Inputs

# What all of them call alike, but for capitals; and how TorchEasyRec does.
ACTIVATIONS = {"sigmoid": "nn.Sigmoid", "relu": "nn.ReLU", "tanh": "nn.Tanh"}


def deepctr_torch(inputs: Inputs) -> Prepared:
    """DeepCTR-Torch's `AttentionSequencePoolingLayer`."""
    case = inputs.case
    layer = import_peer("deepctr_torch.layers").AttentionSequencePoolingLayer(
        att_hidden_units=case.hidden,
        att_activation=_activation(inputs),
        weight_normalization=case.normalize == "softmax",
        embedding_dim=case.dim,
    )
    lengths = _lengths(inputs).unsqueeze(1)
    linears = [*layer.local_att.dnn.linears, layer.local_att.dense]
    return _prepared(inputs, layer, linears, lambda q, k: layer(q.unsqueeze(1), k, lengths).squeeze(1))


def fuxictr(inputs: Inputs) -> Prepared:
    """FuxiCTR's `DIN_Attention`."""
    case = inputs.case
    layer = import_peer("fuxictr.pytorch.layers.attentions.target_attention").DIN_Attention(
        case.dim,
        attention_units=list(case.hidden),
        hidden_activations=_activation(inputs),
        use_softmax=case.normalize == "softmax",
    )
    mask = inputs.mask.repeat_interleave(case.candidates, 0).to(inputs.query.dtype)
    return _prepared(inputs, layer, _linears(layer), lambda q, k: layer(q, k, mask))


def recbole(inputs: Inputs) -> Prepared:
    """RecBole's `SequenceAttLayer`, which divides scores by the root of the width: its last layer has that factor. It
    takes no empty history, so that those get an item here, whose result is put aside."""
    case = inputs.case
    layer = import_peer("recbole.model.layers").SequenceAttLayer(
        torch.arange(inputs.max_length, device=inputs.query.device).unsqueeze(0),
        [4 * case.dim, *case.hidden],
        activation=_activation(inputs),
        softmax_stag=case.normalize == "softmax",
        return_seq_weight=False,
    )
    lengths = _lengths(inputs)
    empty = (lengths == 0).unsqueeze(1)
    lengths, any_empty = lengths.clamp_min(1), bool(empty.any())

    def call(query: Tensor, keys: Tensor) -> Tensor:
        out = layer(query, keys, lengths).squeeze(1)
        return out.masked_fill(empty, 0) if any_empty else out

    linears, factor = _linears(layer), case.dim**0.5
    prepared = _prepared(inputs, layer, linears, call)
    with torch.no_grad():
        linears[-1].weight.mul_(factor)
        linears[-1].bias.mul_(factor)
    scaled = (2 + len(linears), 2 + 2 * len(linears))  # where their gradients are

    def comparable(result: Sequence[Tensor]) -> list[Tensor]:
        return prepared.comparable([t * factor if i in scaled else t for i, t in enumerate(result)])

    return prepared._replace(comparable=comparable)


def torch_rechub(inputs: Inputs) -> Prepared:
    """torch-rechub's `ActivationUnit` as in evaluation, with batch norms that change nothing.

    Raises:
        NotImplementedError: where it would compute something else, as it knows no padding.
    """
    case = inputs.case
    if case.normalize == "softmax" and not bool(inputs.mask.all()):
        raise NotImplementedError("its softmax goes over the padding, too: it has no mask")
    layer = import_peer("torch_rechub.models.ranking.din").ActivationUnit(
        case.dim,
        dims=list(case.hidden),
        activation=_activation(inputs),
        use_softmax=case.normalize == "softmax",
    )
    for module in layer.eval().modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eps = 0.0
    return _prepared(inputs, layer, _linears(layer), lambda q, k: layer(k, q))


def torch_easy_rec(inputs: Inputs) -> Prepared:
    """TorchEasyRec's `DINEncoder`.

    Raises:
        NotImplementedError: without softmax, which it always has.
    """
    case = inputs.case
    if case.normalize != "softmax":
        raise NotImplementedError(f"DINEncoder has a softmax, not {case.normalize}")
    mlp = {"hidden_units": list(case.hidden), "activation": ACTIVATIONS[_activation(inputs)]}
    layer = import_peer("tzrec.modules.sequence").DINEncoder(case.dim, case.dim, "h", attn_mlp=mlp)
    lengths = _lengths(inputs)

    def call(query: Tensor, keys: Tensor) -> Tensor:
        return layer({"h.query": query, "h.sequence": keys, "h.sequence_length": lengths})

    return _prepared(inputs, layer, _linears(layer), call)


def _activation(inputs: Inputs) -> str:
    if inputs.case.activation not in ACTIVATIONS:
        raise NotImplementedError(f"{inputs.case.activation}: expected one of {', '.join(ACTIVATIONS)}")
    return inputs.case.activation


def _lengths(inputs: Inputs) -> Tensor:
    """Of the history of each target."""
    return inputs.keys.lengths.repeat_interleave(inputs.case.candidates)


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def _prepared(
    inputs: Inputs, layer: nn.Module, linears: Sequence[nn.Linear], call: Callable[[Tensor, Tensor], Any]
) -> Prepared:
    """A call of targets `[B·C, D]` and padded histories `[B·C, L, D]`, repeated for each of their candidates."""
    layer.to(inputs.query.device, inputs.query.dtype)
    with torch.no_grad():
        for linear, weight, bias in zip(linears, inputs.weights, inputs.biases, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    query, padded = leaves_of(inputs.query, inputs.padded)
    count = inputs.case.candidates

    def forward() -> Tensor:
        return call(query, padded.repeat_interleave(count, 0) if count > 1 else padded)

    parameters = [*(n.weight for n in linears), *(n.bias for n in linears)]
    return inputs.of_padded(forward, [query, padded, *parameters])


LAYERS: dict[str, Callable[[Inputs], Prepared]] = {
    "deepctr_torch": deepctr_torch,
    "fuxictr": fuxictr,
    "recbole": recbole,
    "torch_rechub": torch_rechub,
    "torch_easy_rec": torch_easy_rec,
}
