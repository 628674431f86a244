"""Time and peak memory of a call, on the host or on an accelerator, and fair series of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]


class Meter(Protocol):
    """Measures one call on one device."""

    def milliseconds(self, run: Run) -> float: ...

    def peak_bytes(self, run: Run) -> int:
        """The most bytes of tensors alive at once during the call, over those alive before it."""
        ...


class HostMeter:
    """The CPU: a monotonic clock, and the allocations of PyTorch's allocator."""

    def milliseconds(self, run: Run) -> float:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3

    def peak_bytes(self, run: Run) -> int:
        # The process's resident size would say little: the C library keeps and reuses what is freed.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each profile is announced on stderr
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = run()
        del result
        assert profiler.profiler is not None
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return int(np.cumsum([0, *sizes]).max())


class AcceleratorMeter:
    """CUDA and ROCm: device events, and the statistics of the caching allocator.

    Args:
        device: a CUDA device.
        cold: whether to overwrite the L2 cache before each timed call.
    """

    def __init__(self, device: torch.device, cold: bool = False) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if cold:
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * size, dtype=torch.int8, device=device)

    def milliseconds(self, run: Run) -> float:
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self._flush is not None:
                self._flush.zero_()
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end)

    def peak_bytes(self, run: Run) -> int:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def meter_for(device: torch.device, cold: bool = False) -> Meter:
    """The meter of a device.

    Raises:
        ValueError: for a device that is neither a CPU nor CUDA (which ROCm counts as), and for a cold cache
            on a CPU.
    """
    if device.type == "cuda":
        return AcceleratorMeter(device, cold)
    if device.type != "cpu":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if cold:
        raise ValueError("cold: expected False for a CPU, whose cache is not flushed, got True")
    return HostMeter()


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one call, in milliseconds."""

    samples: tuple[float, ...]

    @property
    def ms(self) -> float:
        """The median."""
        return self.percentile(50)

    def percentile(self, q: float) -> float:
        """The q-th percentile, interpolated linearly between samples; q from 0 to 100."""
        return float(np.percentile(self.samples, q))


def interleave(
    runs: Mapping[str, Run],
    meter: Meter,
    *,
    budget: float,
    rounds: tuple[int, int] = (5, 200),
) -> dict[str, Timing | str]:
    """Times several calls in turns, A B C A B C ..., so that whatever else the machine does hits all alike.

    A turn is one call that is not timed and one that is: no call pays for the caches and the heap that the
    one before it in the round left behind.

    Args:
        runs: the calls by name, already compiled.
        meter: of the device that they run on.
        budget: seconds after which no further round begins.
        rounds: at least and at most so many rounds, whatever the budget.

    Returns:
        By name the timings, or what the call raised, in words: it drops out, and the others go on.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    begin = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - begin > budget:
            break
        for name, run in runs.items():
            if name in failures:
                continue
            try:
                run()
                samples[name].append(meter.milliseconds(run))
            except Exception as error:
                failures[name] = describe(error)
    return {name: failures.get(name) or Timing(tuple(samples[name])) for name in runs}


def describe(error: Exception) -> str:
    """One line that says what was raised. It holds on to none of the tensors that a traceback does."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
