"""Sequences that share a tile in the packed kernels do not see each other's numbers."""

from __future__ import annotations

import pytest
import torch
from activation_unit_cases import HISTORIES, Case, assert_within_budget, call, variant
from recattn.kernels import settings
from torch import Tensor

import recattn
from recattn import functional

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALVES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
SHORT = [3, 0, 7, 1, 5, 2, 9, 4, 1, 6, 3, 8, 2, 11, 0, 4, 5, 1, 2]


@pytest.fixture(autouse=True)
def always_packed_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SHORT_FORWARD", 1 << 30)
    monkeypatch.setattr(settings, "SHORT_BACKWARD", 1 << 30)
    for table in (settings.PACKED_FORWARD, settings.PACKED_BACKWARD, settings.PACKED_WEIGHTS):
        for key, launch in table.items():
            monkeypatch.setitem(table, key, launch._replace(least_rows=24))


def run(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with recattn.backend("triton"):
        return call(functional.activation_unit, case, tensors)


@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("dtype", HALVES)
def test_no_length_is_too_long(lengths: list[int], dtype: torch.dtype) -> None:
    case = variant(lengths=lengths, dtype=dtype)
    assert_within_budget(case, run(case, case.tensors()), case.tensors())


@pytest.mark.parametrize("dtype", HALVES)
def test_softmax_holds_where_sequences_score_far_apart(dtype: torch.dtype) -> None:
    case = variant(
        lengths=SHORT, dtype=dtype, activation="identity", hidden=(6,), features=("q", "k"), scale=60.0
    )
    assert_within_budget(case, run(case, case.tensors()), case.tensors())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("name", ["query", "keys"])
def test_not_a_number_stays_with_its_sequence(name: str) -> None:
    case = variant(lengths=SHORT, dtype=torch.bfloat16, slack=0)
    tensors = case.tensors()
    whole = run(case, tensors)["out"]
    sequence = 4
    tensors[name][sequence if name == "query" else int(case.offsets()[sequence])] = torch.nan
    out = run(case, tensors)["out"]
    assert out[sequence].isnan().all()
    others = torch.arange(len(SHORT)) != sequence
    torch.testing.assert_close(out[others], whole[others], atol=4e-3, rtol=2e-2)  # two roundings
