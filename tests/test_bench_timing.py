import time
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from recattn.bench.timing import (
    AcceleratorMeter,
    HostMeter,
    Timing,
    describe,
    interleave,
    is_out_of_memory,
    meter_for,
)


class ScriptedMeter:
    """Runs the call and returns 1, 2, 3, ... milliseconds."""

    def __init__(self) -> None:
        self.timed = 0

    def milliseconds(self, run: Callable[[], object]) -> float:
        run()
        self.timed += 1
        return float(self.timed)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return 7


def test_calls_take_turns_and_the_first_of_each_turn_is_not_timed():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = interleave(runs, ScriptedMeter(), budget=0, rounds=(2, 2))
    assert "".join(order) == "aabbaabb"
    assert timings == {"a": Timing((1.0, 3.0)), "b": Timing((2.0, 4.0))}


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (60.0, 5)])
def test_rounds_stay_within_their_bounds_whatever_the_budget(budget: float, rounds: int):
    timings = interleave({"a": lambda: None}, ScriptedMeter(), budget=budget, rounds=(3, 5))
    assert isinstance(timings["a"], Timing)
    assert len(timings["a"].samples) == rounds


def test_no_round_begins_after_the_budget():
    timings = interleave({"a": lambda: time.sleep(0.02)}, ScriptedMeter(), budget=0.1, rounds=(1, 1000))
    assert isinstance(timings["a"], Timing)
    assert 1 <= len(timings["a"].samples) <= 3


def test_a_call_that_raises_drops_out_in_words_and_the_others_go_on():
    calls = 0

    def third_time_fails() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError("no room\nfor more")

    timings = interleave(
        {"bad": third_time_fails, "good": lambda: None}, ScriptedMeter(), budget=0, rounds=(4, 4)
    )
    assert timings["bad"] == "MemoryError: no room"
    assert isinstance(timings["good"], Timing)
    assert len(timings["good"].samples) == 4
    assert calls == 3


def test_median_and_percentiles_interpolate_between_samples():
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (timing.ms, timing.percentile(20), timing.percentile(80)) == pytest.approx((3.0, 1.8, 4.2))


def test_host_time_is_that_of_the_call():
    assert 20 <= HostMeter().milliseconds(lambda: time.sleep(0.02)) < 2000


def test_host_peak_is_the_most_alive_at_once_over_what_was_alive_before():
    before = torch.ones(1000)

    def run() -> torch.Tensor:
        a = before.clone()
        b = a.clone()
        del a
        return torch.cat([b, b])  # with b the peak: 3000 floats

    peak = HostMeter().peak_bytes(run)
    assert 12_000 <= peak < 12_100


def test_host_peak_of_a_call_that_allocates_nothing_is_zero():
    assert HostMeter().peak_bytes(lambda: None) == 0


def test_meters_exist_for_the_cpu_with_a_warm_cache():
    assert isinstance(meter_for(torch.device("cpu")), HostMeter)
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got meta"):
        meter_for(torch.device("meta"))
    with pytest.raises(ValueError, match="cold: expected False"):
        meter_for(torch.device("cpu"), cold=True)
    with pytest.raises(ValueError, match="graph: expected False"):
        meter_for(torch.device("cpu"), graph=True)
    assert isinstance(meter_for(torch.device("cuda")), AcceleratorMeter)


def test_an_error_is_described_in_one_line():
    assert describe(ValueError("  first\nsecond")) == "ValueError: first"
    assert describe(KeyError()) == "KeyError"
    assert len(describe(ValueError("x" * 1000))) == 200


# ---------------------------------------------------------------- a device that is not there


class FakeRuntime:
    """What `torch.cuda` offers a meter, on a device that takes 3 ms per call and 100 bytes; `log` has what was asked of
    it, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock, self.allocated, self.peak = 0.0, 1000, 0
        self.capturing = False

    def call(self) -> None:
        self.log.append("captured" if self.capturing else "call")
        self.clock += 3.0
        self.peak = max(self.peak, self.allocated + 100)

    @contextmanager
    def device(self, _device: object):
        yield

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace()

        def record() -> None:
            self.log.append("record")
            event.at = self.clock

        event.record = record
        event.synchronize = lambda: self.log.append("wait")
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def synchronize(self, _device: object = None) -> None:
        self.log.append("synchronize")

    def reset_peak_memory_stats(self, _device: object) -> None:
        self.peak = self.allocated

    def memory_allocated(self, _device: object) -> int:
        return self.allocated

    def max_memory_allocated(self, _device: object) -> int:
        return self.peak

    def mem_get_info(self, _device: object) -> tuple[int, int]:
        return 70, 100

    def empty_cache(self) -> None:
        self.log.append("empty")

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("wait for stream"))

    current_stream = Stream

    @contextmanager
    def stream(self, _stream: object):
        yield

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def graph(self, _graph: object):
        self.capturing = True
        yield
        self.capturing = False


def test_device_time_is_between_two_events_around_the_call_with_nothing_else_under_way():
    runtime = FakeRuntime()
    meter = AcceleratorMeter(torch.device("cuda"), runtime=runtime)
    assert meter.milliseconds(runtime.call) == 3.0
    assert runtime.log == ["synchronize", "record", "call", "record", "wait"]


def test_device_memory_is_the_peak_over_what_was_there_before():
    runtime = FakeRuntime()
    runtime.peak = 10**6  # of something before
    meter = AcceleratorMeter(torch.device("cuda"), runtime=runtime)
    assert meter.peak_bytes(runtime.call) == 100
    assert runtime.log == ["synchronize", "call", "synchronize"]
    assert meter.available_bytes() == 70
    meter.recover()
    assert runtime.log[-1] == "empty"


def test_a_graph_is_captured_once_after_calls_on_another_stream_and_then_replayed():
    runtime = FakeRuntime()
    plain = AcceleratorMeter(torch.device("cuda"), runtime=runtime)
    assert plain.ready(runtime.call) == runtime.call
    meter = AcceleratorMeter(torch.device("cuda"), graph=True, runtime=runtime)
    run = meter.ready(runtime.call)
    assert runtime.log == ["wait for stream", *["call"] * 3, "wait for stream", "captured"]
    runtime.log.clear()
    meter.milliseconds(run)
    assert runtime.log == ["synchronize", "record", "replay", "record", "wait"]


def test_running_out_of_memory_is_told_from_other_failures():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("no kernel"))


def test_free_memory_of_the_host_is_known_on_linux():
    free = HostMeter().available_bytes()
    assert free is None or free > 2**20
