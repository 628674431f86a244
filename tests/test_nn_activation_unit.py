"""nn.ActivationUnit: one result whatever the layout of the histories, and the same from its eager twin."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recattn import Jagged
from recattn.functional import ACTIVATIONS
from recattn.nn import ActivationUnit, Twin

BATCH, LONGEST, WIDTH = 5, 4, 3
LENGTHS = torch.tensor([2, 0, 4, 1, 3])
VALID = torch.arange(LONGEST) < LENGTHS[:, None]
HOLES = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1]]).bool()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def unit(**options: Any) -> ActivationUnit:
    layer = ActivationUnit(WIDTH, (4, 2), dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def batch(mask: Tensor = VALID) -> tuple[Tensor, Tensor]:
    """The query, and padded keys with NaN wherever nothing counts."""
    padded = torch.randn(BATCH, LONGEST, WIDTH, dtype=torch.float64)
    return torch.randn(BATCH, WIDTH, dtype=torch.float64), padded.masked_fill(~mask[..., None], torch.nan)


def nested(x: Jagged) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(x.values, x.offsets)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("mask", [VALID, HOLES], ids=["right padding", "holes"])
@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_every_layout_gives_the_same_output_and_gradients(implementation: str, mask: Tensor) -> None:
    layer = unit().use(implementation)
    query, padded = batch(mask)
    results = []
    for layout in ("jagged", "slack", "nested", "mask", "lengths"):
        keys = padded.clone().requires_grad_()
        history = Jagged.from_padded(keys, mask=mask)
        if layout == "jagged":
            out = layer(query, history)
        elif layout == "slack":
            out = layer(query, Jagged.from_padded(keys, mask=mask, total=history.values.shape[0] + 3))
        elif layout == "nested":
            out = layer(query, nested(history))
        elif layout == "mask":
            out = layer(query, keys, mask=mask)
        else:
            out = layer(query, history.to_padded(LONGEST), lengths=mask.sum(1))
        parameters = list(layer.parameters())
        results.append([out, *torch.autograd.grad(out.square().sum(), [keys, *parameters])])
    for result in results[1:]:
        assert_close(result, results[0])
    assert results[0][1][~mask].eq(0).all()


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_scores_come_in_the_layout_of_the_keys(implementation: str, normalize: str) -> None:
    layer = unit(normalize=normalize).use(implementation)
    query, padded = batch(HOLES)
    history = Jagged.from_padded(padded, mask=HOLES)
    _, of_jagged = layer(query, history, return_scores=True)
    assert isinstance(of_jagged, Jagged)
    assert of_jagged.offsets is history.offsets
    assert of_jagged.values.shape == history.values.shape[:1]
    _, of_nested = layer(query, nested(history), return_scores=True)
    assert of_nested.is_nested
    assert_close(of_nested.values(), of_jagged.values)
    _, of_mask = layer(query, padded, mask=HOLES, return_scores=True)
    assert of_mask.shape == (BATCH, LONGEST)
    assert_close(of_mask[HOLES], of_jagged.values)
    assert of_mask[~HOLES].eq(0).all()
    _, of_lengths = layer(query, history.to_padded(LONGEST), lengths=history.lengths, return_scores=True)
    assert_close(Jagged.from_padded(of_lengths, lengths=history.lengths).values, of_jagged.values)
    assert of_lengths[torch.arange(LONGEST) >= history.lengths[:, None]].eq(0).all()
    if normalize == "softmax":
        assert_close(of_mask.sum(1), HOLES.any(1).double())


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_scores_of_slack_are_zero(implementation: str) -> None:
    layer = unit().use(implementation)
    query, padded = batch()
    history = Jagged.from_padded(padded, mask=VALID, total=BATCH * LONGEST)
    _, scores = layer(query, history, return_scores=True)
    assert scores.values[: int(LENGTHS.sum())].gt(0).all()
    assert scores.values[int(LENGTHS.sum()) :].eq(0).all()


@pytest.mark.parametrize("layout", ["jagged", "nested", "mask"])
def test_values_of_another_width_are_pooled_instead_of_the_keys(layout: str) -> None:
    layer = unit()
    query, padded = batch(HOLES)
    padded_values = torch.randn(BATCH, LONGEST, 7, dtype=torch.float64)
    keys, values = (Jagged.from_padded(x, mask=HOLES) for x in (padded, padded_values))
    _, attention = layer(query, padded, mask=HOLES, return_scores=True)
    if layout == "jagged":
        out = layer(query, keys, values=values)
    elif layout == "nested":
        out = layer(query, nested(keys), values=nested(values))
    else:
        out = layer(query, padded, mask=HOLES, values=padded_values)
    assert out.shape == (BATCH, 7)
    assert_close(out, torch.einsum("bl,bld->bd", attention, padded_values))


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("lengths", [[0, 0, 0], []])
def test_batches_without_any_item_pool_to_zero_and_have_gradients(
    lengths: list[int], implementation: str
) -> None:
    layer = unit().use(implementation)
    rows = len(lengths)
    query = torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(rows, LONGEST, WIDTH, dtype=torch.float64)
    out, attention = layer(query, keys, lengths=torch.tensor(lengths, dtype=torch.int64), return_scores=True)
    assert out.shape == (rows, WIDTH)
    assert attention.shape == (rows, LONGEST)
    assert out.eq(0).all()
    assert attention.eq(0).all()
    (out.sum() + attention.sum()).backward()
    assert query.grad is not None
    assert query.grad.eq(0).all()
    attention = layer(query, keys, lengths=torch.tensor(lengths, dtype=torch.int64), return_scores=True)[1]
    attention.sum().backward()  # alone, too


@pytest.mark.parametrize("layout", ["jagged", "nested", "mask", "lengths"])
@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_ids_of_a_table_give_what_its_rows_give(implementation: str, layout: str) -> None:
    layer = unit().use(implementation)
    query = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    table = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(6, (BATCH, LONGEST)).masked_fill(~VALID, 99)
    packed = Jagged.from_padded(ids, mask=VALID)
    keys: Any = {"jagged": packed, "nested": nested(packed)}.get(layout, ids)
    padding = {"mask": {"mask": VALID}, "lengths": {"lengths": LENGTHS}}.get(layout, {})
    out, scores = layer(query, keys, table=table, values=values, return_scores=True, **padding)
    rows = packed.with_values(table[packed.values])
    expected, attention = layer(
        query, rows, values=packed.with_values(values[packed.values]), return_scores=True
    )
    assert_close(out, expected)
    if layout == "jagged":
        assert_close(scores.values, attention.values)
    assert_close(
        torch.autograd.grad(out.square().sum(), [table, values]),
        torch.autograd.grad(expected.square().sum(), [table, values]),
    )


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_candidates_share_a_history(implementation: str) -> None:
    layer = unit().use(implementation)
    query, padded = batch()
    query = torch.randn(7, WIDTH, dtype=torch.float64)
    history = Jagged.from_padded(padded, mask=VALID)
    out = layer(query, history, query_offsets=torch.tensor([0, 2, 3, 3, 5, 6]))
    owner = torch.tensor([0, 0, 1, 3, 3, 4])
    assert_close(out[:6], layer(query[:6], padded[owner], lengths=LENGTHS[owner]))
    assert out[6].eq(0).all()


@pytest.mark.parametrize(
    ("ids", "values", "error", "message"),
    [
        (
            torch.zeros(BATCH, LONGEST),
            None,
            TypeError,
            "keys: expected ids, int32 or int64, since a table is given",
        ),
        (
            torch.zeros(BATCH, LONGEST, 1, dtype=torch.int64),
            None,
            ValueError,
            "keys: expected ids [B, L], since a",
        ),
        (
            torch.zeros(BATCH, LONGEST, dtype=torch.int64),
            Jagged(torch.zeros(2, 2), torch.zeros(6, dtype=torch.int64)),
            TypeError,
            "values: expected another table, [R, Dv], got Jagged",
        ),
    ],
)
def test_bad_ids_are_named(ids: Tensor, values: Any, error: type[Exception], message: str) -> None:
    table = torch.randn(6, WIDTH, dtype=torch.float64)
    with pytest.raises(error, match=re.escape(message)):
        unit()(torch.randn(BATCH, WIDTH), ids, table=table, values=values, lengths=LENGTHS)


# ---------------------------------------------------------------- the eager twin


def both(layer: ActivationUnit, width: int | None, mask: Tensor) -> list[list[Tensor]]:
    """Outputs, attention and gradients of everything, fused and eager."""
    query, padded = batch(mask)
    padded_values = torch.randn(BATCH, LONGEST, width or WIDTH, dtype=torch.float64)
    results = []
    for implementation in ("fused", "eager"):
        q, k, v = (x.clone().requires_grad_() for x in (query, padded, padded_values))
        layer.use(implementation)
        values = None if width is None else v
        out, attention = layer(q, k, mask=mask, values=values, return_scores=True)
        leaves = [q, k, *([] if width is None else [v]), *layer.parameters()]
        loss = out.square().sum() + attention.sin().sum()
        results.append([out, attention, *torch.autograd.grad(loss, leaves)])
        assert_close(layer(q, k, mask=mask, values=values), out)
    return results


@pytest.mark.parametrize("width", [None, 7], ids=["keys pooled", "values pooled"])
@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_eager_twin_computes_the_same(activation: str, normalize: str, width: int | None) -> None:
    layer = unit(activation=activation, normalize=normalize, scale=0.7, negative_slope=0.3)
    fused, eager = both(layer, width, HOLES)
    assert_close(fused, eager)


@pytest.mark.parametrize("features", [("k", "q", "q*k"), ("q-k",), ("q*k", "k")])
def test_the_eager_twin_sees_the_same_features(features: tuple[str, ...]) -> None:
    fused, eager = both(unit(features=features), None, VALID)
    assert_close(fused, eager)


def test_use_switches_every_twin_below_and_shares_parameters() -> None:
    model = nn.ModuleDict({"a": unit(), "b": nn.Sequential(unit())})

    class Tower(Twin):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

    tower = Tower()
    before = list(tower.parameters())
    assert tower.use("eager") is tower
    twins = [module for module in tower.modules() if isinstance(module, Twin)]
    assert [twin.implementation for twin in twins] == ["eager"] * 3
    assert all(a is b for a, b in zip(tower.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="implementation: expected one of fused, eager, got 'compiled'"):
        tower.use("compiled")
    assert [twin.implementation for twin in twins] == ["eager"] * 3


# ---------------------------------------------------------------- construction


def test_parameters_are_those_of_linear_layers_and_a_slope_per_unit() -> None:
    layer = ActivationUnit(WIDTH, (4, 2), activation="prelu", features=("k", "q*k"), dtype=torch.float64)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.state_dict().items()}
    assert shapes == {
        "layers.0.weight": (4, 2 * WIDTH),
        "layers.0.bias": (4,),
        "layers.1.weight": (2, 4),
        "layers.1.bias": (2,),
        "layers.2.weight": (1, 2),
        "layers.2.bias": (1,),
        "slopes.0": (4,),
        "slopes.1": (2,),
    }
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert "activation='prelu'" in repr(layer)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"dim": 0}, "dim, hidden: expected positive widths, got 0 and (4, 2)"),
    ({"hidden": ()}, "dim, hidden: expected positive widths, got 3 and ()"),
    ({"hidden": (4, 0)}, "dim, hidden: expected positive widths, got 3 and (4, 0)"),
    ({"activation": "swish"}, "activation: expected one of sigmoid, relu,"),
    ({"normalize": "sum"}, "normalize: expected one of softmax, none, exp, sigmoid, got 'sum'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS)
def test_options_that_do_not_exist_are_refused(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"dim": WIDTH, "hidden": (4, 2)}
    with pytest.raises(ValueError, match=re.escape(message)):
        ActivationUnit(**{**options, **changes})


Q, K = torch.randn(2, WIDTH), torch.randn(2, LONGEST, WIDTH)
JAGGED = Jagged(torch.randn(4, WIDTH), torch.tensor([0, 1, 4]))
BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "padded without lengths": ((Q, K), {}, "lengths, mask: expected exactly one of the two"),
    "lengths and mask": (
        (Q, K),
        {"lengths": torch.tensor([1, 2]), "mask": torch.ones(2, LONGEST).bool()},
        "lengths, mask: expected exactly one of the two",
    ),
    "jagged with lengths": (
        (Q, JAGGED),
        {"lengths": torch.tensor([1, 3])},
        "lengths, mask: expected None, since keys are not padded",
    ),
    "nested with mask": (
        (Q, JAGGED.to_nested()),
        {"mask": torch.ones(2, LONGEST).bool()},
        "lengths, mask: expected None, since keys are not padded",
    ),
    "flat keys": ((Q, K[0]), {"lengths": torch.tensor([1, 2])}, "keys: expected [B, L, D], got [4, 3]"),
    "query of another batch": ((Q[:1], JAGGED), {}, "query: expected shape [2, 3], got [1, 3]"),
    "values of other lengths": (
        (Q, JAGGED),
        {"values": Jagged(torch.randn(3, 7), torch.tensor([0, 1, 3]))},
        "values: expected",
    ),
}


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_do_not_fit_are_refused(case: str, implementation: str) -> None:
    positional, named, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ActivationUnit(WIDTH, (4, 2)).use(implementation)(*positional, **named)
