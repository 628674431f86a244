"""torch-rechub's activation unit computes the same fused as by its own code."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from swap_cases import (
    BATCH,
    LONGEST,
    TOLERANCES,
    WIDTH,
    assert_exports_as_own,
    assert_fused_equals_own,
    assert_state_survives,
    import_or_skip,
    spread,
)
from torch import Tensor, nn

import recattn

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


def test_its_dice_is_left() -> None:
    assert list(recattn.fuse(unit(activation="dice"))) == [
        ("", "ActivationUnit", False, "attention.mlp.2: Dice is not built")
    ]


def test_a_single_position_raises_in_training_as_in_the_library() -> None:
    layer = unit()
    recattn.fuse(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1, 1, WIDTH), torch.ones(1, WIDTH))


def test_state_copies_and_export() -> None:
    example = tuple(batch())
    layer = unit()
    for i in (3, 7):
        layer.attention.mlp[i].p = 0.0  # TorchScript does not take the library's 0
    assert_state_survives(nn.ModuleDict({"pool": layer}), lambda m: m["pool"](*example))
    torch.jit.script(layer)
    assert_exports_as_own(layer, example)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_onnx_has_the_layer_of_the_library(dynamo: bool) -> None:
    onnx = import_or_skip("onnx")
    if dynamo:
        import_or_skip("onnxscript")
    layer = unit().eval()
    graphs = []
    for _ in range(2):
        file = io.BytesIO()
        torch.onnx.export(layer, tuple(batch()), file, dynamo=dynamo, verbose=False)
        graphs.append([node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node])
        recattn.fuse(layer)
    assert graphs[0] == graphs[1]
    assert "Concat" in graphs[1]
