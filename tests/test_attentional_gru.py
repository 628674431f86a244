"""attentional_gru: the kernels in Triton's interpreter and the composite path, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attentional_gru_cases import CELLS, HISTORIES, Case, assert_within_budget, call, variant
from torch import Tensor

import recattn
import recattn.reference
from recattn import functional
from recattn.composite import attentional_gru as composite

BACKENDS = ("triton", "torch")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks small enough that the histories of a test take several."""
    monkeypatch.setitem(composite.BLOCK_ROWS, "cpu", 24)


def run(case: Case, backend: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    with recattn.backend(backend):
        return call(functional.attentional_gru, case, case.tensors() if tensors is None else tensors)


def check(case: Case, backend: str = "triton") -> None:
    assert_within_budget(case, run(case, backend), case.tensors())


@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
def test_kernels_equal_the_formula_over_every_kind_of_history(
    lengths: list[int], precision: torch.dtype
) -> None:
    check(variant(lengths=lengths, dtype=precision))


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(("kind", "update"), CELLS)
def test_kernels_equal_the_formula_for_every_cell(
    kind: str, update: str, reset_after: bool, precision: torch.dtype
) -> None:
    check(variant(kind=kind, update=update, reset_after=reset_after, dtype=precision, initial=False))


@pytest.mark.parametrize(("width", "size"), [(1, 1), (16, 32), (36, 36), (40, 5), (7, 64)])
def test_kernels_equal_the_formula_for_every_width(width: int, size: int) -> None:
    check(variant(lengths=[3, 0, 9, 1], width=width, size=size))


@pytest.mark.parametrize("kind", ["augru", "aigru"])
@pytest.mark.parametrize(("width", "size"), [(70, 128), (128, 80)])
def test_kernels_equal_the_formula_for_wide_states(width: int, size: int, kind: str) -> None:
    check(variant(lengths=[3, 0, 9, 1], width=width, size=size, kind=kind, dtype=torch.bfloat16))


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(("width", "size", "kind"), [(70, 128, "augru"), (128, 80, "aigru"), (5, 66, "agru")])
def test_kernels_equal_the_formula_for_wide_states_in_float32(
    width: int, size: int, kind: str, reset_after: bool
) -> None:
    check(variant(lengths=[3, 0, 9, 1], width=width, size=size, kind=kind, reset_after=reset_after))


@pytest.mark.parametrize("size", [1, 7, 31])
@pytest.mark.parametrize("reset_after", [True, False])
def test_kernels_equal_the_formula_for_odd_sizes(
    size: int, reset_after: bool, precision: torch.dtype
) -> None:
    check(variant(size=size, reset_after=reset_after, dtype=precision))


def test_programs_that_keep_weights_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recattn.kernels.settings.multiprocessors", lambda _: 1)
    check(variant(lengths=[50, 0, 70, 30, 60], dtype=torch.bfloat16, slack=100))


@pytest.mark.parametrize("unique_rows", [False, True])
@pytest.mark.parametrize("row_scores", [False, True])
@pytest.mark.parametrize("kind", ["augru", "aigru"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_read_by_index(backend: str, kind: str, row_scores: bool, unique_rows: bool) -> None:
    table = 90 if unique_rows else 20
    case = variant(kind=kind, table=table, unique_rows=unique_rows, row_scores=row_scores)
    check(replace(case, reset_after=row_scores), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_int32(backend: str) -> None:
    check(variant(table=20, rows_dtype=torch.int32, dtype=torch.bfloat16), backend)
    check(variant(table=90, rows_dtype=torch.int32, unique_rows=True, kind="gru"), backend)


@pytest.mark.parametrize("row_scores", [False, True])
@pytest.mark.parametrize("kind", ["augru", "aigru"])
def test_projections_are_of_inputs_read_by_index(kind: str, row_scores: bool) -> None:
    case = variant(lengths=[3, 0, 9, 1], width=70, size=128, kind=kind, dtype=torch.bfloat16, table=40)
    check(replace(case, row_scores=row_scores, unique_rows=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_table_may_be_sparse(backend: str) -> None:
    case = variant(table=20, row_scores=True)
    expected = run(case, backend)
    with recattn.backend(backend):
        got = call(functional.attentional_gru, case, case.tensors(), sparse_grad=True)
    assert got["grad inputs"].is_sparse
    for name, result in got.items():
        torch.testing.assert_close(result.to_dense(), expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_may_be_int32(backend: str) -> None:
    check(variant(offsets_dtype=torch.int32), backend)


@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_composite_path_equals_the_formula(lengths: list[int], dtype: torch.dtype) -> None:
    check(variant(lengths=lengths, dtype=dtype), "torch")


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(("kind", "update"), CELLS)
def test_the_composite_path_equals_the_formula_for_every_cell(
    kind: str, update: str, reset_after: bool, initial: bool
) -> None:
    check(variant(kind=kind, update=update, reset_after=reset_after, initial=initial), "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_history_ends_where_it_starts(backend: str) -> None:
    case = variant()
    tensors, results = case.tensors(), run(case, backend)
    empty = torch.tensor(case.lengths) == 0
    assert torch.equal(results["last"][empty], tensors["h0"][empty])
    zero = run(variant(initial=False), backend)
    assert (zero["last"][empty] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slack_rows_are_neither_read_nor_given_a_gradient(backend: str) -> None:
    case = variant()
    results = run(case, backend)
    for name in ("states", "grad inputs", "grad scores"):
        assert (results[name][-case.slack :] == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_apart(backend: str) -> None:
    case = variant()
    tensors = case.tensors()
    strided = {
        name: torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=1)[:, 0]
        for name, tensor in tensors.items()
    }
    transposed = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    expected = run(case, backend)
    for layout in (strided, transposed):
        for name, result in run(case, backend, layout).items():
            torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-5, msg=name)


def test_rows_may_lie_beyond_the_reach_of_32_bits() -> None:
    stride, rows = 1 << 25, 70  # of which only the pages with rows in them are ever touched
    storage = torch.UntypedStorage(2 * stride * rows)
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (rows, 16), (stride, 1))
    assert far.stride(0) * (rows - 1) > 2**31
    case = variant(lengths=[40, 0, 30], width=16, dtype=torch.float16, slack=0)
    tensors = case.tensors()
    far.copy_(tensors["inputs"])
    expected = run(case, "triton")
    for name, result in run(case, "triton", tensors | {"inputs": far}).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_bitwise_repeatable(backend: str) -> None:
    first, second = run(variant(), backend), run(variant(), backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [0, 1])
def test_either_output_may_be_all_that_is_used(output: int, backend: str) -> None:
    case = variant(slack=0)
    grads = []
    for used in (backend, "autograd"):
        tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
        function = recattn.reference.attentional_gru if used == "autograd" else functional.attentional_gru
        rest = [t for name, t in tensors.items() if name not in ("inputs", "h0")]
        with recattn.backend("auto" if used == "autograd" else backend):
            out = function(tensors["inputs"], case.offsets(), *rest, h0=tensors["h0"], **case.options())
            out[output].square().sum().backward()
        grads.append([t.grad for t in tensors.values()])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_saturated_gates_give_finite_results() -> None:
    case = variant()
    tensors = {
        name: t * 20 if name.startswith(("weight", "bias")) else t for name, t in case.tensors().items()
    }
    for backend in BACKENDS:
        assert all(result.isfinite().all() for result in run(case, backend, tensors).values())


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    with pytest.raises(NotImplementedError, match=r'backend "triton".*float64'):
        run(variant(dtype=torch.float64), "triton")
    with pytest.raises(NotImplementedError, match=r'backend "triton".*up to 128 wide, not 200'):
        run(variant(size=200), "triton")


def test_autocast_casts_and_gradients_keep_the_dtype_of_their_tensor() -> None:
    case = variant()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = run(case, "torch")
    assert results["states"].dtype == results["last"].dtype == torch.bfloat16
    for name, result in results.items():
        if name.startswith("grad"):
            assert result.dtype == torch.float32, name
