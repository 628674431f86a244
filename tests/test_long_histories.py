"""One long history costs no accuracy: sums are made in pieces, and a softmax is saved as its maximum and its sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import activation_unit_cases as unit_cases
import pytest
import target_attention_cases as attention_cases
import torch
from activation_unit_cases import _rms
from torch import Tensor

from recattn import backend, functional
from recattn.composite.segments import PIECE, Segments


def error_ratios(cases: Any, function: Callable[..., Any], draws: list[Any]) -> dict[str, float]:
    """Of each result the relative error against float64 over that of eager code, both over all draws: of one draw both
    may hang on the rounding of a single number, and their ratio is any."""
    ours: dict[str, float] = {}
    eager: dict[str, float] = {}
    for case in draws:
        tensors = case.tensors()
        truth, reference = cases.exact(case, tensors), cases.eager(case, tensors)
        for name, got in cases.call(function, case, tensors).items():
            scale = _rms(truth[name])
            if scale > 0:
                ours[name] = ours.get(name, 0) + (_rms(got.double() - truth[name]) / scale) ** 2
                eager[name] = eager.get(name, 0) + (_rms(reference[name].double() - truth[name]) / scale) ** 2
    return {name: (ours[name] / eager[name]) ** 0.5 for name in ours}


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("lengths", [[30_000], [100] * 64], ids=["one of 30 000", "64 of 100"])
def test_the_composite_of_activation_unit_has_the_error_of_eager_code(lengths: list[int]) -> None:
    draws = [
        unit_cases.Case(lengths=lengths, dim=32, hidden=(40, 20), slack=0, scale=1.0, seed=seed)
        for seed in range(6)
    ]
    ratios = error_ratios(unit_cases, functional.activation_unit, draws)
    del ratios["grad bias 2"]  # zero, as softmax does not see it
    assert max(ratios.values()) < 2, ratios


def test_the_composite_of_target_attention_has_the_error_of_eager_code() -> None:
    draws = [attention_cases.Case(lengths=[30_000], dim=32, bias="shared", seed=seed) for seed in range(6)]
    ratios = error_ratios(attention_cases, functional.target_attention, draws)
    assert max(ratios.values()) < 2, ratios


def test_kernels_of_activation_unit_have_the_error_of_eager_code_at_full_accuracy() -> None:
    draws = [
        unit_cases.Case(lengths=[700], dim=8, hidden=(8,), slack=0, scale=1.0, seed=seed) for seed in range(4)
    ]
    with backend("triton"):
        ratios = error_ratios(unit_cases, functional.activation_unit, draws)
    del ratios["grad bias 1"]
    assert max(ratios.values()) < 2, ratios


def test_sums_of_long_segments_are_made_in_pieces_and_leave_slack_out() -> None:
    lengths = torch.tensor([0, 5, 7 * PIECE + 3, 0, PIECE, PIECE + 1, 0])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(offsets[-1]) + 9
    x, weights = torch.randn(total, 3), torch.randn(total)
    x[offsets[-1] :] = torch.nan

    def expected(x: Tensor) -> Tensor:
        return torch.stack([part.double().sum(0) for part in x[: offsets[-1]].split(lengths.tolist())])

    segments = Segments.of(offsets, total)
    torch.testing.assert_close(segments.sum(x).double(), expected(x), rtol=1e-5, atol=1e-5)
    weighted = expected(x * weights[:, None])
    torch.testing.assert_close(segments.sum(x, weights).double(), weighted, rtol=1e-5, atol=1e-5)
    numbers = segments.sum_numbers(x[:, 0]).double()
    torch.testing.assert_close(numbers, expected(x)[:, 0], rtol=1e-5, atol=1e-5)
    shuffled = torch.randperm(total)
    again = segments.sum(x[shuffled], weights, shuffled.argsort())
    assert torch.equal(again, segments.sum(x, weights))


def test_a_sum_of_many_equal_terms_is_nearly_exact() -> None:
    x = torch.full((200_000, 1), 0.1)
    (total,) = Segments.of(torch.tensor([0, 200_000]), 200_000).sum(x)
    assert abs(total.item() / 20_000 - 1) < 1e-5  # term by term it is 1e-3
