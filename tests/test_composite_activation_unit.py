"""The composite path cuts histories into blocks: wherever it cuts, it computes what the formula says."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn import functional, reference
from recattn.composite import activation_unit as composite
from recattn.composite import activation_unit_few as few
from recattn.composite import blocks

WIDTH, HIDDEN = 3, (5, 4)
LENGTHS = {
    "ragged with empty ones": [2, 0, 5, 1, 0, 3, 7],
    "one length": [4] * 9,
    "a run between others": [1, 3, 6, 6, 6, 6, 0, 2, 5],
    "runs next to each other": [6, 6, 6, 5, 5, 5, 5],
    "one longer than a block": [1, 40, 2],
    "some of one length longer than a block": [17, 17, 17],
    "empty ones at both ends": [0, 0, 4, 3, 0],
}


@pytest.fixture(autouse=True, params=["few rows", "many rows"])
def _small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Blocks of 8 rows, and spans of equal length from 10 rows on."""
    torch.manual_seed(0)
    monkeypatch.setattr(few, "KEPT_BYTES", 1 << 20 if request.param == "few rows" else 0)
    monkeypatch.setattr(few, "BLOCK_BYTES", 8 * 8 * sum(HIDDEN))
    monkeypatch.setitem(composite.BLOCK_BYTES, "cpu", 8 * 8 * (WIDTH + sum(HIDDEN)))
    monkeypatch.setattr(blocks, "LONG", 2)
    monkeypatch.setattr(blocks, "RUN", 10)


def arguments(lengths: list[int], slack: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """A call of float64 leaves, with NaN in slack rows."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    keys = torch.randn(int(offsets[-1]) + slack, WIDTH, dtype=dtype)
    keys[int(offsets[-1]) :] = torch.nan
    sizes = [4 * WIDTH, *HIDDEN, 1]
    return {
        "query": torch.randn(len(lengths), WIDTH, dtype=dtype, requires_grad=True),
        "keys": keys.requires_grad_(),
        "offsets": offsets,
        "weights": [torch.randn(n, m, dtype=dtype, requires_grad=True) for m, n in pairwise(sizes)],
        "biases": [torch.randn(n, dtype=dtype, requires_grad=True) for n in sizes[1:]],
    }


def outcome(function: Any, call: dict[str, Any], **options: Any) -> list[Tensor]:
    """Outputs and gradients of everything."""
    out, attention = function(**call, **options, return_scores=True)
    leaves = [call["query"], call["keys"], *call["weights"], *call["biases"]]
    return [
        out,
        attention,
        *torch.autograd.grad(out.square().sum() + attention.sin().sum(), leaves),
    ]


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_blocks_of_any_kind_give_the_formula_and_its_gradients(lengths: list[int], normalize: str) -> None:
    call = arguments(lengths)
    options: dict[str, Any] = {"normalize": normalize, "scale": 0.7, "activation": "silu"}
    actual = outcome(functional.activation_unit, call, **options)
    expected = outcome(reference.activation_unit, call, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_nan_in_slack_stays_there_and_gets_no_gradient(lengths: list[int]) -> None:
    call = arguments(lengths, slack=11)
    total = sum(lengths)
    results = outcome(functional.activation_unit, call)
    assert all(result.isfinite().all() for result in results)
    assert results[1][total:].eq(0).all()
    assert results[3][total:].eq(0).all()


def test_spans_are_cut_where_runs_of_one_length_begin_and_end() -> None:
    offsets = torch.tensor([0, *LENGTHS["a run between others"]]).cumsum(0)
    spans = blocks.Histories.of(offsets, int(offsets[-1])).spans()
    assert [(s.owners.start, s.owners.stop, s.length) for s in spans] == [(0, 2, 1), (2, 6, 6), (6, 9, 1)]
    pieces = [piece for span in spans for piece in span.pieces(8)]
    assert [piece.rows for piece in pieces[1:5]] == [slice(4 + 6 * i, 10 + 6 * i) for i in range(4)]


def test_the_attention_of_a_long_history_sums_to_one_in_float32() -> None:
    call = arguments([50_001], dtype=torch.float32)
    with torch.no_grad():
        _, attention = functional.activation_unit(**call, return_scores=True)
    assert attention.double().sum().sub(1).abs() < 1e-5
