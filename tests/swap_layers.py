"""A layer of each kind that `recattn.fuse` replaces, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from swap_cases import BATCH, LENGTHS, LONGEST, MASKS, WIDTH, import_or_skip, spread
from torch import Tensor, nn


class Example(NamedTuple):
    layer: nn.Module
    inputs: tuple[Any, ...]

    def out(self, layer: nn.Module) -> Tensor:
        """What a layer like this makes of the inputs; the last of its outputs."""
        out = layer(*self.inputs)
        result: Tensor = out[-1] if isinstance(out, tuple) else out
        return result

    def to(self, target: Any) -> Example:
        """The inputs on another device, or of another dtype."""
        return Example(self.layer, tuple(_to(x, target) for x in self.inputs))


def _to(x: Any, target: Any) -> Any:
    if isinstance(x, dict):
        return {key: _to(value, target) for key, value in x.items()}
    if isinstance(x, list):
        return [_to(value, target) for value in x]
    return x if isinstance(target, torch.dtype) and not x.is_floating_point() else x.to(target)


SOME = LENGTHS.clamp_min(1)  # for what takes no empty history
POSITIONS = torch.arange(LONGEST).view(1, -1)


def _batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, WIDTH), torch.randn(BATCH, LONGEST, WIDTH)


def _pooling() -> Example:
    query, keys = _batch()
    cls = import_or_skip("deepctr_torch.layers.sequence").AttentionSequencePoolingLayer
    layer = cls((5, 3), "dice", weight_normalization=True, embedding_dim=WIDTH)
    return Example(layer, (query.unsqueeze(1), keys, LENGTHS))


def _extractor() -> Example:
    _, keys = _batch()
    layer = import_or_skip("deepctr_torch.models.dien").InterestExtractor(WIDTH, use_neg=True)
    return Example(layer, (keys, LENGTHS, keys.flip(0)))


def _evolving() -> Example:
    query, keys = _batch()
    cls = import_or_skip("deepctr_torch.models.dien").InterestEvolving
    return Example(cls(WIDTH, "AUGRU", att_hidden_size=(5, 3)), (query, keys, SOME))


def _pairs() -> Example:
    layer = import_or_skip("deepctr_torch.layers.interaction").AFMLayer(WIDTH, 3)
    return Example(layer, (list(_batch()[1].split(1, 1)),))


def _fuxictr_din() -> Example:
    cls = import_or_skip("fuxictr.pytorch.layers.attentions.target_attention").DIN_Attention
    layer = cls(WIDTH, attention_units=[5, 3], hidden_activations="dice", batch_norm=True)
    return Example(layer, (*_batch(), MASKS["left"]))


def _fuxictr_multi_head() -> Example:
    cls = import_or_skip("fuxictr.pytorch.layers.attentions.target_attention").MultiHeadTargetAttention
    return Example(cls(WIDTH, attention_dim=6, num_heads=2), (*_batch(), MASKS["holes"]))


def _fuxictr_attention() -> Example:
    query, keys = _batch()
    layer = import_or_skip("model_zoo.LongCTR.DIEN.DIEN").AttentionLayer(WIDTH)
    return Example(layer, (keys, query, MASKS["left"].float()))


def _recbole() -> Example:
    cls = import_or_skip("recbole.model.layers").SequenceAttLayer
    layer = cls(POSITIONS, [4 * WIDTH, 5, 3], return_seq_weight=False)
    return Example(layer, (*_batch(), LENGTHS))


def _recbole_evolving() -> Example:
    module = import_or_skip("recbole.model.sequential_recommender.dien")
    layer = module.InterestEvolvingLayer(POSITIONS, WIDTH, WIDTH, [4 * WIDTH, 5, 3], gru="AUGRU")
    return Example(layer, (*_batch(), SOME))


def _rechub(activation: str) -> Callable[[], Example]:
    def build() -> Example:
        query, keys = _batch()
        cls = import_or_skip("torch_rechub.models.ranking.din").ActivationUnit
        layer = cls(WIDTH, dims=[5, 3], activation=activation)
        for i in (3, 7):
            layer.attention.mlp[i].p = 0.0  # TorchScript does not take the library's 0
        return Example(layer, (keys, query))

    return build


def _rechub_augru() -> Example:
    query, keys = _batch()
    layer = import_or_skip("torch_rechub.models.ranking.dien").AUGRU(WIDTH)
    return Example(layer, (keys, query))


def _tzrec(name: str, **options: Any) -> Callable[[], Example]:
    def build() -> Example:
        query, keys = _batch()
        layer = getattr(import_or_skip("tzrec.modules.sequence"), name)(WIDTH, WIDTH, "h", **options)
        return Example(layer, ({"h.query": query, "h.sequence": keys, "h.sequence_length": LENGTHS},))

    return build


LAYERS: dict[str, Callable[[], Example]] = {
    "deepctr_torch AttentionSequencePoolingLayer": _pooling,
    "deepctr_torch InterestExtractor": _extractor,
    "deepctr_torch InterestEvolving": _evolving,
    "deepctr_torch AFMLayer": _pairs,
    "fuxictr DIN_Attention": _fuxictr_din,
    "fuxictr MultiHeadTargetAttention": _fuxictr_multi_head,
    "fuxictr AttentionLayer": _fuxictr_attention,
    "recbole SequenceAttLayer": _recbole,
    "recbole InterestEvolvingLayer": _recbole_evolving,
    "torch_rechub ActivationUnit": _rechub("relu"),
    "torch_rechub ActivationUnit with Dice": _rechub("dice"),
    "torch_rechub AUGRU": _rechub_augru,
    "tzrec DINEncoder": _tzrec("DINEncoder", attn_mlp={"hidden_units": [5, 3], "activation": "Dice"}),
    "tzrec SimpleAttention": _tzrec("SimpleAttention"),
}


def example(name: str, grad: bool = False) -> Example:
    """Of `LAYERS`, with parameters that hide no error; the inputs with gradients or without."""
    torch.manual_seed(0)
    layer, inputs = LAYERS[name]()
    for x in inputs[0].values() if isinstance(inputs[0], dict) else inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_(grad)
    return Example(spread(layer), inputs)
