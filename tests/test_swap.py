"""fuse and unfuse whatever the library: what they look at, and what they print."""

from __future__ import annotations

import inspect
import operator
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recattn
from recattn import swap
from recattn.backend import requested_backend
from recattn.swap.coverage import Options, Swap, Uncovered, instead_of


class Doubling(nn.Module):
    """A peer library's layer."""

    def __init__(self, covered: bool = True) -> None:
        super().__init__()
        self.covered = covered

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class FusedDoubling(Doubling):
    @instead_of(Doubling.forward)
    def forward(self, x: Tensor) -> Tensor:
        """Doubles, for other than small batches."""
        if len(x) < 2:
            raise Uncovered("a small batch")
        return x + x + 0 * len(requested_backend())


class OtherDoubling(Doubling):
    pass


def check(layer: Doubling, options: Options) -> list[str]:
    if not layer.covered:
        raise Uncovered("doubles in another way")
    return [] if options.exact else ["doubles what counts"]


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> str:
    """A peer library that is loaded, with our module for it; the name under which the peer is loaded."""
    ours = ModuleType("ours")
    ours.SWAPS = (Swap(Doubling, FusedDoubling, check),)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ours", ours)
    monkeypatch.setitem(sys.modules, "peer", ModuleType("peer"))
    monkeypatch.setattr(swap, "PEERS", {"peer": "ours"})
    return "peer"


@pytest.mark.usefixtures("peer")
def test_exact_classes_are_swapped_at_any_depth_and_the_rest_reported() -> None:
    model = nn.ModuleDict(
        {
            "first": Doubling(),
            "inner": nn.Sequential(nn.Linear(2, 2), Doubling(covered=False)),
            "like": OtherDoubling(),
        }
    )
    report = recattn.fuse(model)
    assert list(report) == [
        ("first", "Doubling", True, ""),
        ("inner.1", "Doubling", False, "doubles in another way"),
        ("like", "Doubling", False, "a subclass, OtherDoubling, which may compute something else"),
    ]
    assert [type(model["first"]), type(model["inner"][1]), type(model["like"])] == [  # type: ignore[index]
        FusedDoubling,
        Doubling,
        OtherDoubling,
    ]
    assert str(report).splitlines() == [
        "path     layer     fused  reason",
        "first    Doubling  yes",
        "inner.1  Doubling  no     doubles in another way",
        "like     Doubling  no     a subclass, OtherDoubling, which may compute something else",
    ]
    assert repr(report) == str(report)
    assert len(report) == 3


@pytest.mark.usefixtures("peer")
def test_fusing_again_sets_the_options_anew() -> None:
    model = Doubling()
    recattn.fuse(model)
    report = recattn.fuse(model, semantics="valid", backend="torch")
    assert list(report) == [("", "Doubling", True, "doubles what counts")]
    assert str(report).splitlines()[1] == "(model)  Doubling  yes    doubles what counts"
    assert type(model) is FusedDoubling
    assert Options.of(model) == ("torch", "valid")
    recattn.unfuse(model)
    assert set(vars(model)) == set(vars(Doubling()))


@pytest.mark.usefixtures("peer")
def test_the_backend_asked_for_never_falls_back() -> None:
    model, small = Doubling(), torch.ones(1)
    recattn.fuse(model)
    assert torch.equal(model(small), 2 * small)
    recattn.fuse(model, backend="triton")
    with pytest.raises(NotImplementedError, match='backend "triton": a small batch'):
        model(small)
    assert requested_backend() == "auto"


@pytest.mark.usefixtures("peer")
def test_export_and_tracing_see_the_layer_of_the_library() -> None:
    model = nn.Sequential(Doubling())
    recattn.fuse(model)
    example = torch.ones(3)
    for traced in (torch.fx.symbolic_trace(model), torch.export.export(model, (example,)).module()):
        assert [node.target for node in traced.graph.nodes if node.op == "call_function"][-1] in (
            operator.mul,
            torch.ops.aten.mul.Tensor,
        )
    assert "aten::mul" in str(torch.jit.trace(model, example).inlined_graph)
    scripted = torch.jit.script(model)
    assert "aten::mul" in str(scripted.inlined_graph)
    assert torch.equal(scripted(example), 2 * example)
    assert type(model[0]) is FusedDoubling
    assert inspect.signature(model[0].forward) == inspect.signature(Doubling().forward)


@pytest.mark.parametrize("option", ["backend", "semantics"])
def test_options_have_names(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected one of"):
        recattn.fuse(Doubling(), **{option: "fast"})


@pytest.mark.usefixtures("peer")
def test_a_layer_in_two_places_is_swapped_once_and_stays_one() -> None:
    layer = Doubling()
    model = nn.Sequential(layer, layer)
    assert [row.path for row in recattn.fuse(model)] == ["0"]
    assert model[0] is model[1] is layer
    assert type(recattn.unfuse(model)[1]) is Doubling


@pytest.mark.usefixtures("peer")
def test_unfuse_restores_only_what_fuse_swapped() -> None:
    model = nn.Sequential(Doubling(), OtherDoubling(), nn.Linear(2, 2))
    recattn.fuse(model)
    assert recattn.unfuse(model) is model
    assert [type(layer) for layer in model] == [Doubling, OtherDoubling, nn.Linear]


@pytest.mark.parametrize("entry", ["absent", "blocked"])
def test_a_library_that_is_not_loaded_is_not_looked_at(
    peer: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if entry == "absent":
        monkeypatch.delitem(sys.modules, peer)
    else:
        monkeypatch.setitem(sys.modules, peer, None)  # type: ignore[arg-type]
    model = Doubling()
    report = recattn.fuse(model)
    assert len(report) == 0
    assert str(report) == "no layer that recattn has a fused form of"
    assert type(model) is Doubling


def test_no_peer_is_imported() -> None:
    code = (
        "import sys, torch, recattn\n"
        "recattn.unfuse(torch.nn.Linear(1, 1)); recattn.fuse(torch.nn.Linear(1, 1))\n"
        "print([name for name in sys.modules if name.startswith(('deepctr_torch', 'recattn.swap.deepctr'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("function", [recattn.fuse, recattn.unfuse])
def test_only_modules_are_taken(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got Tensor"):
        function(torch.zeros(1))
