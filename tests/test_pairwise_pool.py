"""pairwise_pool: the kernels in Triton's interpreter and the composite path, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from pairwise_pool_cases import Case, assert_within_budget, call, variant
from torch import Tensor

import recattn
from recattn import functional
from recattn.composite import pairwise_pool as composite

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(case: Case, backend: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    with recattn.backend(backend):
        return call(functional.pairwise_pool, case, case.tensors() if tensors is None else tensors)


def check(case: Case, backend: str = "triton") -> None:
    assert_within_budget(case, run(case, backend), case.tensors())


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "return_weights": True}], ids=["plain", "rich"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_composite_path_equals_the_formula(
    dtype: torch.dtype, count: int, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = variant(count=count, dtype=dtype, **options)
    monkeypatch.setitem(composite.BLOCK_BYTES, "cpu", 5 * 8 * case.dim * max(count * (count - 1) // 2, 1))
    check(case, "torch")


def test_scores_far_beyond_the_range_of_exp_are_fine() -> None:
    tensors = variant().tensors()
    tensors["projection"] *= 1e4
    out = run(variant(), "torch", tensors)["out"]
    assert out.isfinite().all()
