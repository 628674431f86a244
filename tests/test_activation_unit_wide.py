"""activation_unit at widths beyond what a program can keep: in Triton's interpreter, against the formula in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from activation_unit_cases import HISTORIES, Case, assert_within_budget, call, exact, variant
from activation_unit_statistics_cases import assert_statistics_within_budget, statistics
from recattn.kernels import settings
from torch import Tensor

import recattn
from recattn import functional
from recattn.inspect.recording import recorded_launches

ACTIVATIONS = ("sigmoid", "relu", "leaky_relu", "prelu", "silu", "gelu", "tanh", "identity", "dice")
PRECISIONS = {"tf32": torch.float32, "ieee": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HIDDEN = (144, 40)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def chunks_of(monkeypatch: pytest.MonkeyPatch, rows: int, share: int) -> None:
    """Chunks of so many positions, and programs that take a share of them."""
    light = settings.WIDE_HISTORIES._replace(least_rows=share, block=32)
    monkeypatch.setattr(settings, "WIDE_HISTORIES", light)
    monkeypatch.setattr(settings, "chunk_rows", lambda *_: rows)


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the sequences of a test between programs, and between chunks."""
    for table in (settings.FORWARD, settings.WIDE_SCORES, settings.WIDE_BACKWARD):
        for key, launch in table.items():
            block = launch.block if table is settings.FORWARD else 32
            monkeypatch.setitem(table, key, launch._replace(least_rows=24, block=block))
    chunks_of(monkeypatch, 96, 24)


@pytest.fixture(autouse=True)
def products_in_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(
    params=["ieee", "bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tf32", "fp16"))]
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == "ieee":
        torch.set_float32_matmul_precision("highest")
    return PRECISIONS[request.param]


def run(case: Case, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    with recattn.backend("triton"):
        return call(functional.activation_unit, case, case.tensors() if tensors is None else tensors)


def check_statistics(layer: int, **changes: Any) -> None:
    case = variant(**{"hidden": HIDDEN} | changes)
    with recattn.backend("triton"):
        got = statistics(functional.activation_unit_statistics, case, case.tensors(), layer)
    assert_statistics_within_budget(case, layer, got, case.tensors())


def check(**changes: Any) -> None:
    case = variant(**{"hidden": HIDDEN} | changes)
    assert_within_budget(case, run(case), case.tensors())


@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
def test_kernels_equal_the_formula_over_every_kind_of_history(lengths: list[int], dtype: torch.dtype) -> None:
    check(lengths=lengths, dtype=dtype)


@pytest.mark.parametrize(
    ("dim", "hidden"),
    [
        (130, (150,)),
        (256, (20, 12)),
        (18, (160, 136, 20)),
        (5, (3, 129)),
        (36, (7, 40, 130)),
        (64, (512, 256)),
    ],
)
def test_kernels_equal_the_formula_at_every_width(
    dim: int, hidden: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(dim=dim, hidden=hidden, dtype=dtype, lengths=[0, 40, 3])


@pytest.mark.parametrize("hidden", [(144,), (144, 40), (40, 144, 20)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_equal_the_formula_for_every_activation(activation: str, hidden: tuple[int, ...]) -> None:
    check(activation=activation, hidden=hidden, lengths=[0, 40, 3], return_scores=True)


@pytest.mark.parametrize("hidden", [(144,), (144, 40), (40, 144, 20)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_equal_the_formula_with_dropout(activation: str, hidden: tuple[int, ...]) -> None:
    check(activation=activation, hidden=hidden, lengths=[0, 40, 3], dropout=0.3)


@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_dropout_is_that_of_the_formula_in_every_precision(activation: str, dtype: torch.dtype) -> None:
    check(activation=activation, dropout=0.3, dtype=dtype)


@pytest.mark.parametrize("activation", ["sigmoid", "silu", "gelu", "tanh", "identity", "dice"])
def test_every_activation_stays_within_the_budget_of_16_bits(activation: str) -> None:
    check(activation=activation, dtype=torch.bfloat16)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu"])
def test_every_activation_with_a_kink_stays_within_the_budget_of_16_bits(activation: str) -> None:
    check(activation=activation, dim=130, hidden=(20, 12), lengths=[0, 40, 3], dtype=torch.bfloat16)


@pytest.mark.parametrize("normalize", ["softmax", "none", "exp", "sigmoid"])
@pytest.mark.parametrize("return_scores", [False, True])
def test_kernels_equal_the_formula_for_every_normalization(normalize: str, return_scores: bool) -> None:
    check(normalize=normalize, return_scores=return_scores)


@pytest.mark.parametrize("value_dim", [7, 140])
def test_values_may_have_another_width(value_dim: int, dtype: torch.dtype) -> None:
    check(value_dim=value_dim, return_scores=True, dtype=dtype)
    check(value_dim=140, hidden=(20, 12), lengths=[0, 40, 3])


def test_offsets_may_be_int32() -> None:
    check(offsets_dtype=torch.int32)


@pytest.mark.parametrize("unique_rows", [False, True])
@pytest.mark.parametrize("value_dim", [None, 7])
def test_kernels_read_a_table(unique_rows: bool, value_dim: int | None) -> None:
    check(table=200 if unique_rows else 9, unique_rows=unique_rows, value_dim=value_dim, return_scores=True)


def test_slack_rows_are_neither_read_nor_given_a_gradient() -> None:
    case = variant(hidden=HIDDEN, return_scores=True, value_dim=9, slack=150)
    results = run(case)
    assert_within_budget(case, results, case.tensors())
    for name in ("scores", "grad keys", "grad values"):
        assert (results[name][-case.slack :] == 0).all(), name


def test_rows_may_lie_apart() -> None:
    case = variant(hidden=HIDDEN, value_dim=9)
    tensors = case.tensors()
    strided = {
        name: torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=1)[:, 0]
        for name, tensor in tensors.items()
    }
    expected = run(case, tensors)
    for name, result in run(case, strided).items():
        torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-5, msg=name)


def test_gradients_are_bitwise_repeatable() -> None:
    case = variant(hidden=HIDDEN, lengths=[3, 150, 0, 20])
    first, second = run(case), run(case)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("rows", "share"), [(32, 1), (64, 64), (10_240, 256)])
def test_any_chunks_give_the_same_result(monkeypatch: pytest.MonkeyPatch, rows: int, share: int) -> None:
    chunks_of(monkeypatch, rows, share)
    case = variant(hidden=HIDDEN, lengths=[5, 150, 0, 20, 1, 60])
    truth = exact(case, case.tensors())
    for name, result in run(case).items():
        torch.testing.assert_close(result.double(), truth[name], rtol=1e-4, atol=1e-4, msg=name)


def test_backward_keeps_no_more_than_a_chunk() -> None:
    case = variant(hidden=HIDDEN, lengths=[150, 300])
    with recorded_launches() as launches:
        run(case)
    chunks = [args[5] for kernel, args, _ in launches if kernel.__name__ == "recompute_kernel"]
    assert [chunk.first for chunk in chunks] == [0, 96, 192, 288, 384]
    for chunk in chunks:
        kept = [chunk.pairs, *chunk.units, *chunk.grads, chunk.attention]
        assert max(tensor.shape[0] for tensor in kept) == 96


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("activation", ["sigmoid", "prelu", "dice"])
def test_statistics_equal_the_formula_behind_every_layer(activation: str, layer: int) -> None:
    hidden = [144, 40, 20] if layer == 1 else [40, 144, 20]
    check_statistics(layer, activation=activation, dropout=0.3, hidden=hidden, lengths=[0, 40, 3])


@pytest.mark.parametrize("lengths", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("layer", [1, 2])
def test_statistics_equal_the_formula_over_every_kind_of_history(
    lengths: list[int], layer: int, dtype: torch.dtype
) -> None:
    check_statistics(layer, lengths=lengths, dtype=dtype)


@pytest.mark.parametrize(
    "data", [{"table": 50}, {"table": 200, "unique_rows": True}, {"slack": 150}], ids=str
)
def test_statistics_read_a_table_and_no_slack(data: dict[str, Any]) -> None:
    check_statistics(2, **data)


def test_statistics_keep_their_digits_where_a_mean_is_large() -> None:
    case = variant(hidden=HIDDEN, lengths=[90, 0, 150])
    tensors = case.tensors()
    tensors["bias 0"] += 1000.0
    tensors["weight 0"] *= 0.1
    torch.set_float32_matmul_precision("highest")
    with recattn.backend("triton"):
        got = statistics(functional.activation_unit_statistics, case, tensors, 1)
    assert_statistics_within_budget(case, 1, got, tensors)
    assert (got["mean"].square() / got["variance"]).min() > 1e5


def test_what_no_wide_kernel_covers_is_said() -> None:
    def message(case: Case) -> str:
        with pytest.raises(NotImplementedError, match='backend "triton"') as error:
            run(case)
        return str(error.value)

    assert "up to 256 and hidden layers up to 512 wide, not 18 and 513" in message(variant(hidden=(513,)))
    assert "up to 256 and hidden layers up to 512 wide, not 257 and 20" in message(variant(dim=257))
    shared = variant(hidden=HIDDEN, lengths=[3, 4], candidates=[2, 1])
    assert "queries that share histories" in message(shared)


def test_a_device_with_too_little_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_shared_memory", lambda _: 16 << 10)
    with pytest.raises(NotImplementedError, match="the shared memory of this device does not hold a tile"):
        run(variant(hidden=HIDDEN))
