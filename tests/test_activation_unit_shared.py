"""activation_unit over histories that queries share, and over keys that are read by index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from activation_unit_cases import Case, assert_within_budget, call, variant
from recattn.kernels import settings
from torch import Tensor

import recattn
from recattn import functional
from recattn.inspect.recording import recorded_launches
from recattn.jagged import offsets_of
from recattn.ops.candidates import Candidates

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = (0, 5, 40, 0, 1, 33)
CANDIDATES = {
    "none for some": (3, 0, 2, 0, 1, 5),
    "none at all": (0, 0, 0, 0, 0, 0),
    "one each": (1, 1, 1, 1, 1, 1),
    "many for one": (0, 37, 0, 1, 0, 0),
}


@pytest.fixture(autouse=True)
def short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives programs few enough rows that sequences, and the queries of a tile, are cut."""
    for table, rows in (
        (settings.FORWARD, 72),
        (settings.BACKWARD_TOKENS, 72),
        (settings.BACKWARD_WEIGHTS, 72),
        (settings.CANDIDATES_FORWARD, 40),
    ):
        for key, launch in table.items():
            monkeypatch.setitem(table, key, launch._replace(least_rows=rows))


@pytest.fixture(params=["fp32", "tf32", "bf16"])
def precision(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield torch.bfloat16 if request.param == "bf16" else torch.float32
    torch.set_float32_matmul_precision(before)


def run(case: Case, backend: str) -> dict[str, Tensor]:
    with recattn.backend(backend):
        return call(functional.activation_unit, case, case.tensors())


def check(case: Case, backend: str) -> None:
    assert_within_budget(case, run(case, backend), case.tensors())


@pytest.mark.parametrize("candidates", CANDIDATES.values(), ids=CANDIDATES)
def test_candidates_share_their_history_in_kernels(
    candidates: tuple[int, ...], precision: torch.dtype
) -> None:
    check(variant(lengths=LENGTHS, candidates=candidates, dtype=precision), "triton")


@pytest.mark.parametrize("candidates", CANDIDATES.values(), ids=CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_candidates_share_their_history_in_the_composite_path(
    candidates: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(variant(lengths=LENGTHS, candidates=candidates, dtype=dtype), "torch")


@pytest.mark.parametrize("normalize", ["softmax", "exp", "sigmoid", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_many_candidates_share_tiles(normalize: str, dtype: torch.dtype) -> None:
    case = variant(
        lengths=(100, 0, 33, 7),
        candidates=(8, 5, 7, 1),
        dtype=dtype,
        normalize=normalize,
        value_dim=7,
        activation="relu",
    )
    with recorded_launches() as launches:
        run(case, "triton")
    assert "candidates_kernel" in {kernel.fn.__name__ for kernel, _, _ in launches}
    check(case, "triton")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("normalize", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value_dim", [None, 7])
def test_candidates_read_a_table(backend: str, normalize: str, value_dim: int | None) -> None:
    case = variant(
        lengths=LENGTHS,
        candidates=CANDIDATES["none for some"],
        table=11,
        normalize=normalize,
        value_dim=value_dim,
    )
    check(case, backend)


@pytest.mark.parametrize("unique_rows", [False, True])
@pytest.mark.parametrize("value_dim", [None, 7])
def test_kernels_read_a_table(unique_rows: bool, value_dim: int | None, precision: torch.dtype) -> None:
    table = 200 if unique_rows else 9
    check(
        variant(
            table=table, unique_rows=unique_rows, value_dim=value_dim, dtype=precision, return_scores=True
        ),
        "triton",
    )


@pytest.mark.parametrize("unique_rows", [False, True])
@pytest.mark.parametrize("value_dim", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_composite_path_reads_a_table(
    unique_rows: bool, value_dim: int | None, dtype: torch.dtype
) -> None:
    table = 200 if unique_rows else 9
    check(
        variant(table=table, unique_rows=unique_rows, value_dim=value_dim, dtype=dtype, return_scores=True),
        "torch",
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("candidates", [None, CANDIDATES["none for some"]], ids=["one query", "candidates"])
def test_a_sparse_gradient_of_a_table_is_the_dense_one(
    backend: str, candidates: tuple[int, ...] | None
) -> None:
    case = variant(lengths=LENGTHS, candidates=candidates, table=9)
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
    gradients = []
    for sparse in (False, True):
        with recattn.backend(backend):
            out = functional.activation_unit(
                tensors["query"],
                tensors["keys"],
                case.offsets(),
                [tensors[f"weight {i}"] for i in range(3)],
                [tensors[f"bias {i}"] for i in range(3)],
                sparse_grad=sparse,
                **case.data(),
            )
        (gradient,) = torch.autograd.grad(out.square().sum(), tensors["keys"])
        assert gradient.is_sparse == sparse
        gradients.append(gradient.to_dense())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_shared_and_indexed_gradients_are_bitwise_repeatable(backend: str) -> None:
    case = variant(lengths=LENGTHS, candidates=CANDIDATES["many for one"], table=11)
    first, second = run(case, backend), run(case, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_padded_batch_is_read_in_place(backend: str) -> None:
    """By the positions of what counts, in any pattern, with NaN everywhere else."""
    case = variant(lengths=[3, 0, 7, 2], slack=0)
    tensors = case.tensors()
    generator = torch.Generator().manual_seed(0)
    places = [
        torch.randperm(9, generator=generator)[:n].sort().values + 9 * b for b, n in enumerate(case.lengths)
    ]
    rows = torch.cat(places)
    padded = torch.full((4 * 9, case.dim), torch.nan)
    padded[rows] = tensors["keys"]
    padded.requires_grad_()
    packed = tensors["keys"].clone().requires_grad_()
    weights, biases = ([tensors[f"{kind} {i}"] for i in range(3)] for kind in ("weight", "bias"))
    with recattn.backend(backend):
        expected = functional.activation_unit(tensors["query"], packed, case.offsets(), weights, biases)
        out = functional.activation_unit(
            tensors["query"], padded, case.offsets(), weights, biases, rows=rows, unique_rows=True
        )
    assert torch.equal(out, expected)
    for result in (out, expected):
        result.sin().sum().backward()
    assert packed.grad is not None
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad[rows], packed.grad)
    assert padded.grad.nan_to_num(1).sum(1).ne(0).sum() == len(rows)


def test_a_group_of_5000_candidates() -> None:
    check(variant(lengths=[3, 20, 4], candidates=[2, 5000, 0], dim=4, hidden=(5,)), "torch")


def test_tiles_cover_every_history_that_is_read() -> None:
    lengths, queries = torch.tensor(LENGTHS), torch.tensor(CANDIDATES["none for some"])
    candidates, sequences = Candidates.of(offsets_of(queries), offsets_of(lengths), int(queries.sum()) + 2)
    assert sequences.diff().tolist() == [0, 0, 0, 40, 40, 1, 33, 33, 33, 33, 33, 0, 0]
    tiles = candidates.tiles(32, int(lengths.sum()))
    read = tiles.offsets.diff() > 0
    assert tiles.begin[read].tolist() == [5, 37, 45, 46, 78]
    assert tiles.end[read].tolist() == [37, 45, 46, 78, 79]
    assert tiles.query[read].tolist() == [3, 3, 5, 6, 6]
    assert tiles.offsets.diff()[read].tolist() == [2, 2, 1, 5, 5]


def bad(**changes: Any) -> dict[str, Any]:
    case = variant(lengths=[2, 3], slack=0)
    tensors = case.tensors()
    arguments: dict[str, Any] = {
        "query": tensors["query"],
        "keys": tensors["keys"],
        "offsets": case.offsets(),
        "weights": [tensors[f"weight {i}"] for i in range(3)],
        "biases": [tensors[f"bias {i}"] for i in range(3)],
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"query_offsets": torch.tensor([0, 2])},
            ValueError,
            "query_offsets: expected 3 elements, as offsets, got 2",
        ),
        ({"query_offsets": torch.tensor([0.0, 1, 2])}, TypeError, "query_offsets: expected int32 or int64"),
        ({"query_offsets": [0, 1, 2]}, TypeError, "query_offsets: expected a tensor, got list"),
        (
            {"query_offsets": torch.tensor([0, 1, 2]), "return_scores": True},
            ValueError,
            "return_scores: expected False, since query_offsets are given",
        ),
        ({"rows": torch.zeros(5)}, TypeError, "rows: expected int32 or int64, got torch.float32"),
        (
            {"rows": torch.zeros(5, 1, dtype=torch.int64)},
            ValueError,
            r"rows: expected shape \[T\], got \[5, 1\]",
        ),
        ({"rows": [0, 1]}, TypeError, "rows: expected a tensor, got list"),
        ({"sparse_grad": True}, ValueError, "sparse_grad: expected False, since no rows are given"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.activation_unit(**bad(**changes))


def test_validation_on_request_reads_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.checks, "VALIDATE", True)
    with pytest.raises(ValueError, match="rows: expected 0 to 4, got 0 to 5"):
        functional.activation_unit(**bad(rows=torch.arange(6), offsets=torch.tensor([0, 2, 6])))
    functional.activation_unit(**bad(rows=torch.tensor([0, 1, 2, 3, 4, 99])))
