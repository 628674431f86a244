"""What functional.target_attention says to bad input: the argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn import functional

B, T, H, D, DV = 2, 5, 2, 3, 4


def arguments() -> dict[str, Any]:
    """A call that is fine."""
    return {
        "query": torch.randn(B, H * D),
        "keys": torch.randn(T, H * D),
        "values": torch.randn(T, H * DV),
        "offsets": torch.tensor([0, 2, 5]),
        "num_heads": H,
    }


def call(changes: dict[str, Any]) -> Any:
    return functional.target_attention(**arguments() | changes)


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


F64, I16 = torch.float64, torch.int16
# what is changed, what is raised, what it says
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": None}, TypeError, "query: expected a tensor, got NoneType"),
    ({"query": x(B + 1, 6)}, ValueError, "query: expected shape [2, 6], got [3, 6]"),
    ({"query": x(B, 5)}, ValueError, "query: expected shape [2, 6], got [2, 5]"),
    (
        {"query": x(B, 6, dtype=F64)},
        TypeError,
        "query: expected torch.float32, as the keys, got torch.float64",
    ),
    ({"query": x(B, 6, device="meta")}, ValueError, "query: expected device cpu, as the keys, got meta"),
    ({"keys": x(T)}, ValueError, "keys: expected shape [T, H·d], got [5]"),
    ({"keys": x(T, 6, dtype=torch.int64)}, TypeError, "keys: expected one of torch.float16"),
    ({"values": x(T + 1, 8)}, ValueError, "values: expected shape [5, H·dv], got [6, 8]"),
    (
        {"values": x(T, 7)},
        ValueError,
        "values: expected a width that is a positive multiple of num_heads=2, got [5, 7]",
    ),
    (
        {"keys": x(T, 5), "query": x(B, 5)},
        ValueError,
        "keys: expected a width that is a positive multiple of num_heads=2, got [5, 5]",
    ),
    ({"offsets": [0, 2, 5]}, TypeError, "offsets: expected a tensor, got list"),
    ({"offsets": x(3, dtype=I16)}, TypeError, "offsets: expected int32 or int64, got torch.int16"),
    ({"num_heads": 2.0}, TypeError, "num_heads: expected an int, got float"),
    ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
    ({"bias": x(T + 1)}, ValueError, "bias: expected shape [5] or [5, 2], got [6]"),
    ({"bias": x(T, 3)}, ValueError, "bias: expected shape [5] or [5, 2], got [5, 3]"),
    (
        {"bias": x(T, dtype=F64)},
        TypeError,
        "bias: expected torch.float32 or torch.float32, as the keys, got torch.float64",
    ),
    ({"bias": x(T, device="meta")}, ValueError, "bias: expected device cpu, as the keys, got meta"),
    (
        {"query_offsets": torch.tensor([0, 2])},
        ValueError,
        "query_offsets: expected shape [3], as the offsets, got [2]",
    ),
    (
        {"query_offsets": x(3)},
        TypeError,
        "query_offsets: expected int32 or int64, got torch.float32",
    ),
    ({"rows": x(T)}, TypeError, "rows: expected int32 or int64, got torch.float32"),
    ({"rows": torch.ones(T, 1, dtype=torch.int64)}, ValueError, "rows: expected shape [T], got [5, 1]"),
    (
        {"normalize": "l2"},
        ValueError,
        "normalize: expected one of softmax, none, exp, sigmoid, got 'l2'",
    ),
    (
        {"normalize": "none", "return_lse": True},
        ValueError,
        "return_lse: expected normalize='softmax', got 'none'",
    ),
]


def test_the_call_that_the_changes_start_from_is_fine() -> None:
    assert call({}).shape == (B, H * DV)


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[2].split(",")[0])
def test_bad_input_names_the_argument_what_was_expected_and_what_came(
    row: tuple[dict[str, Any], type[Exception], str],
) -> None:
    changes, exception, message = row
    with pytest.raises(exception, match=re.escape(message)):
        call(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": torch.tensor([0, 2, 6])}, "offsets: expected the last to be at most 5"),
        ({"query_offsets": torch.tensor([0, 2, 1])}, "offsets: expected non-decreasing values, got 2 then 1"),
        ({"rows": torch.tensor([0, 1, 9, 0, 0])}, "rows: expected indices of the 5 rows of keys, got 9"),
    ],
)
def test_the_contents_of_indices_are_read_only_if_asked(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional.checks, "VALIDATE", True)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(changes)
