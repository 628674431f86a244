"""Whatever the library, exporters and tracers make of a fused layer what they make of its own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swap_cases import import_or_skip
from swap_layers import LAYERS, Example, example
from torch import Tensor, nn

import recattn

pytestmark = pytest.mark.filterwarnings("ignore")
# One layer of each library that both exporters to ONNX take.
ONNX = (
    "deepctr_torch AttentionSequencePoolingLayer",
    "fuxictr DIN_Attention",
    "recbole SequenceAttLayer",
    "torch_rechub ActivationUnit with Dice",
    "tzrec DINEncoder",
)


def both(name: str) -> tuple[Example, nn.Module, nn.Module]:
    """The layer by itself and fused, in eval."""
    found = example(name)
    own = found.layer.eval()
    fused = copy.deepcopy(own)
    report = recattn.fuse(fused)
    assert report
    assert all(row.swapped for row in report), report
    return found, own, fused


EXPORTERS: dict[str, Callable[[Example, nn.Module], Any]] = {
    "torch.fx": lambda _, m: torch.fx.symbolic_trace(m),
    "jit.trace": lambda found, m: torch.jit.trace(m, found.inputs, check_trace=False),
    "jit.script": lambda _, m: torch.jit.script(m),
    "torch.export": lambda found, m: torch.export.export(m, found.inputs).module(),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_layer_is_the_library_s(name: str, exporter: str) -> None:
    found, own, fused = both(name)
    kind = type(fused)
    export = EXPORTERS[exporter]
    try:
        expected = found.out(export(found, own))
    except Exception as error:  # what the library's own layer does not survive
        with pytest.raises(type(error)):
            found.out(export(found, fused))
    else:
        assert torch.equal(found.out(export(found, fused)), expected)
    assert type(fused) is kind


@pytest.mark.parametrize("exporter", ["jit.trace", "torch.export"])
@pytest.mark.parametrize("name", ONNX)
def test_a_layer_of_each_library_is_exported_indeed(name: str, exporter: str) -> None:
    found, own, fused = both(name)
    torch.testing.assert_close(found.out(EXPORTERS[exporter](found, fused)), found.out(own))


@pytest.mark.parametrize("dynamo", [False, True], ids=["jit", "dynamo"])
@pytest.mark.parametrize("name", ONNX)
def test_onnx_has_the_layer_of_the_library(name: str, dynamo: bool) -> None:
    onnx = import_or_skip("onnx")
    if dynamo:
        import_or_skip("onnxscript")
    found, *layers = both(name)
    graphs = []
    for layer in layers:
        file = io.BytesIO()
        torch.onnx.export(layer, (*found.inputs, {}), file, dynamo=dynamo, verbose=False)
        graphs.append([node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node])
    assert graphs[0] == graphs[1]
    assert "Concat" in graphs[1]


class Model(nn.Module):
    """A layer inside a model, as an exporter of models sees it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        return self.layer(history * 2, target).sum(1)


def test_a_traced_model_of_a_fused_layer_takes_batches_of_other_sizes() -> None:
    found, own, fused = both("torch_rechub ActivationUnit")
    history, target = found.inputs
    traced = torch.jit.trace(Model(fused), (history, target))
    few = history[:3], target[:3]
    assert torch.equal(traced(*few), Model(own)(*few))
