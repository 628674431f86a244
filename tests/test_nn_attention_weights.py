"""Attention weights alone: the formula, gradients, and what slack may hold."""

import pytest
import torch
from torch import Tensor
from watching import NoSync

from recattn import Jagged
from recattn.nn.attention_weights import attention_weights

WIDTH, SLACK = 3, 2
LENGTHS = [[2, 0, 5, 1], [0, 0], [0, 3, 0], []]


def make(
    lengths: list[int], offsets: torch.dtype = torch.int64, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Jagged]:
    torch.manual_seed(0)
    keys = torch.randn(sum(lengths) + SLACK, WIDTH, dtype=dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(offsets)
    return torch.randn(len(lengths), WIDTH, dtype=dtype).requires_grad_(), Jagged(
        keys.requires_grad_(), bounds
    )


def expected(query: Tensor, keys: Jagged) -> Tensor:
    bounds = keys.offsets.tolist()
    parts = [
        (keys.values[a:b] @ q).softmax(0) for q, a, b in zip(query, bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat([*parts, 0 * (keys.values[keys.offsets[-1] :] @ query.sum(0))])


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_weights_and_gradients_are_the_formula_s(lengths: list[int], offsets: torch.dtype) -> None:
    query, keys = make(lengths, offsets)
    with NoSync():
        weights = attention_weights(query, keys)
    want = expected(query, keys)
    torch.testing.assert_close(weights, want, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(want)
    leaves = [query, keys.values]
    with NoSync():
        got = torch.autograd.grad(weights, leaves, upstream)
    torch.testing.assert_close(
        got,
        torch.autograd.grad(want, leaves, upstream, materialize_grads=True, allow_unused=True),
        rtol=1e-10,
        atol=1e-12,
    )


def test_gradients_pass_gradcheck() -> None:
    query, keys = make([2, 0, 4])
    assert torch.autograd.gradcheck(
        lambda q, k: attention_weights(q, keys.with_values(k)), (query, keys.values)
    )


def test_slack_that_holds_nan_gets_zero() -> None:
    query, keys = make([2, 3, 0])
    clean = attention_weights(query, keys)
    dirty = keys.with_values(torch.cat([keys.values[:5], torch.full((SLACK, WIDTH), torch.nan)]))
    weights = attention_weights(query, dirty)
    assert torch.equal(weights, clean)
    upstream = torch.randn_like(clean)
    got = torch.autograd.grad(weights, [query, keys.values], upstream)
    want = torch.autograd.grad(clean, [query, keys.values], upstream)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_large_scores_do_not_overflow_and_small_ones_not_vanish() -> None:
    keys = Jagged(torch.tensor([[900.0], [901.0], [-900.0], [-901.0]]), torch.tensor([0, 2, 4]))
    weights = attention_weights(torch.ones(2, 1), keys)
    torch.testing.assert_close(
        weights, torch.tensor([-1.0, 0.0, 0.0, -1.0]).exp() / (1 + torch.tensor(-1.0).exp())
    )


def test_bfloat16_is_computed_in_float32() -> None:
    query, keys = make([3, 40, 0], dtype=torch.bfloat16)
    weights = attention_weights(query, keys)
    assert weights.dtype == torch.bfloat16
    exact = expected(query.double(), keys.with_values(keys.values.double()))
    torch.testing.assert_close(weights, exact.bfloat16(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.zeros(2, WIDTH), r"query: expected \[3, 3\], got \[2, 3\]"),
        (torch.zeros(3, WIDTH + 1), r"query: expected \[3, 3\], got \[3, 4\]"),
        (torch.zeros(3), r"query, keys: expected \[B, D\] and \[T, D\], got \[3\] and"),
    ],
)
def test_bad_shapes_are_named(query: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_weights(query, make([1, 2, 3])[1])
