"""Whatever wrong thing an argument is given, the error names the argument and says what was expected and what came.

Every argument of every operator is given every wrong value of its kind; layers and batches have a table.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn import Jagged, functional, nn
from recattn.data import Batch, random_batch

B, T, D, H = 2, 5, 4, 3
OFFSETS = torch.tensor([0, 2, 5])
OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(functional, name)
    for name in (
        "activation_unit",
        "activation_unit_statistics",
        "attentional_gru",
        "self_attention",
        "target_attention",
    )
}


def x(*shape: int) -> Tensor:
    return torch.ones(shape)


def arguments(operator: str) -> dict[str, Any]:
    """A call that is fine, with everything given that can be."""
    indices = {"query_offsets": torch.tensor([0, 1, 2]), "rows": torch.arange(T)}
    match operator:
        case "attentional_gru":
            parameters = {"weight_ih": x(3 * H, D), "weight_hh": x(3 * H, H), "bias_ih": x(3 * H)}
            parameters |= {"bias_hh": x(3 * H), "h0": x(B, H)}
            rows = {"rows": indices["rows"], "offsets": OFFSETS}
            return {"inputs": x(T, D), "scores": x(T), "kind": "augru"} | rows | parameters
        case "self_attention":
            bias = {"bias_table": x(3, 2), "bias_index": torch.arange(T)}
            return {"q": x(T, D), "k": x(T, D), "v": x(T, D), "offsets": OFFSETS, "num_heads": 2} | bias
        case "target_attention":
            items = {"keys": x(T, D), "values": x(T, D), "bias": x(T), "offsets": OFFSETS}
            return {"query": x(B, D), "num_heads": 2} | items | indices
    unit = {"query": x(B, D), "keys": x(T, D), "offsets": OFFSETS, "dropout": 0.2, "seed": torch.tensor([1])}
    unit |= {"weights": [x(H, 4 * D), x(1, H)], "biases": [x(H), x(1)]} | indices
    return unit | ({"values": x(T, D)} if operator == "activation_unit" else {})


def wrong(value: Any, optional: bool) -> Iterator[tuple[str, Any]]:
    """Of the same kind."""
    if not optional:
        yield "None", None
    match value:
        case Tensor():
            yield from {
                "a list": value.tolist(),
                "a number": 3.5,
                "bool": value.bool(),
                "int16": value.to(torch.int16),
                "complex": value.to(torch.complex64),
                "on another device": value.to("meta"),
                "sparse": value.to_sparse(),
                "of three dimensions": x(2, 2, 2).to(value.dtype),
            }.items()
            if value.is_floating_point():
                yield "float64", value.double()
                yield "float8", value.to(torch.float8_e5m2)
            if value.numel() != 1:
                yield "without dimension", value.flatten()[0]
        case list():
            yield from {"a tensor": value[0], "a string": "ab", "None in it": [None, *value[1:]]}.items()
            yield from {"one short": value[:-1], "float64 in it": [value[0].double(), *value[1:]]}.items()
        case bool():
            yield from {"a string": "yes", "a tensor": torch.ones(3), "a number": 1}.items()
        case int() | float():
            yield from {"a string": "1", "nan": float("nan"), "a list": [1], "-1": -1}.items()
            yield "a tensor", torch.ones(2)
        case str():
            yield from {"another": "nonsense", "a number": 3}.items()
        case tuple():
            yield from {"a string": "q", "a number": 3, "numbers": (1, 2), "nothing": ()}.items()


# What a value like -1 is wrong for, and what is not covered by a value of its kind.
FINE = {("scale", "-1")}


def rows() -> Iterator[tuple[str, str, str, Any]]:
    for operator, function in OPERATORS.items():
        given = arguments(operator)
        for name, parameter in inspect.signature(function).parameters.items():
            value = given.get(name, parameter.default)
            if name == "scale":
                value = 1.0
            for label, bad in wrong(value, parameter.default is None or (name == "scores")):
                if (name, label) not in FINE:
                    yield operator, name, label, bad


ROWS = list(rows())


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_calls_that_the_changes_start_from_are_fine(operator: str) -> None:
    OPERATORS[operator](**arguments(operator))


def test_every_argument_is_tried() -> None:
    tried = {(operator, name) for operator, name, *_ in ROWS}
    given = {
        (operator, name) for operator, f in OPERATORS.items() for name in inspect.signature(f).parameters
    }
    assert given - tried == {
        ("activation_unit", "activation_params"),  # which depend on the activation: test_functional_errors.py
        ("activation_unit_statistics", "activation_params"),
    }


@pytest.mark.parametrize(
    ("operator", "name", "bad"),
    [(operator, name, bad) for operator, name, _, bad in ROWS],
    ids=[f"{operator} {name} {label}" for operator, name, label, _ in ROWS],
)
def test_a_wrong_value_is_named(operator: str, name: str, bad: Any) -> None:
    """Where two disagree, either may be."""
    names = "|".join(inspect.signature(OPERATORS[operator]).parameters)
    with pytest.raises((TypeError, ValueError)) as error:
        OPERATORS[operator](**arguments(operator) | {name: bad})
    message = str(error.value)
    assert re.match(rf"({names})(\[\d+\])*: expected .*, got ", message), message


# ---------------------------------------------------------------- layers

JAGGED, PADDED, LENGTHS = Jagged(x(T, D), OFFSETS), x(B, 4, D), torch.tensor([2, 3])
UNIT, TARGET = nn.ActivationUnit(D, (3, 2)), nn.TargetAttention(D)
SELF, GRU = nn.SelfAttention(D, 2), nn.AttentionalGRU(D, H)
PLAIN_GRU = nn.AttentionalGRU(D, H, kind="gru")
QUERY = x(B, D)

POOLED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no query": ((None, JAGGED), {}, "query: expected a tensor, got NoneType"),
    "query of another width": ((x(B, D + 1), JAGGED), {}, "query: expected shape"),
    "query of another batch": ((x(B + 1, D), JAGGED), {}, "query: expected shape"),
    "query of another dtype": ((QUERY.double(), JAGGED), {}, "query: expected torch.float32"),
    "no keys": ((QUERY, None), {}, "keys: expected a Jagged or a tensor, got NoneType"),
    "flat keys": ((QUERY, x(T, D)), {"lengths": LENGTHS}, "keys: expected [B, L, D], got [5, 4]"),
    "lengths and mask": (
        (QUERY, PADDED),
        {"lengths": LENGTHS, "mask": x(B, 4) > 0},
        "lengths, mask: expected",
    ),
    "neither": ((QUERY, PADDED), {}, "lengths, mask: expected exactly one"),
    "lengths of Jagged": ((QUERY, JAGGED), {"lengths": LENGTHS}, "lengths, mask: expected None"),
    "float lengths": ((QUERY, PADDED), {"lengths": LENGTHS.float()}, "lengths: expected integers"),
    "list of lengths": (
        (QUERY, PADDED),
        {"lengths": [2, 3]},
        "lengths: expected a tensor of integers, got list",
    ),
    "lengths elsewhere": ((QUERY, PADDED), {"lengths": LENGTHS.to("meta")}, "lengths: expected device cpu"),
    "list as mask": ((QUERY, PADDED), {"mask": [1]}, "mask: expected a tensor, got list"),
    "mask elsewhere": ((QUERY, PADDED), {"mask": (x(B, 4) > 0).to("meta")}, "mask: expected device cpu"),
    "mask of another shape": ((QUERY, PADDED), {"mask": x(B, 5) > 0}, "mask: expected (2, 4), got (2, 5)"),
    "list of values": ((QUERY, JAGGED), {"values": [1]}, "values: expected a Jagged or a tensor, got list"),
    "values of another length": (
        (QUERY, PADDED),
        {"lengths": LENGTHS, "values": x(B, 5, D)},
        "values: expected [2, 4, Dv], as the keys, got [2, 5, 4]",
    ),
    "list of query_offsets": (
        (QUERY, JAGGED),
        {"query_offsets": [0, 1, 2]},
        "query_offsets: expected a tensor",
    ),
}
LAYERS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    *((layer, *row) for layer in (UNIT, TARGET) for row in POOLED.values()),
    (SELF, (None,), {}, "x: expected a Jagged or a tensor, got NoneType"),
    (SELF, (x(T, D),), {"lengths": LENGTHS}, "x: expected [B, L, 4], got [5, 4]"),
    (SELF, (Jagged(x(T, D).double(), OFFSETS),), {}, "x: expected torch.float32, as the parameters, got"),
    (SELF, (JAGGED.to("meta"),), {}, "x: expected device cpu, as the parameters, got meta"),
    (GRU, (None,), {}, "items: expected a Jagged or a tensor, got NoneType"),
    (GRU, (JAGGED,), {}, "scores: expected a tensor for 'augru', got NoneType"),
    (GRU, (JAGGED, x(T)), {}, "scores: expected Jagged, as the items, got Tensor"),
    (GRU, (PADDED, x(B, 5)), {"lengths": LENGTHS}, "scores: expected [2, 4], as the items, got [2, 5]"),
    (PLAIN_GRU, (x(T, D),), {"lengths": LENGTHS}, "items: expected [B, L, D], got [5, 4]"),
    (PLAIN_GRU, (JAGGED,), {"h0": x(B + 1, H)}, "h0: expected shape [2, 3], got [3, 3]"),
    (nn.ActivationUnit, (D,), {"features": ("x",)}, "features: expected one of q, k, q-k, q*k, got 'x'"),
    (nn.ActivationUnit, (D,), {"scale": float("nan")}, "scale: expected a finite number, got nan"),
    (nn.ActivationUnit, (D,), {"dropout": 1.0}, "dropout: expected a probability below 1, got 1.0"),
    (nn.TargetAttention, (D,), {"num_heads": 3}, "dim, num_heads: expected a positive multiple"),
    (nn.TargetAttention, (D,), {"score": "cosine"}, "score: expected one of dot, scaled_dot"),
    (nn.SelfAttention, (D,), {"buckets": -1}, "buckets: expected at least 0, got -1"),
    (nn.SelfAttention, (D,), {"dropout": -0.1}, "dropout: expected a probability below 1, got -0.1"),
    (nn.AttentionalGRU, (D, 0), {}, "input_size, hidden_size: expected positive widths, got 4 and 0"),
    (Jagged, ([1], OFFSETS), {}, "values: expected a tensor, got list"),
    (Jagged, (x(T), [0, 5]), {}, "offsets: expected a tensor, got list"),
    (Jagged.from_padded, ([[1]],), {"lengths": LENGTHS}, "padded: expected a tensor, got list"),
]


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row[3].partition(",")[0])
def test_layers_name_what_is_wrong(row: tuple[Callable[..., Any], Any, Any, str]) -> None:
    call, args, kwargs, message = row
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        call(*args, **kwargs)


@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("user", None, "user: expected a Tensor, got NoneType"),
        ("item", [1, 2], "item: expected a Tensor, got list"),
        ("category", torch.tensor([1]), "category: expected [2], got [1]"),
        ("history", torch.arange(5), "history: expected a Jagged, got Tensor"),
        ("history_category", torch.arange(5), "history_category: expected a Jagged, got Tensor"),
        ("label", LENGTHS.to("meta"), "label: expected device cpu, as the history, got meta"),
        ("timestamp", 3, "timestamp: expected a Tensor, got int"),
        ("history_liked", Jagged(x(5, 2), OFFSETS), "history_liked: expected values [5], as the history"),
    ],
)
def test_batches_name_what_is_wrong(column: str, bad: Any, message: str) -> None:
    columns = vars(random_batch(LENGTHS, num_users=3, num_items=5, num_categories=2))
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        Batch(**columns | {column: bad})


def test_offsets_that_decrease_read_no_memory_that_is_not_there() -> None:
    """Contents are not checked by default, but this one would have brought the process down."""
    with pytest.raises(ValueError, match=r"offsets: expected non-decreasing values, got \[0, 5, 2\]"):
        functional.self_attention(x(T, D), x(T, D), x(T, D), torch.tensor([0, 5, 2]))
