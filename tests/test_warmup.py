"""warmup compiles whatever a call may need; autotune keeps the fastest settings, by kind of call."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recattn.kernels import tuning

import recattn
from recattn import Jagged
from recattn.inspect.recording import recorded_launches

LONG, SHORT = [200, 0, 100], [3, 0, 2, 5]


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_stored", {})


def unit(**options: Any) -> recattn.nn.ActivationUnit:
    torch.manual_seed(0)
    return recattn.nn.ActivationUnit(16, (16, 8), dtype=torch.bfloat16, **options)


def batch(lengths: list[int]) -> tuple[torch.Tensor, Jagged]:
    keys = torch.randn(sum(lengths), 16, dtype=torch.bfloat16)
    query = torch.randn(len(lengths), 16, dtype=torch.bfloat16)
    return query, Jagged.from_lengths(keys, torch.tensor(lengths))


def kernels(run: Callable[[], Any]) -> set[tuple[Any, ...]]:
    """What would be compiled: kernels with their constants."""
    with recorded_launches() as launches, recattn.backend("triton"):
        run()
    return {(kernel.fn.__name__, *sorted(constants.items())) for kernel, _, constants in launches}


@pytest.mark.parametrize("lengths", [LONG, SHORT])
@pytest.mark.parametrize("training", [False, True])
def test_after_a_warmup_with_one_batch_no_other_compiles_anything(lengths: list[int], training: bool) -> None:
    layer = unit().train(training)
    compiled = kernels(lambda: recattn.warmup(layer, *batch([2, 1])))

    def run() -> None:
        out = layer(*batch(lengths))
        if training:
            out.sum().backward()

    assert kernels(run) <= compiled
    assert any(name == "tokens_kernel" for name, *_ in compiled) == training


def test_a_warmup_leaves_nothing_behind() -> None:
    layer = unit(batch_norm=True, dropout=0.5)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    example = batch(SHORT)
    before = torch.get_rng_state()
    recattn.warmup(layer, *example)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(p.grad is None for p in layer.parameters())
    assert layer.training


def launches(layer: recattn.nn.ActivationUnit, lengths: list[int]) -> list[dict[str, Any]]:
    with recorded_launches() as recorded, recattn.backend("triton"), torch.no_grad():
        layer(*batch(lengths))
    return [constants for kernel, _, constants in recorded if kernel.fn.__name__ == "_forward_kernel"]


def test_autotuning_keeps_what_a_timer_prefers_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = unit().eval()

    def timer(call: Callable[[], Any]) -> float:
        with recorded_launches() as recorded:
            call()
        constants = next(c for kernel, _, c in recorded if kernel.fn.__name__ == "_forward_kernel")
        if constants["num_warps"] == 8:
            raise RuntimeError("out of registers")
        return 1.0 if constants["num_warps"] == 2 else 2.0

    default = launches(layer, LONG)[0]["num_warps"]
    with recattn.backend("triton"):
        (result,) = recattn.autotune(layer, *batch(LONG), timer=timer)
    assert result.kernel == "forward half 16x16x8"
    assert (result.default.num_warps, result.launch.num_warps) == (default, 2)
    assert (result.default_milliseconds, result.milliseconds) == (2.0, 1.0)
    assert list(result.failed.values()) == ["RuntimeError: out of registers"]
    (path,) = Path(tuning.cache_file(torch.device("cpu"))).parent.iterdir()
    assert json.loads(path.read_text())["forward half 16x16x8"]["num_warps"] == 2

    assert launches(layer, LONG)[0]["num_warps"] == default  # results are taken on request only
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_stored", {})  # as in another process
    for lengths in (LONG, [100] * 7, [1000]):
        assert launches(layer, lengths)[0]["num_warps"] == 2


def test_threads_that_tune_at_the_same_time_keep_what_each_found() -> None:
    default = tuning.Launch(32, 1, 1, 16, (16, 16), 16, 256, 8)
    device = torch.device("cpu")
    start = threading.Barrier(2)
    results: dict[str, list[tuning.Tuned]] = {}

    def tune(kernel: str, warps: int) -> None:
        used: list[tuning.Launch] = []

        def timer(call: Callable[[], Any]) -> float:
            call()
            time.sleep(1e-4)  # lets the other thread go on
            return 1.0 if used[-1].num_warps == warps else 2.0

        start.wait()
        results[kernel] = tuning.autotune(
            lambda: used.append(tuning.tuned(kernel, "half", default, 16, (16,), device)), device, timer
        )

    threads = [threading.Thread(target=tune, args=case) for case in (("one", 4), ("other", 8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {kernel: [(r.kernel, r.launch.num_warps) for r in of] for kernel, of in results.items()}
    assert found == {"one": [("one half 16x16", 4)], "other": [("other half 16x16", 8)]}
    kept = json.loads(tuning.cache_file(device).read_text())
    assert {key: launch["num_warps"] for key, launch in kept.items()} == {
        "one half 16x16": 4,
        "other half 16x16": 8,
    }


def test_the_default_timer_takes_the_median() -> None:
    spent = iter([0.001, 0.02, 0.001])
    assert tuning.milliseconds(lambda: time.sleep(next(spent)), torch.device("cpu")) < 10
