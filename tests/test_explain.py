"""`recattn.explain` tells what the dispatch does, as it asks the same questions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_import import run_fresh
from torch import nn

import recattn
from recattn import functional
from recattn.explain import Explanation
from recattn.jagged import Jagged
from recattn.nn import ActivationUnit, AttentionalGRU, SelfAttention, TargetAttention

BF16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


def told(explanation: Explanation) -> list[tuple[str, str, str, str]]:
    return [(row.path, row.histories, row.runs, row.kernel) for row in explanation]


def test_on_the_cpu_every_layer_is_composite() -> None:
    model = nn.ModuleDict({"unit": ActivationUnit(8), "self": SelfAttention(8)})
    rows = list(recattn.explain(model))
    few = "not on a GPU; the hidden units of all rows fit in 8 MiB"
    padded = "not on a GPU; to pad short sequences costs less than a call for each length"
    assert [(row.path, row.layer, row.operator, row.runs, row.kernel, row.reason) for row in rows] == [
        ("unit", "ActivationUnit", "activation_unit", "composite", "few rows", few),
        ("self", "SelfAttention", "self_attention", "composite", "padded groups", padded),
        ("self", "SelfAttention", "self_attention", "composite", "", "not on a GPU"),
    ]
    assert [row.histories for row in rows] == ["", "short", "long"]


@pytest.mark.parametrize(("count", "kernel"), [(17_000, "few rows"), (18_000, "")])
def test_the_composite_of_activation_unit_goes_by_the_number_of_rows(count: int, kernel: str) -> None:
    layer = ActivationUnit(4, (80, 40))
    history = Jagged(torch.zeros(count, 4), torch.tensor([0, count]))
    (row,) = recattn.explain(layer, torch.zeros(1, 4), history)
    assert (row.runs, row.kernel) == ("composite", kernel)


@pytest.mark.parametrize(
    ("lengths", "kernel"), [([7, 20, 3, 5] * 64, "padded groups"), ([32] * 64, ""), ([16, 320], "")]
)
def test_the_composite_of_self_attention_pads_short_sequences(lengths: list[int], kernel: str) -> None:
    items = Jagged.from_lengths(torch.zeros(sum(lengths), 8), torch.tensor(lengths))
    (row,) = recattn.explain(SelfAttention(8), items)
    assert (row.runs, row.kernel) == ("composite", kernel)
    assert ("to pad short sequences costs less" in row.reason) == bool(kernel)


def test_classes_of_kernels_are_told_apart_by_lengths_and_widths() -> None:
    model = nn.ModuleDict(
        {
            "narrow": ActivationUnit(64),
            "wide": ActivationUnit(64, (512, 256), activation="relu"),
            "products": TargetAttention(32, num_heads=2),
            "self": SelfAttention(32),
        }
    )
    assert told(recattn.explain(model, **BF16)) == [
        ("narrow", "short", "kernel", "packed"),
        ("narrow", "long", "kernel", "classic"),
        ("wide", "", "kernel", "wide"),
        ("products", "short", "kernel", "packed"),
        ("products", "long", "kernel", "classic"),
        ("self", "", "kernel", "plain"),
    ]


def test_what_no_kernel_covers_says_why() -> None:
    (row,) = recattn.explain(AttentionalGRU(8, 300), **BF16)
    assert row.runs == "composite"
    assert row.reason == "kernels take inputs and states up to 128 wide, not 300"
    rows = list(recattn.explain(ActivationUnit(8, (600, 4), activation="dice"), **BF16))
    assert [row.operator for row in rows] == ["activation_unit_statistics", "activation_unit"]
    assert all("hidden layers up to 512 wide" in row.reason for row in rows)


def test_the_eager_twin_is_told() -> None:
    model = nn.Sequential(ActivationUnit(8), AttentionalGRU(4, 4, kind="gru")).requires_grad_(False)
    model[0].use("eager")
    assert [row.runs for row in recattn.explain(model)] == ["eager", "composite"]
    model[0].use("fused")
    assert [row.runs for row in recattn.explain(model)] == ["composite", "composite"]


def test_a_call_is_explained_by_its_own_shapes() -> None:
    layer, history = ActivationUnit(8).bfloat16(), torch.zeros(6, 8).bfloat16()
    queries, offsets = torch.zeros(4, 8).bfloat16(), torch.tensor([0, 6])
    shared = {"query_offsets": torch.tensor([0, 4])}
    (row,) = recattn.explain(layer, queries, Jagged(history, offsets), device="cuda", **shared)
    assert (row.path, row.kernel, row.histories) == ("", "candidates", "")
    (row,) = recattn.explain(
        functional.target_attention, queries, history, history, offsets, device="cuda", **shared
    )
    assert (row.operator, row.layer, row.kernel) == ("target_attention", "", "candidates")


@pytest.mark.parametrize(("backend", "reason"), [("torch", 'backend "torch" is asked for'), ("triton", "")])
def test_a_backend_asked_for_by_name_is_respected(backend: str, reason: str) -> None:
    with recattn.backend(backend):
        (row,) = recattn.explain(ActivationUnit(8))
    assert row.runs == ("composite" if reason else "kernel")
    assert row.reason.startswith(reason)


def test_the_dispatch_does_what_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from recattn.kernels import activation_unit as kernels

    launched = []
    original = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: launched.append(1) or original(*args))
    layer, call = ActivationUnit(4, (4,)), (torch.zeros(1, 4), torch.zeros(1, 2, 4))
    lengths = torch.tensor([2])
    with recattn.backend("triton"):
        (row,) = recattn.explain(layer, *call, lengths=lengths)
        assert row.runs == "kernel"
        assert not launched  # explaining runs no kernel
        layer(*call, lengths=lengths)
    assert launched


def test_nothing_is_left_behind() -> None:
    layer = ActivationUnit(8, (4,), activation="dice", dropout=0.5)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = torch.get_rng_state()
    recattn.explain(layer)
    recattn.explain(layer, torch.randn(2, 8), torch.randn(2, 3, 8), lengths=torch.tensor([1, 3]))
    state_after = torch.get_rng_state()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    torch.set_rng_state(state)
    torch.randn(2, 8), torch.randn(2, 3, 8)
    assert torch.equal(torch.get_rng_state(), state_after)


def test_without_triton_a_gpu_runs_the_composite() -> None:
    printed = run_fresh(
        """
        import sys
        sys.modules["triton"] = None
        import torch
        import recattn
        (row,) = recattn.explain(recattn.nn.ActivationUnit(4), device="cuda")
        print(row.runs, "-", row.reason)
        """
    )
    assert printed == "composite - Triton cannot be imported"


def test_it_prints_as_a_table() -> None:
    text = str(recattn.explain(ActivationUnit(64), **BF16))
    header, short, long, *_ = text.splitlines()
    assert header.split() == ["path", "layer", "histories", "operator", "runs", "kernel", "because"]
    assert short.index("packed") == long.index("classic") == header.index("kernel")
    assert str(recattn.explain(nn.Linear(1, 1))) == "no layer that calls an operator of recattn"


def test_a_dtype_beside_a_call_and_a_function_without_one_are_refused() -> None:
    with pytest.raises(TypeError, match="dtype: expected None"):
        recattn.explain(ActivationUnit(4), torch.zeros(1, 4), dtype=torch.float16)
    with pytest.raises(TypeError, match="model: expected a torch"):
        recattn.explain(functional.activation_unit)
