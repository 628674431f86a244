"""Every provider of every case, under pytest-benchmark.

One thread on a CPU; a GPU is used where there is one. `recattn bench` times the same calls in turns, which is
what ratios should be taken from; this suite is for histories of one machine (`--benchmark-autosave`). Some of it:
`pytest benchmarks -k "self_attention and forward+backward"`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn.bench.cases import CASES
from recattn.bench.measure import verified
from recattn.bench.task import Case, Setting, Task
from recattn.bench.timing import Meter, meter_for
from recattn.data import Interactions, fetch_movielens, read_movielens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def meter() -> Meter:
    return meter_for(DEVICE)


@lru_cache(maxsize=1)
def movielens() -> Interactions:
    return read_movielens(fetch_movielens())


@lru_cache(maxsize=1)
def task_of(case: Case) -> Task:
    torch.compiler.reset()
    return case.task(Setting(DEVICE, log=movielens() if case.needs_log else None))


@lru_cache(maxsize=1)
def expected(case: Case, mode: str) -> list[Tensor]:
    return task_of(case).reference().result(mode)


def pytest_generate_tests(metafunc: Any) -> None:
    calls = [
        pytest.param(case, mode, provider, id=f"{case.op}-{case.name}-{mode}-{provider}")
        for case in CASES
        for mode in case.modes
        for provider in case.providers
    ]
    metafunc.parametrize(("case", "mode", "provider"), calls)


@pytest.mark.benchmark(min_rounds=3, max_time=1.0, warmup=False)
def test_case(benchmark: Any, meter: Meter, case: Case, mode: str, provider: str) -> None:
    try:
        task = task_of(case)
    except RuntimeError as error:
        if not case.needs_log:
            raise
        pytest.skip(f"no log: {error}")
    try:
        prepared = task.providers[provider]()
        deviation = verified(prepared.result(mode), expected(case, mode), task)
    except (ModuleNotFoundError, NotImplementedError) as error:
        pytest.skip(str(error))
    run = prepared.run(mode)
    peak = meter.peak_bytes(run)
    ready = meter.ready(run)
    benchmark.group = f"{case.op}, {case.name}, {mode}"
    benchmark.extra_info.update(deviation=deviation, peak_bytes=peak, setting=task.description)

    def finished() -> None:
        ready()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
