"""What Jagged says to bad input: the argument, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from recattn import Jagged


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2], "offsets: expected the first to be 0, got 1"),
        ([0, 2, 1, 3], "offsets: expected non-decreasing values, got 2 then 1 at index 1"),
        ([0, 2, 5], "offsets: expected the last to be at most 4 (the rows of values), got 5"),
    ],
)
def test_validate_reads_the_offsets(offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Jagged(torch.randn(4, 3), torch.tensor(offsets)).validate()


V = torch.randn(4, 3)
P = torch.randn(2, 3, 3)
NESTED = torch.nested.nested_tensor([V, V[:1]], layout=torch.jagged)
KEYED = SimpleNamespace(keys=lambda: ["clicks", "carts"])
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "scalar values": (
        lambda: Jagged(torch.tensor(1.0), torch.tensor([0])),
        ValueError,
        "values: expected at least one dimension [T, ...], got a scalar",
    ),
    "float offsets": (
        lambda: Jagged(V, torch.tensor([0.0, 4.0])),
        TypeError,
        "offsets: expected int32 or int64, got torch.float32",
    ),
    "short offsets dtype": (
        lambda: Jagged(V, torch.tensor([0, 4], dtype=torch.int16)),
        TypeError,
        "offsets: expected int32 or int64, got torch.int16",
    ),
    "no offsets": (
        lambda: Jagged(V, torch.tensor([], dtype=torch.int64)),
        ValueError,
        "offsets: expected [B + 1] with at least one element, got (0,)",
    ),
    "square offsets": (
        lambda: Jagged(V, torch.tensor([[0, 4]])),
        ValueError,
        "offsets: expected [B + 1] with at least one element, got (1, 2)",
    ),
    "offsets elsewhere": (
        lambda: Jagged(V, torch.tensor([0, 4], device="meta")),
        ValueError,
        "offsets: expected device cpu, as the values, got meta",
    ),
    "float lengths": (
        lambda: Jagged.from_lengths(V, torch.tensor([4.0])),
        TypeError,
        "lengths: expected integers, got torch.float32",
    ),
    "square lengths": (
        lambda: Jagged.from_lengths(V, torch.tensor([[4]])),
        ValueError,
        "lengths: expected 1 dimension(s), got (1, 1)",
    ),
    "flat padded": (
        lambda: Jagged.from_padded(V[:, 0], lengths=torch.tensor([1])),
        ValueError,
        "padded: expected [B, L, ...], got (4,)",
    ),
    "neither lengths nor mask": (
        lambda: Jagged.from_padded(P),
        ValueError,
        "lengths, mask: expected exactly one of the two",
    ),
    "lengths and mask": (
        lambda: Jagged.from_padded(P, lengths=torch.tensor([1, 2]), mask=torch.ones(2, 3).bool()),
        ValueError,
        "lengths, mask: expected exactly one of the two",
    ),
    "lengths of another batch": (
        lambda: Jagged.from_padded(P, lengths=torch.tensor([1])),
        ValueError,
        "lengths: expected (2,), got (1,)",
    ),
    "bool lengths": (
        lambda: Jagged.from_padded(P, lengths=torch.tensor([True, False])),
        TypeError,
        "lengths: expected integers, got torch.bool",
    ),
    "float mask": (
        lambda: Jagged.from_padded(P, mask=torch.ones(2, 3)),
        TypeError,
        "mask: expected bool or integers, got torch.float32",
    ),
    "mask of another shape": (
        lambda: Jagged.from_padded(P, mask=torch.ones(2, 4).bool()),
        ValueError,
        "mask: expected (2, 3), got (2, 4)",
    ),
    "not nested": (
        lambda: Jagged.from_nested(V),
        TypeError,
        "nested: expected a nested tensor of layout torch.jagged, got Tensor of layout torch.strided",
    ),
    "ragged elsewhere": (
        lambda: Jagged.from_nested(NESTED.transpose(1, 2)),
        ValueError,
        "nested: expected dimension 1 to be the ragged one",
    ),
    "no key": (
        lambda: Jagged.from_torchrec(KEYED),
        ValueError,
        "key: expected one of ['clicks', 'carts'], got None",
    ),
    "unknown key": (
        lambda: Jagged.from_torchrec(KEYED, "views"),
        ValueError,
        "key: expected one of ['clicks', 'carts'], got 'views'",
    ),
    "no torchrec tensor": (
        lambda: Jagged.from_torchrec(3),
        TypeError,
        "tensor: expected a JaggedTensor or KeyedJaggedTensor, got int",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument_what_was_expected_and_what_came(case: str) -> None:
    call, exception, message = BAD[case]
    with pytest.raises(exception, match=re.escape(message)):
        call()
