"""activation_unit by every provider on every case, under pytest-benchmark.

One thread on a CPU; a GPU is used where there is one. `recattn bench` times the same calls in turns, which is
what ratios should be taken from; this suite is for histories of one machine (`--benchmark-autosave`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from recattn.bench.cases import CASES, FROM_LOG, Case, Inputs, make_inputs
from recattn.bench.measure import MODES, first_call, reference_result, runnable
from recattn.bench.providers import PROVIDERS
from recattn.bench.timing import meter_for
from recattn.data import Interactions, fetch_movielens, read_movielens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def movielens() -> Interactions:
    return read_movielens(fetch_movielens())


@lru_cache(maxsize=1)
def workload(case: Case) -> tuple[Inputs, list[torch.Tensor]]:
    """The tensors of the case, and the result to expect."""
    log = movielens() if case.lengths == FROM_LOG else None
    inputs = make_inputs(case, DEVICE, torch.float32, log=log)
    return inputs, reference_result(case, inputs)


@pytest.mark.benchmark(min_rounds=3, max_time=1.0, warmup=False)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_activation_unit(benchmark: Any, case: Case, mode: str, provider: str) -> None:
    try:
        inputs, expected = workload(case)
    except RuntimeError as error:
        if case.lengths != FROM_LOG:
            raise
        pytest.skip(f"no log: {error}")
    try:
        call = PROVIDERS[provider](case, inputs)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    run, meter = runnable(call, mode, inputs.grad), meter_for(DEVICE)
    first_ms, deviation = first_call(run, meter, case, inputs, expected)
    benchmark.group = f"{case.name}, {mode}"
    benchmark.extra_info.update(
        first_ms=first_ms,
        deviation=deviation,
        peak_bytes=meter.peak_bytes(run),
        setting=case.describe(inputs.fill),
    )

    def finished() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
