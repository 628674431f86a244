"""On a CPU, a fused layer gives small batches to its library's own code, where that changes nothing but the time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from swap_layers import Example, example

import recattn
from recattn.swap import coverage

UNITS = (
    "deepctr_torch AttentionSequencePoolingLayer",
    "fuxictr DIN_Attention",
    "fuxictr MultiHeadTargetAttention",
    "recbole SequenceAttLayer",
    "torch_rechub ActivationUnit",
    "torch_rechub ActivationUnit with Dice",
    "tzrec DINEncoder",
)
POSITIONS = 42


def below(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(coverage, "SMALL", dict.fromkeys(coverage.SMALL, positions))


def fused(name: str, **options: Any) -> tuple[Example, torch.nn.Module]:
    found = example(name)
    found.layer.eval()
    twin = copy.deepcopy(found.layer)
    recattn.fuse(twin, **options)
    return found, twin


def runs(found: Example, layer: torch.nn.Module, **options: Any) -> list[tuple[str, str]]:
    return [(row.runs, row.reason) for row in recattn.explain(layer, *found.inputs, **options)]


@pytest.mark.parametrize("name", UNITS)
def test_a_small_batch_runs_the_library_s_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, layer = fused(name)
    below(monkeypatch, POSITIONS + 1)
    assert torch.equal(found.out(layer), found.out(found.layer))
    assert runs(found, layer) == [("library", "42 positions, fewer than 43 on a CPU")]


@pytest.mark.parametrize("name", UNITS)
def test_a_batch_as_large_as_the_bound_is_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, layer = fused(name)
    below(monkeypatch, POSITIONS)
    assert "library" not in [how for how, _ in runs(found, layer)]
    torch.testing.assert_close(found.out(layer), found.out(found.layer))


@pytest.mark.parametrize("options", [{"backend": "torch"}, {"semantics": "valid"}], ids=str)
def test_no_batch_is_small_for_a_named_backend_or_other_semantics(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, layer = fused(UNITS[0], **options)
    below(monkeypatch, POSITIONS + 1)
    assert [how for how, _ in runs(found, layer)] == ["composite"]


def test_no_batch_is_small_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found, layer = fused(UNITS[0])
    below(monkeypatch, POSITIONS + 1)
    assert [how for how, _ in runs(found, layer, device="cuda")] == ["kernel"]


def test_statistics_of_a_batch_need_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found, layer = fused(UNITS[0])
    monkeypatch.setitem(coverage.SMALL, "activation_unit_statistics", POSITIONS + 1)
    assert [how for how, _ in runs(found, layer)] == ["composite"]
    assert [how for how, _ in runs(found, layer.train())] == ["library"]


def test_compiled_layers_do_not_ask_for_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    found, layer = fused("recbole SequenceAttLayer")
    below(monkeypatch, POSITIONS + 1)
    torch._dynamo.reset()
    operators: list[Any] = []

    def record(graph: Any, _: Any) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.testing.assert_close(torch.compile(layer, backend=record)(*found.inputs), found.out(found.layer))
    assert any("recattn" in operator for operator in operators)


def test_few_pairs_of_fields_run_the_library_s_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found, layer = fused("deepctr_torch AFMLayer")
    pairs = 7 * 15  # of 6 fields
    monkeypatch.setitem(coverage.SMALL, "pairwise_pool", pairs + 1)
    assert torch.equal(found.out(layer), found.out(found.layer))
    assert runs(found, layer) == [("library", "105 pairs, fewer than 106 on a CPU")]
    monkeypatch.setitem(coverage.SMALL, "pairwise_pool", pairs)
    assert [how for how, _ in runs(found, layer)] == ["composite"]
    expected = "AFMLayer: batches of fewer than 40000 pairs on a CPU run the library's own code"
    assert recattn.fuse(found.layer).notes == (expected,)


def test_the_report_says_how_small() -> None:
    found = example(UNITS[0])
    training = " (5000 in training with batch norm or Dice)"
    said = "batches of fewer than 2000 positions{} on a CPU run the library's own code"
    expected = "AttentionSequencePoolingLayer: " + said.format(training)
    assert str(recattn.fuse(found.layer)).splitlines()[-1] == expected
    for options in ({"backend": "torch"}, {"semantics": "valid"}):
        assert recattn.fuse(found.layer, **options).notes == ()
    assert recattn.fuse(torch.nn.Linear(1, 1)).notes == ()
