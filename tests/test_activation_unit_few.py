"""activation_unit of few rows on the CPU keeps its hidden units, and takes few calls; it is chosen by shapes alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from activation_unit_cases import assert_within_budget, call, variant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recattn import functional
from recattn.composite import activation_unit as many
from recattn.composite import activation_unit_few as few

LENGTHS = [0, 3, 40, 0, 1, 70, 5, 0]


@pytest.fixture(params=[8, 1000], ids=["blocks of 8 rows", "one block"])
def _block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "BLOCK_BYTES", request.param * 4 * (9 + 8 + 7))


@pytest.fixture
def _few_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way raises."""

    def unexpected(*_: Any) -> Any:
        raise AssertionError("the composite of many rows was called")

    monkeypatch.setattr(many, "forward", unexpected)
    monkeypatch.setattr(many, "backward", unexpected)


class Calls(TorchDispatchMode):
    """Counts operators of aten, and the bytes of what activation_unit's forward gives its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.aten, self.kept = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.aten += func.namespace == "aten"
        if func is torch.ops.recattn.activation_unit.default:
            self.kept = sum(kept.nbytes for kept in result[-1])
        return result


def network(dim: int, *hidden: int) -> tuple[list[Tensor], list[Tensor]]:
    sizes = [4 * dim, *hidden, 1]
    weights = [torch.randn(m, n, requires_grad=True) for n, m in zip(sizes, sizes[1:], strict=False)]
    return weights, [torch.randn(m, requires_grad=True) for m in sizes[1:]]


def kept_bytes(rows: int, grad: bool = True, **options: Any) -> int:
    """What a call of a history of so many rows keeps, with hidden units (80, 40)."""
    weights, biases = network(4, 80, 40)
    offsets = torch.tensor([0, rows])
    with Calls() as calls, nullcontext() if grad else torch.no_grad():
        functional.activation_unit(
            torch.randn(1, 4), torch.randn(rows, 4), offsets, weights, biases, **options
        )
    return calls.kept


@pytest.mark.usefixtures("_few_alone", "_block_rows", "poisoned_memory")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_scores": True, "value_dim": 5},
        {"activation": "dice", "normalize": "sigmoid"},
        {"activation": "prelu", "normalize": "exp", "return_scores": True},
        {"activation": "gelu", "normalize": "none", "scale": 1.0},
        {"table": 400, "unique_rows": True, "value_dim": 7},
        {"table": 50, "sparse_grad": True},
        {"offsets_dtype": torch.int32},
        {"features": ("q*k",)},
        {"lengths": []},
        {"lengths": [0, 0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_and_gradients_are_within_the_error_of_eager_code(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    case = variant(**{"lengths": LENGTHS, "hidden": (9, 8, 7), "dtype": dtype, **options})
    tensors = case.tensors()
    assert_within_budget(case, call(functional.activation_unit, case, tensors), tensors)


def test_hidden_units_are_kept_up_to_a_size() -> None:
    most = few.KEPT_BYTES // (4 * 120)
    assert kept_bytes(most) == most * 4 * (120 + 1)  # and the attention
    assert kept_bytes(most + 1) == 0


@pytest.mark.parametrize(
    "options", [{"grad": False}, {"dropout": 0.1}, {"query_offsets": torch.tensor([0, 1])}], ids=str
)
def test_nothing_is_kept_without_need(options: dict[str, Any]) -> None:
    assert kept_bytes(10, **options) == 0


def test_a_compiled_graph_keeps_nothing_and_gives_the_same() -> None:
    weights, biases = network(4, 6, 5)
    keys, offsets = torch.randn(9, 4), torch.tensor([0, 4, 9])
    query = torch.randn(2, 4, requires_grad=True)

    def run(query: Tensor) -> Tensor:
        return functional.activation_unit(query, keys, offsets, weights, biases)

    leaves = [query, *weights, *biases]
    expected = torch.autograd.grad(run(query).sum(), leaves)
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node for node in graph.graph.nodes if "activation_unit" in str(node.target))
        return graph

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    out = compiled(query)
    assert [node.args[-1] for node in seen] == [False]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), expected)


def test_a_small_call_takes_few_operators() -> None:
    """A training step of a call of few rows, whose time these are."""
    weights, biases = network(4, 6, 5)
    query, keys = torch.randn(2, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with Calls() as calls:
        out = functional.activation_unit(query, keys, torch.tensor([0, 4, 9]), weights, biases)
        forward = calls.aten
        out.sum().backward()
    assert forward <= 60
    assert calls.aten - forward <= 90
