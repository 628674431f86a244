"""No kernel touches memory that it was not given, nor reads what nobody has written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import activation_unit_cases
import activation_unit_statistics_cases as statistics_cases
import attentional_gru_cases
import pairwise_pool_cases
import pytest
import self_attention_cases
import target_attention_cases
import torch
import triton
import triton.language as tl
from guarded_memory import Guards, Launch, guarded_memory
from recattn.kernels import settings, target_attention_settings
from triton.runtime.errors import InterpreterError

import recattn
from recattn import functional
from recattn.inspect.recording import modules, recorded_launches

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = (0, 1, 20, 0, 33, 3)
TABLES = (
    settings.FORWARD,
    settings.BACKWARD_TOKENS,
    settings.BACKWARD_WEIGHTS,
    target_attention_settings.QUERY_FORWARD,
    target_attention_settings.QUERY_BACKWARD,
)


@pytest.fixture(autouse=True)
def short_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives programs so few rows that histories are cut."""
    for table in TABLES:
        for key, launch in table.items():
            monkeypatch.setitem(table, key, launch._replace(least_rows=24))


@pytest.fixture
def guards() -> Iterator[Guards]:
    """Guard zones around the tensors of every launch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other over tensors this small
    with guarded_memory() as guards:
        yield guards
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Run:
    """Forward and backward of a case."""

    cases: Any  # the module
    function: Callable[..., Any]
    case: Any
    short: bool = False  # whether the kernels for short histories or many candidates run

    def __call__(self) -> None:
        with settings.assuming(short=self.short):
            got = self.call()
        self.cases.assert_within_budget(self.case, got, self.case.tensors())

    @property
    def is_empty(self) -> bool:
        if isinstance(self.case, pairwise_pool_cases.Case):
            return not self.case.batch or self.case.count < 2
        return not any(self.case.lengths)

    def call(self) -> dict[str, torch.Tensor]:
        return self.cases.call(self.function, self.case, self.case.tensors())


@dataclass(frozen=True)
class Statistics(Run):
    """Of the last hidden layer."""

    def __call__(self) -> None:
        layer = len(self.case.hidden)
        statistics_cases.assert_statistics_within_budget(self.case, layer, self.call(), self.case.tensors())

    def call(self) -> dict[str, torch.Tensor]:
        layer = len(self.case.hidden)
        return statistics_cases.statistics(self.function, self.case, self.case.tensors(), layer)


MLP = activation_unit_cases.Case(lengths=LENGTHS, dim=18, hidden=(20, 12))
DOT = target_attention_cases.Case(lengths=LENGTHS, heads=2, dim=9)
SELF = self_attention_cases.Case(lengths=LENGTHS, heads=2, dim=9)
GRU = attentional_gru_cases.Case(lengths=(0, 1, 9, 0, 17, 3), width=18, size=20)
BF16 = torch.bfloat16

RUNS: dict[str, Run] = {}
for name, changes in {
    "plain": {},
    "values and scores": {"value_dim": 7, "return_scores": True, "normalize": "none"},
    "bf16": {"dtype": BF16, "hidden": (36,)},
    "prelu": {"activation": "prelu"},
    "dice and dropout": {"activation": "dice", "dropout": 0.3},
    "candidates": {"candidates": (2, 0, 3, 1, 2, 0)},
    "rows": {"table": 29},
    "unique rows": {"table": 90, "unique_rows": True},
    "wide": {"dim": 20, "hidden": (136, 20), "lengths": (0, 5, 33), "dtype": BF16},
    "wide, dice and dropout": {
        "dim": 20,
        "hidden": (20, 136),
        "lengths": (0, 5, 33),
        "activation": "dice",
        "dropout": 0.3,
    },
    "no history": {"lengths": ()},
    "only empty ones": {"lengths": (0, 0)},
}.items():
    RUNS[f"activation_unit, {name}"] = Run(
        activation_unit_cases, functional.activation_unit, replace(MLP, **changes)
    )
for name, changes in {
    "packed": {},
    "packed, dice and dropout": {"activation": "dice", "dropout": 0.3},
    "many candidates": {"candidates": (4, 5, 1), "lengths": (37, 0, 3), "hidden": (16, 12), "value_dim": 7},
}.items():
    RUNS[f"activation_unit, {name}"] = Run(
        activation_unit_cases, functional.activation_unit, replace(MLP, dtype=BF16, **changes), short=True
    )
for name, changes in {"classic": {}, "wide": {"hidden": (136, 20), "lengths": (0, 5, 33)}}.items():
    RUNS[f"activation_unit_statistics, {name}"] = Statistics(
        statistics_cases,
        functional.activation_unit_statistics,
        replace(MLP, activation="dice", dropout=0.2, **changes),
    )
for name, changes in {
    "plain": {},
    "one head": {"heads": 1, "dim": 18, "dtype": BF16},
    "bias by head and values": {"bias": "by head", "value_dim": 7, "return_lse": True},
    "shared bias": {"bias": "shared", "normalize": "sigmoid"},
    "candidates": {"candidates": (0, 3, 40, 1), "bias": "by head"},
    "rows": {"table": 29, "bias": "shared"},
    "candidates and rows": {"table": 29, "candidates": (0, 3, 1)},
    "no history": {"lengths": ()},
    "only empty ones": {"lengths": (0, 0)},
}.items():
    RUNS[f"target_attention, {name}"] = Run(
        target_attention_cases, functional.target_attention, replace(DOT, **changes)
    )
for name, changes in {
    "plain": {},
    "causal, bias by place, dropout": {"causal": True, "buckets": 9, "dropout": 0.3},
    "hide_self, bias by time": {"hide_self": True, "buckets": 12, "by_time": True, "value_dim": 7},
    "bf16": {"dtype": BF16, "dim": 18},
    "no sequence": {"lengths": ()},
    "only empty ones": {"lengths": (0, 0)},
}.items():
    RUNS[f"self_attention, {name}"] = Run(
        self_attention_cases, functional.self_attention, replace(SELF, **changes)
    )
for name, changes in {
    "plain": {},
    "agru": {"kind": "agru", "initial": False},
    "aigru": {"kind": "aigru", "dtype": BF16},
    "gru": {"kind": "gru", "reset_after": False},
    "wide": {"width": 70, "size": 80, "dtype": BF16, "lengths": (3, 0, 9, 1)},
    "many units": {"size": 80, "lengths": (3, 0, 9, 1)},
    "rows": {"table": 29, "row_scores": True},
    "unique rows": {"table": 90, "unique_rows": True, "row_scores": True, "kind": "aigru"},
    "no history": {"lengths": ()},
    "only empty ones": {"lengths": (0, 0)},
}.items():
    RUNS[f"attentional_gru, {name}"] = Run(
        attentional_gru_cases, functional.attentional_gru, replace(GRU, **changes)
    )
for name, changes in {
    "plain": {},
    "dropout and weights": {"dropout": 0.3, "return_weights": True},
    "bf16": {"dtype": BF16, "count": 9},
    "wide": {"dim": 40, "hidden": 36, "count": 4, "batch": 5},
    "no pair": {"count": 1},
    "no sample": {"batch": 0},
}.items():
    RUNS[f"pairwise_pool, {name}"] = Run(
        pairwise_pool_cases, functional.pairwise_pool, replace(pairwise_pool_cases.Case(), **changes)
    )


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_forward_and_backward_touch_only_what_they_are_given(run: Run, guards: Guards) -> None:
    with recattn.backend("triton"):
        run()
    assert guards.accesses or run.is_empty


def test_every_kernel_of_the_package_runs_under_guard() -> None:
    """So that a new one is not left out."""
    of_gluon = {"scan_mma_kernel", "reverse_mma_kernel"}  # which no interpreter runs
    kernels = {
        value for module in modules() for name, value in vars(module).items() if name.endswith("_kernel")
    }
    with recorded_launches() as launches, recattn.backend("triton"):
        for run in RUNS.values():
            with settings.assuming(short=run.short):
                run.call()
    left_out = {kernel.fn.__qualname__ for kernel in kernels - {kernel for kernel, *_ in launches}}
    assert left_out == of_gluon


# ---------------------------------------------------------------- planted faults are caught


@triton.jit
def rows_kernel(
    out, x, SHIFT: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, DIM: tl.constexpr
):
    """Copies rows of 5 elements, in tiles of 8."""
    row = tl.program_id(0) + SHIFT
    column = tl.arange(0, 8)
    inside = column < DIM
    if MASK_LOAD:
        value = tl.load(x + row * DIM + column, mask=inside, other=0.0)
    else:
        value = tl.load(x + row * DIM + column)
    if MASK_STORE:
        tl.store(out + row * DIM + column, value, mask=inside)
    else:
        tl.store(out + row * DIM + column, value)


@triton.jit
def atomic_kernel(out, SHIFT: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, 4) + SHIFT, 1.0)


def copy_rows(shift: int = 0, mask_load: bool = True, mask_store: bool = True) -> torch.Tensor:
    x, out = torch.ones(3, 5), torch.empty(3, 5)
    rows_kernel[(3,)](out, x, shift, mask_load, mask_store, DIM=5)
    return out


def test_a_kernel_without_a_fault_passes_and_its_result_comes_back() -> None:
    with guarded_memory() as guards:
        assert (copy_rows() == 1).all()
    assert guards.kernels == {"rows_kernel"}
    assert guards.accesses == 6


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"mask_load": False}, "a load outside every tensor, 3 of 8 addresses"),
        ({"mask_store": False}, "a store outside every tensor, 3 of 8 addresses"),
        ({"shift": 1}, "a load outside every tensor, 5 of 5 addresses"),
        ({"shift": -1}, "a load outside every tensor, 5 of 5 addresses"),
        ({"shift": 40_000}, "a load outside every tensor, 5 of 5 addresses"),
    ],
    ids=["no mask on the load", "no mask on the store", "row past the end", "row in front", "far away"],
)
def test_a_planted_fault_is_caught(fault: dict[str, Any], what: str) -> None:
    with guarded_memory(), pytest.raises(InterpreterError, match=f"rows_kernel: {what}"):
        copy_rows(**fault)


def test_a_planted_atomic_past_the_end_is_caught() -> None:
    with guarded_memory(), pytest.raises(InterpreterError, match="an atomic outside every tensor, 1 of 4"):
        atomic_kernel[(1,)](torch.zeros(4), 1)


def test_a_planted_store_into_the_gap_between_the_rows_of_a_view_is_caught() -> None:
    gaps = torch.zeros(3, 8)[:, :5]
    with guarded_memory(), pytest.raises(InterpreterError, match="a store outside every tensor, 3 of 5"):
        rows_kernel[(3,)](gaps, torch.ones(3, 5), 0, True, True, DIM=5)


def test_a_guard_zone_that_was_written_to_is_noticed() -> None:
    """By any way around the checks."""
    launch = Launch("some_kernel")
    copy = launch.guarded(torch.zeros(3))
    copy.as_strided((1,), (1,), copy.storage_offset() + 3).zero_()
    with pytest.raises(AssertionError, match="some_kernel wrote to a guard zone"):
        launch.finish()


def test_a_read_of_what_nobody_has_written_gives_nan() -> None:
    out = torch.zeros(3, 5)
    rows_kernel[(3,)](out, torch.empty(3, 5), 0, True, True, DIM=5)
    assert out.isnan().all()
