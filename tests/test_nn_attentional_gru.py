"""nn.AttentionalGRU: one result whatever the layout of the histories, and the same from its eager twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recattn import Jagged
from recattn.nn import AttentionalGRU

LENGTHS = torch.tensor([2, 0, 4, 1, 3])
VALID = torch.arange(4) < LENGTHS[:, None]
HOLES = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1]]).bool()
KINDS = ["gru", "agru", "aigru", "augru"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch(mask: Tensor, kind: str = "augru") -> tuple[Tensor, Tensor | None]:
    """Padded items and attention, with NaN wherever nothing counts."""
    items = torch.randn(5, 4, 3, dtype=torch.float64).masked_fill(~mask[..., None], torch.nan)
    scores = torch.rand(5, 4, dtype=torch.float64).masked_fill(~mask, torch.nan)
    return items, None if kind == "gru" else scores


def layer(**options: Any) -> AttentionalGRU:
    return AttentionalGRU(3, 2, dtype=torch.float64, **options)


@pytest.mark.parametrize("mask", [VALID, HOLES], ids=["right padding", "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_and_jagged_agree(kind: str, mask: Tensor) -> None:
    items, scores = batch(mask, kind)
    gru = layer(kind=kind)
    jagged = Jagged(items[mask], Jagged.from_lengths(items[mask], mask.sum(1)).offsets)
    attention = None if scores is None else jagged.with_values(scores[mask])
    expected, last = gru(jagged, attention)
    states, padded_last = gru(items, scores, mask=mask)
    torch.testing.assert_close(states.values, expected.values)
    torch.testing.assert_close(padded_last, last)
    assert torch.equal(states.offsets, expected.offsets)


@pytest.mark.parametrize(
    "mask", [VALID, VALID.flip(1), HOLES], ids=["right padding", "left padding", "holes"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_padded_batch_are_in_its_layout(kind: str, mask: Tensor) -> None:
    items, scores = batch(mask, kind)
    gru, results = layer(kind=kind), []
    for implementation in ("fused", "eager"):
        leaves = [x.nan_to_num().requires_grad_() for x in (items, scores) if x is not None]
        states, last = gru.use(implementation)(*leaves, mask=mask)
        results.append(torch.autograd.grad(states.values.square().sum() + last.sum(), leaves))
    for fused, eager in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_a_table_is_read_by_ids_in_any_layout(implementation: str, kind: str) -> None:
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (5, 4))
    _, scores = batch(HOLES, kind)
    gru, results = layer(kind=kind), []
    for items, options in ((table[ids], {}), (ids.masked_fill(~HOLES, 1 << 40), {"table": table})):
        states, last = gru.use(implementation)(items, scores, mask=HOLES, **options)
        (gradient,) = torch.autograd.grad(states.values.square().sum() + last.sum(), table)
        results.append((states.values, last, gradient))
    jagged = Jagged.from_padded(ids, mask=HOLES)
    attention = None if scores is None else Jagged.from_padded(scores, mask=HOLES)
    states, last = gru(jagged, attention, table=table)
    (gradient,) = torch.autograd.grad(states.values.square().sum() + last.sum(), table)
    for expected, *others in zip(*results, (states.values, last, gradient), strict=True):
        for other in others:
            torch.testing.assert_close(other, expected)


def test_nested_and_jagged_agree() -> None:
    items, scores = batch(VALID)
    assert scores is not None
    jagged = Jagged.from_padded(items, lengths=LENGTHS)
    gru = layer()
    expected, _ = gru(jagged, Jagged.from_padded(scores, lengths=LENGTHS))
    nested = [
        torch.nested.nested_tensor(
            [row[:n] for row, n in zip(x, LENGTHS.tolist(), strict=True)], layout=torch.jagged
        )
        for x in (items, scores)
    ]
    states, _ = gru(*nested)
    torch.testing.assert_close(states.values, expected.values)


@pytest.mark.parametrize("update", ["paper", "official"])
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_eager_twin_agrees(kind: str, reset_after: bool, update: str) -> None:
    items, scores = batch(VALID, kind)
    gru = layer(kind=kind, reset_after=reset_after, update=update)
    h0 = torch.randn(5, 2, dtype=torch.float64)
    results = []
    for implementation in ("fused", "eager"):
        gru.zero_grad()
        states, last = gru.use(implementation)(items.nan_to_num(), scores, lengths=LENGTHS, h0=h0)
        (states.values.square().sum() + last.sum()).backward()
        results.append([states.values, last, *(p.grad for p in gru.parameters())])
    for fused, eager in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager)


def test_it_loads_the_parameters_of_torch_and_computes_the_same() -> None:
    reference = nn.GRU(3, 2, batch_first=True, dtype=torch.float64)
    gru = layer(kind="gru")
    gru.load_state_dict(reference.state_dict())
    items = torch.randn(5, 4, 3, dtype=torch.float64)
    states, last = gru(items, lengths=torch.full((5,), 4))
    expected, final = reference(items)
    torch.testing.assert_close(states.to_padded(), expected)
    torch.testing.assert_close(last, final[0])


def test_bad_input_is_named() -> None:
    items, scores = batch(VALID)
    with pytest.raises(ValueError, match="kind: expected one of gru, agru, aigru, augru, got 'lstm'"):
        layer(kind="lstm")
    with pytest.raises(ValueError, match="hidden_size: expected positive widths, got 3 and 0"):
        AttentionalGRU(3, 0)
    with pytest.raises(ValueError, match=r"items: expected a width of 3, got \[20, 2\]"):
        layer()(items[..., :2], scores, lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"table: expected a width of 3, got \[7, 2\]"):
        layer()(torch.zeros(5, 4, dtype=torch.int64), scores, lengths=LENGTHS, table=torch.ones(7, 2))
    with pytest.raises(TypeError, match="items: expected ids, int32 or int64, since a table is given"):
        layer()(items, scores, lengths=LENGTHS, table=torch.ones(7, 3))
    with pytest.raises(TypeError, match="scores: expected Tensor, as the items, got Jagged"):
        layer()(items, Jagged.from_padded(items, lengths=LENGTHS), lengths=LENGTHS)
    with pytest.raises(ValueError, match="lengths, mask: expected exactly one"):
        layer()(items, scores)
