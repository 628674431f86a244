"""The packed kernels of activation_unit, whose tiles have tokens of several sequences."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from activation_unit_cases import Case, assert_within_budget, call, variant
from recattn.kernels import settings
from torch import Tensor

import recattn
from recattn import functional
from recattn.inspect.recording import recorded_launches

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
LENGTHS = {
    "short with empty ones": [3, 0, 7, 1, 0, 0, 20, 5, 2, 0, 9, 4, 1, 1, 6, 0, 3, 8, 2, 11, 0],
    "all empty but one": [0, 0, 0, 2, 0],
    "one long among short ones": [2, 1, 90, 3, 0, 1, 1, 4],
    "a single item": [1],
}


@pytest.fixture(autouse=True)
def short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives programs few enough rows that sequences are cut."""
    for table in (settings.PACKED_FORWARD, settings.PACKED_BACKWARD, settings.PACKED_WEIGHTS):
        for key, launch in table.items():
            monkeypatch.setitem(table, key, launch._replace(least_rows=24))


@pytest.fixture(params=["bf16", "tf32", pytest.param("fp16", marks=pytest.mark.slow)])
def precision(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield PRECISIONS[request.param]
    torch.set_float32_matmul_precision(before)


def run(case: Case) -> dict[str, Tensor]:
    with recattn.backend("triton"):
        return call(functional.activation_unit, case, case.tensors())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_sequences_of_a_tile_are_kept_apart(lengths: list[int], precision: torch.dtype) -> None:
    case = variant(lengths=lengths, dtype=precision, return_scores=True)
    assert_within_budget(case, run(case), case.tensors())


@pytest.mark.parametrize("normalize", ["none", "exp", "sigmoid"])
@pytest.mark.parametrize("activation", ["prelu", "silu"])
def test_every_option_is_there(normalize: str, activation: str) -> None:
    case = variant(
        lengths=LENGTHS["short with empty ones"],
        dtype=torch.bfloat16,
        normalize=normalize,
        activation=activation,
        value_dim=7,
        hidden=(20, 12, 9),
    )
    assert_within_budget(case, run(case), case.tensors())


@pytest.mark.parametrize("unique_rows", [False, True])
def test_keys_are_read_by_index(unique_rows: bool) -> None:
    case = variant(
        lengths=LENGTHS["short with empty ones"],
        dtype=torch.bfloat16,
        table=120,
        unique_rows=unique_rows,
        return_scores=True,
    )
    assert_within_budget(case, run(case), case.tensors())


def test_they_are_chosen_by_the_mean_length() -> None:
    kernels = []
    for lengths in ([5] * 20, [60] * 20, [200] * 5):
        with recorded_launches() as launches:
            run(variant(lengths=lengths, dtype=torch.bfloat16))
        kernels.append({kernel.fn.__name__ for kernel, _, _ in launches} - {"_merge_kernel"})
    assert kernels == [
        {"packed_forward_kernel", "packed_tokens_kernel", "packed_weights_kernel"},
        {"_forward_kernel", "packed_tokens_kernel", "packed_weights_kernel"},
        {"_forward_kernel", "tokens_kernel", "weights_kernel"},
    ]


def test_gradients_are_bitwise_repeatable() -> None:
    case = variant(lengths=LENGTHS["one long among short ones"], dtype=torch.bfloat16)
    first, second = run(case), run(case)
    for name in first:
        assert torch.equal(first[name], second[name]), name
