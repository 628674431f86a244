"""What of DeepCTR-Torch's attention differs between training and evaluation, and its kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from swap_cases import LENGTHS, MASKS, TOLERANCES, assert_fused_equals_own, run, spread
from swap_deepctr_torch import Pooling, query_and_keys
from torch import Tensor, nn

import recattn


def pooling(activation: Any = "dice", **options: Any) -> nn.Module:
    return spread(Pooling((5, 3), activation, embedding_dim=4, **options))


def call(layer: nn.Module, query: Tensor, keys: Tensor) -> Tensor:
    return layer(query, keys, LENGTHS)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("return_score", [True, False])
@pytest.mark.parametrize("weight_normalization", [True, False])
@pytest.mark.parametrize("activation", ["dice", "relu", "prelu"])
def test_values_gradients_and_running_statistics(
    activation: str, weight_normalization: bool, return_score: bool, training: bool, dtype: torch.dtype
) -> None:
    layer = pooling(activation, weight_normalization=weight_normalization, return_score=return_score)
    assert_fused_equals_own(layer.train(training), call, list(query_and_keys()), dtype)


@pytest.mark.parametrize("kind", MASKS)
def test_dice_behind_any_mask(kind: str) -> None:
    layer = pooling(supports_masking=True, weight_normalization=True)
    assert_fused_equals_own(layer, lambda m, q, k: m(q, k, None, MASKS[kind]), list(query_and_keys()))


def test_dice_without_running_statistics_uses_the_batch_s_in_eval_too() -> None:
    layer = pooling()
    for dice in layer.local_att.dnn.activation_layers:
        dice.bn.track_running_stats = False
        dice.bn.running_mean = dice.bn.running_var = dice.bn.num_batches_tracked = None
    assert_fused_equals_own(layer.eval(), call, list(query_and_keys()))


def test_dropout_is_eval_s_without_it() -> None:
    layer = pooling("sigmoid").eval()
    layer.local_att.dnn.dropout.p = 0.4
    remark = "training drops other units than the library would"
    fused = assert_fused_equals_own(layer, call, list(query_and_keys()), remark=remark)
    query, keys = query_and_keys()
    torch.manual_seed(0)
    first, second = (fused.train()(query, keys, LENGTHS) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("training", [True, False])
def test_valid_semantics_are_those_of_the_library_without_padding(training: bool) -> None:
    full = torch.full((len(LENGTHS),), 6)
    layer = pooling(weight_normalization=True).double().train(training)
    fused = copy.deepcopy(layer)
    recattn.fuse(fused, semantics="valid")
    inputs = [x.requires_grad_() for x in query_and_keys()]
    expected = run(layer, lambda m: m(*inputs, full), inputs)
    for a, b in zip(run(fused, lambda m: m(*inputs, full), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_the_kernels_compute_the_same(activation: str) -> None:
    layer = pooling(activation, weight_normalization=True).float()
    fused = copy.deepcopy(layer)
    recattn.fuse(fused, backend="triton")
    inputs = [x.float().requires_grad_() for x in query_and_keys()]
    expected = run(layer, lambda m: call(m, *inputs), inputs)
    for a, b in zip(run(fused, lambda m: call(m, *inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
