"""What functional.activation_unit says to bad input: the argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from recattn import functional

B, T, D, H1, H2 = 2, 5, 3, 4, 2


def arguments() -> dict[str, Any]:
    """A call that is fine."""
    return {
        "query": torch.randn(B, D),
        "keys": torch.randn(T, D),
        "offsets": torch.tensor([0, 2, 5]),
        "weights": [torch.randn(H1, 4 * D), torch.randn(H2, H1), torch.randn(1, H2)],
        "biases": [torch.randn(H1), torch.randn(H2), torch.randn(1)],
    }


def call(changes: dict[str, Any]) -> Any:
    """The call with arguments replaced; `weights[1]` replaces the second of the weights."""
    merged = arguments()
    for name, value in changes.items():
        if name.endswith("]"):
            name, index = name[:-1].split("[")
            merged[name][int(index)] = value
        else:
            merged[name] = value
    return functional.activation_unit(**merged)


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


F64 = torch.float64
# what is changed, what is raised, what it says
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    # query
    ({"query": [[1.0] * D] * B}, TypeError, "query: expected a tensor, got list"),
    ({"query": x(B, 1, D)}, ValueError, "query: expected shape [2, 3], got [2, 1, 3]"),
    ({"query": x(B + 1, D)}, ValueError, "query: expected shape [2, 3], got [3, 3]"),
    ({"query": x(B, D + 1)}, ValueError, "query: expected shape [2, 3], got [2, 4]"),
    (
        {"query": x(B, D, dtype=F64)},
        TypeError,
        "query: expected torch.float32, as the keys, got torch.float64",
    ),
    ({"query": x(B, D, device="meta")}, ValueError, "query: expected device cpu, as the keys, got meta"),
    # keys
    ({"keys": None}, TypeError, "keys: expected a tensor, got NoneType"),
    ({"keys": x(T)}, ValueError, "keys: expected shape [T, D], got [5]"),
    ({"keys": x(B, T, D)}, ValueError, "keys: expected shape [T, D], got [2, 5, 3]"),
    ({"keys": x(T, 0)}, ValueError, "keys: expected a width of at least 1, got [5, 0]"),
    (
        {"keys": x(T, D, dtype=torch.int64)},
        TypeError,
        "keys: expected one of torch.float16, torch.bfloat16, torch.float32, torch.float64, got torch.int64",
    ),
    # offsets
    ({"offsets": [0, 2, 5]}, TypeError, "offsets: expected a tensor, got list"),
    (
        {"offsets": torch.tensor([0.0, 2.0, 5.0])},
        TypeError,
        "offsets: expected int32 or int64, got torch.float32",
    ),
    (
        {"offsets": torch.tensor(0)},
        ValueError,
        "offsets: expected [B + 1] with at least one element, got ()",
    ),
    (
        {"offsets": torch.tensor([0, 2, 5], device="meta")},
        ValueError,
        "offsets: expected device cpu, as the values, got meta",
    ),
    # values
    ({"values": x(T - 1, D)}, ValueError, "values: expected shape [5, Dv], got [4, 3]"),
    ({"values": x(T)}, ValueError, "values: expected shape [5, Dv], got [5]"),
    (
        {"values": x(T, D, dtype=F64)},
        TypeError,
        "values: expected torch.float32, as the keys, got torch.float64",
    ),
    # weights and biases
    (
        {"weights": [], "biases": []},
        ValueError,
        "weights: expected at least one hidden layer and the last, got 0 tensor(s)",
    ),
    (
        {"weights": [x(1, 4 * D)], "biases": [x(1)]},
        ValueError,
        "weights: expected at least one hidden layer and the last, got 1 tensor(s)",
    ),
    ({"biases": [x(H1)]}, ValueError, "biases: expected 3 tensors, one per weight, got 1"),
    ({"weights[0]": x(H1, 3 * D)}, ValueError, "weights[0]: expected shape [H, 12], got [4, 9]"),
    ({"weights[1]": x(H2, H1 + 1)}, ValueError, "weights[1]: expected shape [H, 4], got [2, 5]"),
    ({"weights[2]": x(2, H2)}, ValueError, "weights[2]: expected shape [1, 2], got [2, 2]"),
    ({"weights[1]": None}, TypeError, "weights[1]: expected a tensor, got NoneType"),
    (
        {"weights[1]": x(H2, H1, dtype=F64)},
        TypeError,
        "weights[1]: expected torch.float32, as the keys, got torch.float64",
    ),
    (
        {"weights[1]": x(H2, H1, device="meta")},
        ValueError,
        "weights[1]: expected device cpu, as the keys, got meta",
    ),
    ({"biases[0]": x(H1 + 1)}, ValueError, "biases[0]: expected shape [4], got [5]"),
    ({"biases[2]": x(1, 1)}, ValueError, "biases[2]: expected shape [1], got [1, 1]"),
    ({"biases[1]": None}, TypeError, "biases[1]: expected a tensor, got NoneType"),
    # dice and dropout
    (
        {"activation": "dice"},
        ValueError,
        "activation_params: expected 2 (alpha, scale, shift) for dice, one per hidden layer, got None",
    ),
    (
        {"activation": "dice", "activation_params": [x(H1), x(H2)]},
        ValueError,
        "activation_params[0]: expected (alpha, scale, shift), got Tensor",
    ),
    (
        {"activation": "dice", "activation_params": [[x(H1)] * 3, [x(H2)] * 2]},
        ValueError,
        "activation_params[1]: expected (alpha, scale, shift), got 2",
    ),
    (
        {"activation": "dice", "activation_params": [[x(H1)] * 3, [x(H2), x(H1), x(1)]]},
        ValueError,
        "activation_params[1][1]: expected shape [2], got [4]",
    ),
    ({"dropout": 1.0}, ValueError, "dropout: expected a probability below 1, got 1.0"),
    ({"dropout": "0.1"}, ValueError, "dropout: expected a probability below 1, got '0.1'"),
    ({"dropout": 0.1, "seed": 7}, TypeError, "seed: expected a tensor, got int"),
    ({"dropout": 0.1, "seed": x(1)}, TypeError, "seed: expected torch.int64, got torch.float32"),
    (
        {"dropout": 0.1, "seed": torch.tensor([1, 2])},
        ValueError,
        "seed: expected one element, got [2]",
    ),
    # options
    ({"features": "q"}, ValueError, "features: expected distinct names out of q, k, q-k, q*k, got 'q'"),
    ({"features": []}, ValueError, "features: expected distinct names out of q, k, q-k, q*k, got []"),
    ({"features": ["k", "k"]}, ValueError, "features: expected distinct names out of q, k, q-k, q*k, got"),
    ({"features": ["q", "k+q"]}, ValueError, "features: expected one of q, k, q-k, q*k, got 'k+q'"),
    ({"features": ["k", "q*k"]}, ValueError, "weights[0]: expected shape [H, 6], got [4, 12]"),
    (
        {"activation": "swish"},
        ValueError,
        "activation: expected one of sigmoid, relu, leaky_relu, prelu, silu, gelu, tanh, identity,"
        " dice, got 'swish'",
    ),
    ({"normalize": "sum"}, ValueError, "normalize: expected one of softmax, none, exp, sigmoid, got 'sum'"),
    # activation_params
    (
        {"activation_params": 0.1},
        ValueError,
        "activation_params: expected None for sigmoid, got float",
    ),
    (
        {"activation": "leaky_relu", "activation_params": [x(1), x(1)]},
        TypeError,
        "activation_params: expected a float for leaky_relu, got list",
    ),
    (
        {"activation": "prelu"},
        ValueError,
        "activation_params: expected 2 slopes for prelu, one per hidden layer, got None",
    ),
    (
        {"activation": "prelu", "activation_params": 0.25},
        ValueError,
        "activation_params: expected 2 slopes for prelu, one per hidden layer, got 0.25",
    ),
    (
        {"activation": "prelu", "activation_params": [x(1)]},
        ValueError,
        "activation_params: expected 2 slopes for prelu, one per hidden layer, got 1",
    ),
    (
        {"activation": "prelu", "activation_params": [x(1), x(3)]},
        ValueError,
        "activation_params[1]: expected shape [2], got [3]",
    ),
    (
        {"activation": "prelu", "activation_params": [x(1, 1), x(1)]},
        ValueError,
        "activation_params[0]: expected shape [1], got [1, 1]",
    ),
    (
        {"activation": "prelu", "activation_params": [x(H1), x(H2, dtype=F64)]},
        TypeError,
        "activation_params[1]: expected torch.float32, as the keys, got torch.float64",
    ),
    (
        {"activation": "prelu", "activation_params": [0.25, 0.25]},
        TypeError,
        "activation_params[0]: expected a tensor, got float",
    ),
]


def label(row: tuple[dict[str, Any], type[Exception], str]) -> str:
    return row[2].split(",")[0]


def test_the_call_that_the_changes_start_from_is_fine() -> None:
    assert call({}).shape == (B, D)


@pytest.mark.parametrize("row", BAD, ids=label)
def test_bad_input_names_the_argument_what_was_expected_and_what_came(
    row: tuple[dict[str, Any], type[Exception], str],
) -> None:
    changes, exception, message = row
    with pytest.raises(exception, match=re.escape(message)):
        call(changes)


def test_the_contents_of_offsets_are_read_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.checks, "VALIDATE", True)
    with pytest.raises(ValueError, match=re.escape("offsets: expected the last to be at most 5")):
        call({"offsets": torch.tensor([0, 2, 6])})
