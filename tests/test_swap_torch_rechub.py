"""torch-rechub's activation unit computes the same fused as by its own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from swap_cases import (
    BATCH,
    LONGEST,
    TOLERANCES,
    WIDTH,
    assert_fused_equals_own,
    import_or_skip,
    spread,
)
from torch import Tensor

import recattn
from recattn.composite.network import BLOCK_BYTES

import_or_skip("torch_rechub.models.ranking.din")
fused_module = import_or_skip("recattn.swap.torch_rechub")
NO_KERNEL = fused_module.NO_KERNEL
ActivationUnit = import_or_skip("torch_rechub.models.ranking.din").ActivationUnit
REMARK = "without a mask, padding counts as items, as in the library"


def unit(**options: Any) -> Any:
    return spread(ActivationUnit(WIDTH, **{"dims": [5, 3], "activation": "relu", **options}))


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(BATCH, LONGEST, WIDTH), torch.randn(BATCH, WIDTH)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "prelu", "leakyrelu"])
def test_activation_unit(activation: str, use_softmax: bool, training: bool) -> None:
    layer = unit(activation=activation, use_softmax=use_softmax).train(training)
    for dtype in TOLERANCES:
        assert_fused_equals_own(layer, lambda m, k, q: m(k, q), batch(), dtype, REMARK)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_softmax", [True, False])
def test_its_dice_is_computed_by_pytorch(use_softmax: bool, training: bool) -> None:
    layer = unit(activation="dice", use_softmax=use_softmax).train(training)
    remark = f"{REMARK}; {NO_KERNEL}"
    for dtype in TOLERANCES:
        fused = assert_fused_equals_own(
            layer, lambda m, k, q: m(k, q), batch(), dtype, remark, least=10 if training else 1
        )
    recattn.fuse(fused, backend="triton")
    with pytest.raises(NotImplementedError, match="has no kernel"):
        fused(*batch())


def test_predictions_by_dice_go_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, (history, target) = unit(activation="dice").eval(), batch()
    with torch.no_grad():
        expected = layer(history, target)
        recattn.fuse(layer)
        counted: list[int] = []
        own = fused_module._scores_of_block
        counting = lambda s, h, t: (counted.append(len(h)), own(s, h, t))[1]  # noqa: E731
        monkeypatch.setattr(fused_module, "_scores_of_block", counting)
        sizes: list[list[int]] = []
        for room in (1, 3 * 4 * LONGEST * (WIDTH + 5 + 3), 1 << 20):  # one history at a time, three, all
            monkeypatch.setitem(BLOCK_BYTES, "cpu", room)
            torch.testing.assert_close(layer(history, target), expected)
            sizes.append(counted[sum(map(len, sizes)) :])
    assert sizes == [[1] * BATCH, [3, 3, 1], [BATCH]]


def test_dice_without_running_statistics_uses_the_batch_s_in_eval_too() -> None:
    layer = unit(activation="dice").eval()
    for norm in (layer.attention.mlp[1], layer.attention.mlp[5]):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    assert_fused_equals_own(layer, lambda m, k, q: m(k, q), batch(), remark=f"{REMARK}; {NO_KERNEL}")


def test_a_single_position_raises_in_training_as_in_the_library() -> None:
    layer = unit()
    recattn.fuse(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1, 1, WIDTH), torch.ones(1, WIDTH))
