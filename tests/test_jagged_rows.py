"""Rows of a Jagged by their place in their sequence."""

import pytest
import torch

from recattn.jagged import Jagged


def test_the_sum_is_that_of_each_sequence_and_zero_of_an_empty_one() -> None:
    values = torch.tensor([[1.0], [3.0], [5.0], [float("nan")]], requires_grad=True)
    total = Jagged(values, torch.tensor([0, 2, 2, 3])).sum()
    assert total.tolist() == [[4.0], [0.0], [5.0]]
    total.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0], [1.0], [1.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds_are_those_of_each_row_s_sequence_and_slack_is_one_more(dtype: torch.dtype) -> None:
    begin, end = Jagged(torch.zeros(8), torch.tensor([0, 3, 3, 6], dtype=dtype)).bounds()
    assert begin.tolist() == [0, 0, 0, 3, 3, 3, 6, 6]
    assert end.tolist() == [3, 3, 3, 6, 6, 6, 8, 8]


def test_reversed_turns_each_sequence_round_and_back() -> None:
    values = torch.tensor([0.0, 1, 2, 3, 4, 5, float("nan"), 7], requires_grad=True)
    history = Jagged(values, torch.tensor([0, 3, 3, 6]))
    turned = history.reversed()
    assert turned.values[:6].tolist() == [2, 1, 0, 5, 4, 3]
    torch.testing.assert_close(turned.reversed().values, values, equal_nan=True)
    (gradient,) = torch.autograd.grad(turned.values[:2].sum(), values)
    assert gradient.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert Jagged(values[:0], torch.tensor([0, 0])).reversed().values.shape == (0,)


@pytest.mark.parametrize(
    ("count", "plain", "among"),
    [(1, [2, 5], [1, 5]), (2, [1, 2, 4, 5], [0, 1, 3, 5]), (9, [0, 1, 2, 3, 4, 5], [0, 1, 3, 5])],
)
def test_the_last_rows_are_counted_among_all_or_those_of_a_mask(
    count: int, plain: list[int], among: list[int]
) -> None:
    history = Jagged(torch.arange(8), torch.tensor([0, 3, 3, 6], dtype=torch.int32))
    mask = torch.tensor([True, True, False, True, False, True, True, True])
    assert history.select(history.last(count)).values.tolist() == plain
    assert history.select(history.last(count, mask)).values.tolist() == among
    with pytest.raises(ValueError, match=r"mask: expected \(8,\), got \(2,\)"):
        history.last(count, mask[:2])
