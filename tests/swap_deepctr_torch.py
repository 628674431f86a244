"""DeepCTR-Torch's attention pooling, and what the tests of its fused form compare."""

from __future__ import annotations

from typing import Any

import torch
from swap_cases import import_or_skip
from torch import Tensor, nn

import recattn

inputs = import_or_skip("deepctr_torch.inputs")
SparseFeat, VarLenSparseFeat, get_feature_names = (
    inputs.SparseFeat,
    inputs.VarLenSparseFeat,
    inputs.get_feature_names,
)
Dice = import_or_skip("deepctr_torch.layers.activation").Dice
Pooling = import_or_skip("deepctr_torch.layers.sequence").AttentionSequencePoolingLayer
AFM = import_or_skip("deepctr_torch.models.afm").AFM
DIEN = import_or_skip("deepctr_torch.models.dien").DIEN
DIN = import_or_skip("deepctr_torch.models.din").DIN
FusedPooling = import_or_skip("recattn.swap.deepctr_torch").FusedAttentionSequencePoolingLayer

__all__ = [
    "AFM",
    "BATCH",
    "DIEN",
    "DIN",
    "LENGTHS",
    "LONGEST",
    "WIDTH",
    "Dice",
    "FusedPooling",
    "Pooling",
    "SparseFeat",
    "VarLenSparseFeat",
    "assert_equal",
    "assert_fused_equals_own",
    "get_feature_names",
    "pooling",
    "query_and_keys",
    "run",
]

BATCH, LONGEST, WIDTH = 7, 6, 4
LENGTHS = torch.tensor([3, 0, 6, 1, 9, 0, 5])  # empty rows, and one longer than the padded batch


def pooling(hidden: tuple[int, ...] = (5, 3), activation: Any = "sigmoid", **options: Any) -> Pooling:
    torch.manual_seed(0)
    layer = Pooling(hidden, activation, embedding_dim=WIDTH, **options).double()
    for parameter in layer.parameters():  # the library starts with weights of 1e-4, which hide errors
        nn.init.normal_(parameter)
    return layer


def query_and_keys(batch: int = BATCH, longest: int = LONGEST) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 1, WIDTH).double(), torch.randn(batch, longest, WIDTH).double()


def run(layer: nn.Module, query: Tensor, keys: Tensor, *rest: Any) -> list[Tensor]:
    """The output, and the gradients of query, keys and every parameter for some gradient of the output."""
    query, keys = query.clone().requires_grad_(), keys.clone().requires_grad_()
    out = layer(query, keys, *rest)
    upstream = torch.arange(1.0, 1 + out.numel()).reshape(out.shape).cos().to(out)
    leaves = [query, keys, *layer.parameters()]
    return [out, *torch.autograd.grad(out, leaves, upstream, materialize_grads=True)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def assert_fused_equals_own(layer: Pooling, query: Tensor, keys: Tensor, *rest: Any) -> None:
    own = run(layer, query, keys, *rest)
    (row,) = recattn.fuse(layer)
    assert row.swapped, row.reason
    assert type(layer) is FusedPooling
    assert_equal(run(layer, query, keys, *rest), own)
