"""activation_unit: the kernels in Triton's interpreter and the composite path, against the formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from activation_unit_cases import HISTORIES, Case, assert_within_budget, call, exact, variant
from recattn.kernels import settings
from torch import Tensor

import recattn
from recattn import functional

ACTIVATIONS = ("sigmoid", "relu", "leaky_relu", "prelu", "silu", "gelu", "tanh", "identity", "dice")


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def own_tiles_and_short_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives each sequence tiles of its own, and programs so few rows that sequences are cut, some more than once."""
    for table in (settings.FORWARD, settings.BACKWARD_TOKENS, settings.BACKWARD_WEIGHTS):
        for key, launch in table.items():
            monkeypatch.setitem(table, key, launch._replace(least_rows=24))
    with settings.assuming(short=False):
        yield


def run(case: Case, backend: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    with recattn.backend(backend):
        return call(functional.activation_unit, case, case.tensors() if tensors is None else tensors)


def check(case: Case, backend: str = "triton") -> None:
    assert_within_budget(case, run(case, backend), case.tensors())


@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
def test_kernels_equal_the_formula_over_every_kind_of_history(
    lengths: list[int], precision: torch.dtype
) -> None:
    check(variant(lengths=lengths, dtype=precision))


@pytest.mark.parametrize(
    ("dim", "hidden"), [(36, (36,)), (64, (80, 40)), (80, (16, 10)), (16, (24, 16, 10)), (5, (7, 3))]
)
def test_kernels_equal_the_formula_at_every_width(
    dim: int, hidden: tuple[int, ...], precision: torch.dtype
) -> None:
    check(variant(dim=dim, hidden=hidden, dtype=precision, lengths=[0, 40, 3]))


@pytest.mark.parametrize("normalize", ["exp", "sigmoid"])
@pytest.mark.parametrize("return_scores", [False, True])
def test_kernels_equal_the_formula_for_every_normalization(
    normalize: str, return_scores: bool, precision: torch.dtype
) -> None:
    check(variant(normalize=normalize, return_scores=return_scores, dtype=precision))


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_equal_the_formula_for_every_activation(
    activation: str, normalize: str, precision: torch.dtype
) -> None:
    check(
        variant(
            activation=activation,
            normalize=normalize,
            dtype=precision,
            lengths=[0, 40, 3],
            return_scores=True,
        )
    )


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh", "prelu", "silu", "dice"])
def test_kernels_drop_the_units_that_the_formula_drops(activation: str, precision: torch.dtype) -> None:
    check(
        variant(activation=activation, dropout=0.3, dtype=precision, lengths=[0, 40, 3], hidden=(20, 12, 6))
    )


@pytest.mark.parametrize("candidates", [[2, 0, 3, 1], [1, 40, 0, 1]])
def test_candidates_drop_units_of_their_own(candidates: list[int]) -> None:
    check(variant(activation="dice", dropout=0.3, lengths=[3, 0, 40, 5], candidates=candidates))


@pytest.mark.parametrize("features", [("q*k",), ("k", "q"), ("q-k", "q*k", "k")])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_features_may_be_any_in_any_order(features: tuple[str, ...], backend: str) -> None:
    check(variant(features=features, lengths=[0, 40, 3]), backend)


@pytest.mark.parametrize("value_dim", [7, 64])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_values_may_have_another_width(value_dim: int, backend: str) -> None:
    check(variant(value_dim=value_dim, return_scores=True), backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_offsets_may_be_int32(backend: str) -> None:
    check(variant(offsets_dtype=torch.int32), backend)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_composite_path_equals_the_formula(lengths: list[int], dtype: torch.dtype) -> None:
    check(variant(lengths=lengths, dtype=dtype, return_scores=True), "torch")


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", ["softmax", "none", "exp", "sigmoid"])
def test_the_composite_path_equals_the_formula_for_every_activation(activation: str, normalize: str) -> None:
    check(variant(activation=activation, normalize=normalize, hidden=(9, 8, 7, 6)), "torch")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty_histories_give_zero_and_take_no_gradient(backend: str) -> None:
    case = variant(return_scores=True)
    results = run(case, backend)
    empty = torch.tensor(case.lengths) == 0
    assert (results["out"][empty] == 0).all()
    assert (results["grad query"][empty] == 0).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_slack_rows_are_neither_read_nor_given_a_gradient(backend: str) -> None:
    case = variant(return_scores=True, value_dim=9)
    results = run(case, backend)
    for name in ("scores", "grad keys", "grad values"):
        assert (results[name][-case.slack :] == 0).all(), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_may_lie_apart(backend: str) -> None:
    case = variant(value_dim=9)
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
    stride, rows = 1 << 23, 300  # of which only the pages with rows in them are ever touched
    storage = torch.UntypedStorage(2 * stride * rows)
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (rows, 16), (stride, 1))
    assert far.stride(0) * (rows - 1) > 2**31
    case = variant(lengths=[100, 0, 200], dim=16, dtype=torch.float16, slack=0)
    tensors = case.tensors()
    far.copy_(tensors["keys"])
    expected = run(case, "triton")
    for name, result in run(case, "triton", tensors | {"keys": far}).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gradients_are_bitwise_repeatable(backend: str) -> None:
    case = variant(lengths=[3, 150, 0, 20])
    first, second = run(case, backend), run(case, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_any_schedule_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = variant(lengths=[5, 90, 0, 20, 1, 40])
    truth = exact(case, case.tensors())
    for least_rows in (3, 64, 10_000):
        for table in (settings.FORWARD, settings.BACKWARD_TOKENS, settings.BACKWARD_WEIGHTS):
            for key, launch in table.items():
                monkeypatch.setitem(table, key, launch._replace(least_rows=least_rows))
        for name, result in run(case, "triton").items():
            torch.testing.assert_close(result.double(), truth[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_vectors_read_again_in_every_tile_give_the_same_result(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = variant(activation=activation, lengths=[5, 90, 0, 20, 1, 40])
    expected = run(case, "triton")
    for key, launch in settings.FORWARD.items():
        monkeypatch.setitem(settings.FORWARD, key, launch._replace(fresh=not launch.fresh))
    for name, result in run(case, "triton").items():
        assert torch.equal(result, expected[name]), name


def test_large_scores_do_not_overflow() -> None:
    for activation, scale in (("relu", 1e4), ("sigmoid", -1e4)):
        check(variant(activation=activation, scale=scale, lengths=[0, 40, 1, 64]))


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    with pytest.raises(NotImplementedError, match=r'backend "triton".*float64'):
        run(variant(dtype=torch.float64), "triton")
    with pytest.raises(NotImplementedError, match=r'backend "triton".*1 to 3 hidden layers, not 4'):
        run(variant(hidden=(4, 4, 4, 4)), "triton")
    with pytest.raises(
        NotImplementedError, match=r'backend "triton".*hidden layers up to 512 wide, not 5 and 600'
    ):
        run(variant(dim=5, hidden=(600,)), "triton")


def test_autocast_casts_and_gradients_keep_the_dtype_of_their_tensor() -> None:
    case = variant()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = run(case, "torch")
    truth = exact(case, case.tensors())
    assert results["out"].dtype == torch.bfloat16
    for name, result in results.items():
        if name.startswith("grad"):
            assert result.dtype == torch.float32
            torch.testing.assert_close(result.double(), truth[name], rtol=0.1, atol=0.1, msg=name)
