"""activation_unit_statistics, against the formula in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from activation_unit_cases import HISTORIES, Case, variant
from activation_unit_statistics_cases import assert_statistics_within_budget, statistics
from recattn.kernels import settings

import recattn
from recattn import functional
from recattn.ops.activation_unit_statistics import forward_op

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives programs few enough rows that sequences of a test are cut, some more than once."""
    for table in (settings.FORWARD, settings.BACKWARD_TOKENS, settings.BACKWARD_WEIGHTS):
        for key, launch in table.items():
            monkeypatch.setitem(table, key, launch._replace(least_rows=24))


def check(case: Case, layer: int, backend: str = "torch") -> None:
    tensors = case.tensors()
    with recattn.backend(backend):
        got = statistics(functional.activation_unit_statistics, case, tensors, layer)
    assert_statistics_within_budget(case, layer, got, tensors)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_equal_the_formula_over_every_kind_of_history(
    lengths: list[int], layer: int, dtype: torch.dtype
) -> None:
    check(variant(lengths=lengths, dtype=dtype), layer)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
def test_kernels_equal_the_formula_over_every_kind_of_history(
    lengths: list[int], layer: int, precision: torch.dtype
) -> None:
    check(variant(lengths=lengths, dtype=precision), layer, "triton")


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("activation", ["dice", "prelu", "silu"])
def test_kernels_equal_the_formula_behind_every_layer(
    activation: str, layer: int, precision: torch.dtype
) -> None:
    case = variant(
        activation=activation, dropout=0.3, hidden=(12, 10, 6), lengths=[0, 40, 3], dtype=precision
    )
    check(case, layer, "triton")


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["sigmoid", "dice", "prelu", "leaky_relu"])
def test_statistics_equal_the_formula_behind_every_layer(activation: str, dropout: float, layer: int) -> None:
    check(variant(activation=activation, dropout=dropout, hidden=(12, 10, 6), lengths=[0, 40, 3]), layer)


@pytest.mark.parametrize(
    "data",
    [
        {"candidates": [2, 0, 3, 1, 0, 1, 2, 0, 4]},
        {"table": 50},
        {"table": 200, "unique_rows": True},
        {"table": 50, "candidates": [2, 0, 3, 1, 0, 1, 2, 0, 4]},
    ],
    ids=["candidates", "table", "rows", "candidates of a table"],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_candidates_and_rows_by_index(data: dict[str, Any], backend: str) -> None:
    check(variant(dropout=0.3, **data), 2, backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_variance_far_below_the_square_of_the_mean_keeps_its_digits(backend: str) -> None:
    case = variant(lengths=[500, 0, 700], slack=0)
    tensors = case.tensors()
    tensors["bias 0"] += 1000.0
    tensors["weight 0"] *= 0.1
    with recattn.backend(backend):
        got = statistics(functional.activation_unit_statistics, case, tensors, 1)
    assert_statistics_within_budget(case, 1, got, tensors)
    assert (got["mean"].square() / got["variance"]).min() > 1e5


def test_schema_fake_and_autograd_agree_with_the_implementation() -> None:
    case = variant(activation="dice", dropout=0.2)
    t = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    params = [t["alpha 0"], t["gate scale 0"], t["gate shift 0"]]
    weights, biases = [t["weight 0"], t["weight 1"]], [t["bias 0"], t["bias 1"]]
    seed = case.options()["seed"]
    data = (t["query"], t["keys"], case.offsets(), None, None, None, seed, weights, biases, params)
    checks = torch.library.opcheck(
        forward_op, (*data, False, False, list(case.features), "dice", 0.0, 0.2, "auto")
    )
    assert set(checks.values()) == {"SUCCESS"}


def test_gradients_are_those_of_finite_differences() -> None:
    case = variant(
        lengths=[0, 3, 1, 5], dim=4, hidden=(5, 4), slack=0, activation="dice", dtype=torch.float64
    )
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
    names = (
        "query",
        "keys",
        "weight 0",
        "weight 1",
        "bias 0",
        "bias 1",
        "alpha 0",
        "gate scale 0",
        "gate shift 0",
    )

    def function(*given: torch.Tensor) -> Any:
        query, keys, *layers = given
        return functional.activation_unit_statistics(
            query,
            keys,
            case.offsets(),
            layers[:2],
            layers[2:4],
            activation="dice",
            activation_params=[layers[4:]],
            dropout=0.3,
            seed=torch.tensor(7),
        )[:2]

    assert torch.autograd.gradcheck(function, [tensors[name] for name in names])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_statistics_and_gradients_are_bitwise_repeatable(backend: str) -> None:
    case = variant(lengths=[3, 150, 0, 20], activation="dice")
    with recattn.backend(backend):
        first, second = (
            statistics(functional.activation_unit_statistics, case, case.tensors(), 2) for _ in range(2)
        )
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_bad_input_is_named() -> None:
    case = variant()
    t = case.tensors()
    weights, biases = [t["weight 0"], t["weight 1"]], [t["bias 0"], t["bias 1"]]
    with pytest.raises(
        ValueError, match=re.escape("weights: expected at least one hidden layer, got 0 tensors")
    ):
        functional.activation_unit_statistics(t["query"], t["keys"], case.offsets(), [], [])
    weights, biases = [t["weight 0"], t["weight 1"]], [t["bias 0"], t["bias 1"]]
    with pytest.raises(
        ValueError, match=re.escape("activation_params: expected 1 (alpha, scale, shift) for dice")
    ):
        functional.activation_unit_statistics(
            t["query"], t["keys"], case.offsets(), weights, biases, activation="dice", activation_params=[]
        )
