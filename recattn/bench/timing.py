"""Time and peak memory of a call, on the host or on an accelerator, and fair series of them."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
TURN_MS, TURN_CALLS = 5.0, 5
PRECISION = 0.02


class Meter(Protocol):
    """Measures one call on one device."""

    clock: str  # in words, what `milliseconds` counts

    def milliseconds(self, run: Run) -> float: ...

    def first_milliseconds(self, run: Run) -> float:
        """Of a call that may compile something, with all that anybody waits for."""
        ...

    def peak_bytes(self, run: Run) -> int:
        """The most bytes of tensors alive at once during the call, over those alive before it."""
        ...

    def ready(self, run: Run) -> Run:
        """The call as it is to be timed, after it was made once."""
        ...

    def available_bytes(self) -> int | None:
        """How much memory is free, if anyone knows."""
        ...

    def recover(self) -> None:
        """After a call that ran out of memory."""
        ...


class HostMeter:
    """The CPU, and the allocations of PyTorch's allocator.

    With one thread, time is what that thread had of a core: the same as on a clock where nothing else runs, and free of
    what waiting for a core adds where something does, which is more for long calls than for short ones. Several threads
    wait for each other, so that theirs is time on a clock.
    """

    def __init__(self) -> None:
        alone = torch.get_num_threads() == 1
        self._now = time.thread_time if alone else time.perf_counter
        self.clock = "CPU time of one thread" if alone else "time on a clock"

    def milliseconds(self, run: Run) -> float:
        begin = self._now()
        run()
        return (self._now() - begin) * 1e3

    def first_milliseconds(self, run: Run) -> float:
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

    def ready(self, run: Run) -> Run:
        return run

    def available_bytes(self) -> int | None:
        meminfo = Path("/proc/meminfo")
        if not meminfo.is_file():
            return None
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024

    def recover(self) -> None:
        gc.collect()


class AcceleratorMeter:
    """CUDA and ROCm: device events, and the statistics of the caching allocator.

    Args:
        device: a CUDA device.
        cold: whether to overwrite the L2 cache before each timed call.
        graph: whether to time replays of a graph of the call, without what launching its kernels costs the host.
        runtime: what has the interface of `torch.cuda`.
    """

    clock = "time between two events on the device"

    def __init__(
        self, device: torch.device, cold: bool = False, graph: bool = False, runtime: Any = torch.cuda
    ) -> None:
        self.device, self.graph, self.runtime = device, graph, runtime
        self._flush: torch.Tensor | None = None
        if cold:
            size = runtime.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * size, dtype=torch.int8, device=device)

    def milliseconds(self, run: Run) -> float:
        with self.runtime.device(self.device):
            begin, end = (self.runtime.Event(enable_timing=True) for _ in range(2))
            if self._flush is not None:
                self._flush.zero_()
            self.runtime.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end)

    def first_milliseconds(self, run: Run) -> float:
        return self.milliseconds(run)

    def peak_bytes(self, run: Run) -> int:
        gc.collect()
        self.runtime.synchronize(self.device)
        self.runtime.reset_peak_memory_stats(self.device)
        before = self.runtime.memory_allocated(self.device)
        run()
        self.runtime.synchronize(self.device)
        return self.runtime.max_memory_allocated(self.device) - before

    def ready(self, run: Run) -> Run:
        if not self.graph:
            return run
        with self.runtime.device(self.device):
            side = self.runtime.Stream()
            side.wait_stream(self.runtime.current_stream())
            with self.runtime.stream(side):  # what is made in the first calls is not to be captured
                for _ in range(3):
                    run()
            self.runtime.current_stream().wait_stream(side)
            graph = self.runtime.CUDAGraph()
            with self.runtime.graph(graph):
                run()
        return graph.replay

    def available_bytes(self) -> int | None:
        free, _ = self.runtime.mem_get_info(self.device)
        return free

    def recover(self) -> None:
        gc.collect()
        self.runtime.empty_cache()


def meter_for(device: torch.device, cold: bool = False, graph: bool = False) -> Meter:
    """The meter of a device.

    Raises:
        ValueError: for a device that is neither a CPU nor CUDA (which ROCm counts as), and for a cold cache
            or graphs on a CPU.
    """
    if device.type == "cuda":
        return AcceleratorMeter(device, cold, graph)
    if device.type != "cpu":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if cold:
        raise ValueError("cold: expected False for a CPU, whose cache is not flushed, got True")
    if graph:
        raise ValueError("graph: expected False for a CPU, which has no graphs, got True")
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


class Ratio(NamedTuple):
    """How many times as long as another a call takes: the median over rounds, and bounds that hold the true median
    with about 95 % probability."""

    low: float
    middle: float
    high: float

    @property
    def uncertainty(self) -> float:
        """Half of what lies between the bounds, as a share."""
        return (self.high - self.low) / (2 * self.middle)


def ratio(timing: Sequence[float], other: Sequence[float]) -> Ratio:
    """Of samples of the same rounds, one by one: whatever else the machine did in a round fell on both."""
    ratios = sorted(a / b for a, b in zip(timing, other, strict=True))
    n = len(ratios)
    below = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))  # ranks of a binomial distribution
    return Ratio(ratios[below], statistics.median(ratios), ratios[n - 1 - below])


def interleave(
    runs: Mapping[str, Run],
    meter: Meter,
    *,
    budget: float,
    rounds: tuple[int, int] = (5, 200),
    base: str | None = None,
) -> dict[str, Timing | str]:
    """Times several calls in turns, A B C C B A A B C ..., so that whatever else the machine does hits all alike, and
    what changes steadily favours none.

    A turn is one call that is not timed, so that none pays for the caches and the heap that the one before it left
    behind, and then some that are: one, or as many short ones as take `TURN_MS` together, but at most `TURN_CALLS`,
    whose median is the sample.

    Args:
        runs: the calls by name, already compiled.
        meter: of the device that they run on.
        budget: seconds after which no further round begins.
        rounds: at least and at most so many rounds, whatever the budget.
        base: what the others are compared with. Once the ratio of each to it is known to within `PRECISION`, there are
            no further rounds.

    Returns:
        By name the timings, or what the call raised, in words: it drops out, and the others go on.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    begin = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and (
            time.perf_counter() - begin > budget or _settled(samples, base, set(failures))
        ):
            break
        for name in list(runs) if done % 2 == 0 else list(runs)[::-1]:
            if name in failures:
                continue
            try:
                samples[name].append(_turn(runs[name], meter))
            except Exception as error:
                failures[name] = describe(error)
    return {name: failures.get(name) or Timing(tuple(samples[name])) for name in runs}


def _turn(run: Run, meter: Meter) -> float:
    run()
    calls = [meter.milliseconds(run)]
    while len(calls) < TURN_CALLS and sum(calls) < TURN_MS:
        calls.append(meter.milliseconds(run))
    return statistics.median(calls)


def _settled(samples: Mapping[str, Sequence[float]], base: str | None, failed: Collection[str]) -> bool:
    if base is None or base not in samples or base in failed:
        return False
    others = (series for name, series in samples.items() if name != base and name not in failed)
    return all(ratio(series, samples[base]).uncertainty <= PRECISION for series in others)


def describe(error: Exception) -> str:
    """One line that says what was raised. It holds on to none of the tensors that a traceback does."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is why a call failed."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
