"""TorchEasyRec's encoders compute the same fused as by their own code."""

from __future__ import annotations

import sys
import unittest
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
from swap_cases import (
    BATCH,
    LENGTHS,
    LONGEST,
    TOLERANCES,
    WIDTH,
    assert_fused_equals_own,
    import_or_skip,
    spread,
)
from torch import Tensor, nn

import recattn
from recattn.bench.peers import import_peer

sequence = import_or_skip("tzrec.modules.sequence")
DINEncoder, SimpleAttention = sequence.DINEncoder, sequence.SimpleAttention
ACTIVATIONS = ("nn.ReLU", "nn.Sigmoid", "nn.PReLU", "nn.LeakyReLU(negative_slope=0.2)", "Dice", "")
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"bias": False}, {"use_bn": True})


def encoder(query_dim: int = WIDTH, max_seq_length: int = 0, **mlp: Any) -> Any:
    attn_mlp = {"hidden_units": [5, 3], **mlp}
    return spread(DINEncoder(WIDTH, query_dim, "click", attn_mlp, max_seq_length=max_seq_length))


def batch(query_dim: int = WIDTH) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(BATCH, query_dim), torch.randn(BATCH, LONGEST, WIDTH)]


def embedded(query: Tensor, history: Tensor) -> dict[str, Tensor]:
    return {"click.query": query, "click.sequence": history, "click.sequence_length": LENGTHS}


def call(layer: nn.Module, query: Tensor, history: Tensor) -> Tensor:
    return layer(embedded(query, history))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_din_encoder(activation: str, options: dict[str, Any], training: bool) -> None:
    layer = encoder(activation=activation, **options).train(training)
    for dtype in TOLERANCES:
        assert_fused_equals_own(layer, call, batch(), dtype)


@pytest.mark.parametrize("max_seq_length", [0, 4, 9])
@pytest.mark.parametrize("query_dim", [2, WIDTH])
def test_narrow_queries_and_truncated_sequences(query_dim: int, max_seq_length: int) -> None:
    assert_fused_equals_own(encoder(query_dim, max_seq_length), call, batch(query_dim))


def test_dropout_in_eval() -> None:
    remark = "training drops other units than the library would"
    assert_fused_equals_own(encoder(dropout_ratio=0.3).eval(), call, batch(), remark=remark)


@pytest.mark.parametrize("max_seq_length", [0, 4])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_simple_attention(dtype: torch.dtype, max_seq_length: int) -> None:
    layer = SimpleAttention(WIDTH, WIDTH, "click", max_seq_length=max_seq_length)
    assert_fused_equals_own(layer, call, batch(), dtype, backend="torch")


def test_simple_attention_on_a_cpu_is_the_library_s_unless_asked_otherwise() -> None:
    layer = SimpleAttention(WIDTH, WIDTH, "click")
    remark = "on a CPU by the library's own code, which is faster there"
    assert_fused_equals_own(layer, call, batch(), remark=remark)
    (row,) = recattn.fuse(layer, semantics="valid")
    assert row.reason == "an empty history gives 0, not the mean of its padding"
    out = call(layer, *batch())
    assert (out[LENGTHS == 0] == 0).all()


def test_what_is_left() -> None:
    assert list(recattn.fuse(encoder(use_ln=True))) == [
        ("", "DINEncoder", False, "mlp.mlp.0.perceptron.1: LayerNorm is not built")
    ]


@pytest.mark.parametrize("name", ["sequence_test", "activation_test"])
@pytest.mark.filterwarnings("ignore")
def test_the_library_s_own_tests_pass_with_fused_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They trace and compile the layers, as the library's exporter does."""
    import_or_skip("parameterized")
    fused = []

    class TestGraphType(Enum):
        NORMAL = 1
        FX_TRACE = 2
        JIT_SCRIPT = 3
        AOT_INDUCTOR = 4

    def create_test_module(module: nn.Module, graph_type: TestGraphType) -> nn.Module:
        fused.extend(row for row in recattn.fuse(module) if row.swapped)
        if graph_type != TestGraphType.NORMAL:
            module = import_peer("tzrec.utils.fx_util").symbolic_trace(module)
        return torch.jit.script(module) if graph_type == TestGraphType.JIT_SCRIPT else module

    # Its own has these two, and needs the whole framework for others.
    utilities: Any = ModuleType("tzrec.utils.test_util")
    utilities.TestGraphType, utilities.create_test_module = TestGraphType, create_test_module
    monkeypatch.setitem(sys.modules, utilities.__name__, utilities)
    monkeypatch.delitem(sys.modules, f"tzrec.modules.{name}", raising=False)
    suite = unittest.defaultTestLoader.loadTestsFromModule(import_or_skip(f"tzrec.modules.{name}"))
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun > 1
    assert not [*result.errors, *result.failures], [*result.errors, *result.failures][0][1]
    assert fused or name == "activation_test"
