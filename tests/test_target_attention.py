"""target_attention: the kernels in Triton's interpreter and the composite path, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recattn.kernels import target_attention_settings as settings
from target_attention_cases import HISTORIES, Case, assert_within_budget, call, exact, variant
from torch import Tensor

import recattn
from recattn import functional
from recattn.composite import target_attention as composite

BACKENDS = ("triton", "torch")
CANDIDATES = (0, 3, 40, 66)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives programs few enough rows that histories of a test are cut, some more than once."""
    for table in (settings.QUERY_FORWARD, settings.QUERY_BACKWARD):
        for key, launch in table.items():
            monkeypatch.setitem(table, key, launch._replace(least_rows=24))


def run(
    case: Case, backend: str, tensors: dict[str, Tensor] | None = None, **changes: Any
) -> dict[str, Tensor]:
    with recattn.backend(backend):
        tensors = case.tensors() if tensors is None else tensors
        return call(functional.target_attention, case, tensors, **changes)


def check(case: Case, backend: str = "triton") -> None:
    assert_within_budget(case, run(case, backend), case.tensors())


@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_composite_path_equals_the_formula(
    lengths: list[int], dtype: torch.dtype, candidates: list[int] | None
) -> None:
    check(variant(lengths=lengths, dtype=dtype, candidates=candidates, bias="by head", heads=2), "torch")


@pytest.mark.parametrize("candidates", [None, (3, 0, 1, 20), CANDIDATES], ids=["one query", "few", "many"])
@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
def test_kernels_equal_the_formula_over_every_kind_of_history(
    lengths: list[int], candidates: tuple[int, ...] | None, precision: torch.dtype
) -> None:
    check(variant(lengths=lengths, dtype=precision, candidates=candidates))


@pytest.mark.parametrize("candidates", [None, (3, 66)], ids=["one query", "candidates"])
@pytest.mark.parametrize(("dim", "heads"), [(16, 4), (18, 3), (64, 2), (80, 1), (1, 10), (130, 1)])
def test_kernels_equal_the_formula_at_every_width(
    dim: int, heads: int, candidates: tuple[int, ...] | None, precision: torch.dtype
) -> None:
    check(
        variant(
            dim=dim, heads=heads, dtype=precision, lengths=[0, 60, 3], candidates=candidates, bias="by head"
        )
    )


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("bias", ["shared", "by head"])
def test_short_histories_share_tiles(heads: int, bias: str, precision: torch.dtype) -> None:
    lengths = [3, 5, 0, 1, 20, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1, 1, 30, 2]
    check(variant(lengths=lengths, dim=4, heads=heads, dtype=precision, bias=bias))


def test_a_group_of_5000_candidates_and_one_of_none(precision: torch.dtype) -> None:
    check(variant(lengths=[2, 1, 3], candidates=[0, 5000, 1], dim=4, dtype=precision))


@pytest.mark.parametrize("candidates", [None, (3, 66)], ids=["one query", "candidates"])
def test_rows_may_lie_beyond_the_reach_of_32_bits(candidates: tuple[int, ...] | None) -> None:
    stride, rows = 1 << 23, 300  # of which only the pages with rows in them are ever touched
    storage = torch.UntypedStorage(2 * stride * rows)
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (rows, 16), (stride, 1))
    assert far.stride(0) * (rows - 1) > 2**31
    case = variant(lengths=[100, 0, 200], dim=16, dtype=torch.float16, slack=0, candidates=candidates)
    tensors = case.tensors()
    far.copy_(tensors["keys"])
    expected = run(case, "triton")
    for name, result in run(case, "triton", tensors | {"keys": far}).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid"])
def test_programs_that_share_a_history_of_candidates_give_the_same(
    normalize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in (settings.CANDIDATES_FORWARD, settings.CANDIDATES_BACKWARD):
        for key, launch in table.items():
            monkeypatch.setitem(table, key, launch._replace(share=8))
    for candidates in ((40, 17, 70), (90, 0, 1)):
        check(
            variant(
                lengths=[90, 1, 0, 70], candidates=candidates, heads=2, bias="by head", normalize=normalize
            )
        )


def test_any_schedule_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = variant(lengths=[5, 90, 0, 20, 1, 40], heads=2)
    truth = exact(case, case.tensors())
    for least_rows in (3, 64, 10_000):
        for table in (settings.QUERY_FORWARD, settings.QUERY_BACKWARD):
            for key, launch in table.items():
                monkeypatch.setitem(table, key, launch._replace(least_rows=least_rows))
        for short in (0, 1000):
            monkeypatch.setattr(settings, "SHORT", short)
            for name, result in run(case, "triton").items():
                torch.testing.assert_close(result.double(), truth[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
@pytest.mark.parametrize("bias", [None, "shared"])
@pytest.mark.parametrize("normalize", ["softmax", "none", "exp", "sigmoid"])
def test_every_way_to_normalize_equals_the_formula(
    normalize: str, bias: str | None, candidates: list[int] | None, backend: str
) -> None:
    check(
        variant(normalize=normalize, bias=bias, candidates=candidates, heads=2, lengths=[0, 40, 3]), backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
def test_rows_look_up_keys_and_values(candidates: list[int] | None, backend: str) -> None:
    check(variant(table=29, candidates=candidates, bias="by head", heads=2, value_dim=7), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
def test_the_log_sum_exp_is_returned_and_passes_a_gradient(
    candidates: list[int] | None, backend: str
) -> None:
    check(variant(return_lse=True, candidates=candidates, heads=2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
def test_empty_histories_give_zero_and_take_no_gradient(candidates: list[int] | None, backend: str) -> None:
    case = variant(return_lse=True, candidates=candidates, heads=2)
    results = run(case, backend)
    counts = torch.tensor(case.counts())
    empty = torch.repeat_interleave(torch.tensor(case.lengths) == 0, counts)
    if candidates is not None:  # queries behind the last offset
        empty = torch.cat([empty, torch.ones(case.slack, dtype=torch.bool)])
    assert (results["out"][empty] == 0).all()
    assert (results["lse"][empty] == -torch.inf).all()
    assert (results["grad query"][empty] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
def test_slack_rows_are_neither_read_nor_given_a_gradient(candidates: list[int] | None, backend: str) -> None:
    case = variant(bias="by head", heads=2, candidates=candidates)
    results = run(case, backend)
    for name in ("grad keys", "grad values", "grad bias"):
        assert (results[name][-case.slack :] == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
def test_a_bias_of_minus_infinity_hides_a_token(candidates: list[int] | None, backend: str) -> None:
    case = variant(
        bias="shared", heads=2, lengths=[6, 0, 40, 5], slack=0, candidates=candidates, return_lse=True
    )
    tensors = case.tensors()
    tensors["bias"][10:30] = -torch.inf
    expected = exact(case, tensors)
    for name, result in run(case, backend, tensors).items():
        torch.testing.assert_close(result.double(), expected[name], rtol=1e-4, atol=1e-4, msg=name)
    tensors["bias"][-5:] = -torch.inf  # all of a history: as if it were empty
    results = run(case, backend, tensors)
    assert (results["grad query"][-sum(case.counts()[3:]) :] == 0).all()
    assert all(not result.isnan().any() for result in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
def test_offsets_and_rows_may_be_int32_and_the_bias_float32(
    candidates: list[int] | None, backend: str
) -> None:
    case = variant(
        offsets_dtype=torch.int32, table=29, candidates=candidates, bias="shared", dtype=torch.bfloat16
    )
    tensors = case.tensors()
    results = run(case, backend, tensors, rows=case.options()["rows"].int())
    wide = run(case, backend, tensors | {"bias": tensors["bias"].float()})
    assert wide["grad bias"].dtype == torch.float32
    for name, result in results.items():
        torch.testing.assert_close(wide[name].to(result.dtype), result, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
def test_rows_may_lie_apart(candidates: list[int] | None, backend: str) -> None:
    case = variant(value_dim=9, heads=2, bias="by head", candidates=candidates)
    tensors = case.tensors()
    strided = {
        name: torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=1)[:, 0]
        for name, tensor in tensors.items()
    }
    transposed = {name: t.t().contiguous().t() for name, t in tensors.items()}
    expected = run(case, backend)
    for layout in (strided, transposed):
        for name, result in run(case, backend, layout).items():
            torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", [None, 23])
@pytest.mark.parametrize("candidates", [None, CANDIDATES], ids=["one query", "candidates"])
def test_gradients_are_bitwise_repeatable(
    candidates: list[int] | None, table: int | None, backend: str
) -> None:
    case = variant(lengths=[3, 150, 0, 20], candidates=candidates, table=table, bias="shared", heads=2)
    first, second = run(case, backend), run(case, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    for candidates in (None, CANDIDATES):
        for scale in (1e3, -1e3):
            check(variant(scale=scale, lengths=[0, 40, 1, 64], candidates=candidates), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [None, (3, 20)], ids=["one query", "candidates"])
def test_a_large_bias_changes_nothing_in_a_softmax(candidates: tuple[int, ...] | None, backend: str) -> None:
    case = variant(bias="shared", lengths=[0, 40, 3], slack=0, candidates=candidates)
    tensors = case.tensors()
    tensors["bias"] = torch.full_like(tensors["bias"], 256.0)
    expected = exact(case, tensors)
    for name, result in run(case, backend, tensors).items():
        torch.testing.assert_close(result.double(), expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
def test_the_composite_path_gives_the_same_wherever_it_cuts_blocks(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(composite.BLOCK_BYTES, "cpu", 8 * 8 * 36)
    for candidates in (None, CANDIDATES):
        check(
            variant(lengths=lengths, candidates=candidates, heads=2, dtype=torch.float64, bias="shared"),
            "torch",
        )


def test_autocast_casts_and_gradients_keep_the_dtype_of_their_tensor() -> None:
    case = variant(bias="shared")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = run(case, "torch")
    truth = exact(case, case.tensors())
    assert results["out"].dtype == torch.bfloat16
    for name, result in results.items():
        if name.startswith("grad"):
            assert result.dtype == torch.float32
            torch.testing.assert_close(result.double(), truth[name], rtol=0.1, atol=0.1, msg=name)


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    with pytest.raises(NotImplementedError, match=r'backend "triton".*float64'):
        run(variant(dtype=torch.float64), "triton")
    with pytest.raises(NotImplementedError, match=r'backend "triton".*heads up to 256 wide, not 300'):
        run(variant(dim=300), "triton")
