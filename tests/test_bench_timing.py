import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from recattn.bench.measure import measure
from recattn.bench.task import Setting
from recattn.bench.tasks.activation_unit import ActivationUnit
from recattn.bench.timing import (
    PRECISION,
    AcceleratorMeter,
    HostMeter,
    Ratio,
    Timing,
    describe,
    interleave,
    is_out_of_memory,
    meter_for,
    ratio,
)


class ScriptedMeter:
    """Runs the call and returns a number of milliseconds that grows from call to call."""

    clock = "made up"

    def __init__(self, first: float = 1.0, step: float = 1.0) -> None:
        self.timed, self.first, self.step = 0, first, step

    def milliseconds(self, run: Callable[[], object]) -> float:
        run()
        self.timed += 1
        return self.first + (self.timed - 1) * self.step

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return 7


class Steady:
    """A call takes as many milliseconds as it returns."""

    clock = "made up"

    def milliseconds(self, run: Callable[[], float]) -> float:
        return run()


class Noisy:
    """A machine on which a call takes as long as it says, in milliseconds, but for what else the machine does."""

    clock = "made up"

    def __init__(self, *, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.calls = 0

    def milliseconds(self, run: Callable[[], float]) -> float:
        """Slower by up to a third for some hundred calls at a time, by a few percent from call to call, and every
        tenth call three times as slow."""
        self.calls += 1
        phase = 1 + 0.33 * (self.calls // 150 % 2)
        outlier = 3.0 if self.random.random() < 0.1 else 1.0
        return run() * phase * outlier * self.random.lognormvariate(0, 0.05)


def test_calls_take_turns_there_and_back_and_the_first_of_each_turn_is_not_timed():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    meter = ScriptedMeter(10.0)
    timings = interleave(runs, meter, budget=0, rounds=(2, 2))
    assert "".join(order) == "aabbbbaa"
    assert timings == {"a": Timing((10.0, 13.0)), "b": Timing((11.0, 12.0))}


def test_a_turn_of_short_calls_has_several_and_their_median_counts():
    timings = interleave({"a": lambda: None}, ScriptedMeter(), budget=0, rounds=(1, 1))
    assert timings == {"a": Timing((2.0,))}  # of 1, 2 and 3 ms, which are 5 ms or more together
    brief = ScriptedMeter(0.0, step=0.01)
    timings = interleave({"a": lambda: None}, brief, budget=0, rounds=(1, 1))
    assert brief.timed == 5
    assert timings["a"].ms == pytest.approx(0.02)


def test_a_ratio_is_the_median_over_rounds_and_known_as_well_as_they_agree():
    assert ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == Ratio(2.0, 3.0, 4.0)
    own = [float(n) for n in range(1, 101)]  # the machine gets slower
    other = [3 * t * (1 + 0.001 * (n % 5 - 2)) for n, t in enumerate(own)]
    assert ratio(other, own).middle == pytest.approx(3.0)
    assert ratio(other, own).uncertainty < 0.002
    spoiled = [10 * t if n % 3 == 0 else t for n, t in enumerate(other)]
    assert ratio(spoiled, own).middle == pytest.approx(3.0, rel=0.01)


def test_rounds_end_once_all_ratios_are_known_or_the_budget_is_spent():
    fast, slow = (lambda: 6.0), (lambda: 18.0)
    timings = interleave({"own": fast, "other": slow}, Steady(), budget=60, rounds=(4, 500), base="own")
    assert len(timings["own"].samples) == 4
    meter = Noisy()
    timings = interleave({"own": fast, "other": slow}, meter, budget=60, rounds=(4, 2000), base="own")
    assert 10 < len(timings["own"].samples) < 1000
    assert ratio(timings["other"].samples, timings["own"].samples).uncertainty <= PRECISION
    alone = interleave({"other": slow}, Steady(), budget=60, rounds=(4, 30), base="own")
    assert len(alone["other"].samples) == 30


def test_two_runs_on_a_noisy_machine_agree_to_within_a_tenth():
    calls = {"own": lambda: 4.0, "a": lambda: 6.5, "b": lambda: 60.0, "c": lambda: 9.0}
    factors = []
    for seed in range(20):
        timings = interleave(calls, Noisy(seed=seed), budget=60, rounds=(7, 60), base="own")
        factors.append([ratio(timings[name].samples, timings["own"].samples).middle for name in "abc"])
    for expected, found in zip((1.625, 15.0, 2.25), zip(*factors, strict=True), strict=True):
        assert max(found) / min(found) < 1.1
        assert statistics.median(found) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (60.0, 5)])
def test_rounds_stay_within_their_bounds_whatever_the_budget(budget: float, rounds: int):
    timings = interleave({"a": lambda: None}, ScriptedMeter(), budget=budget, rounds=(3, 5))
    assert isinstance(timings["a"], Timing)
    assert len(timings["a"].samples) == rounds


def test_no_round_begins_after_the_budget():
    timings = interleave({"a": lambda: time.sleep(0.02)}, ScriptedMeter(9), budget=0.1, rounds=(1, 1000))
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
        {"bad": third_time_fails, "good": lambda: None}, ScriptedMeter(9), budget=0, rounds=(4, 4)
    )
    assert timings["bad"] == "MemoryError: no room"
    assert isinstance(timings["good"], Timing)
    assert len(timings["good"].samples) == 4
    assert calls == 3


def test_median_and_percentiles_interpolate_between_samples():
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (timing.ms, timing.percentile(20), timing.percentile(80)) == pytest.approx((3.0, 1.8, 4.2))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def spin(seconds: float) -> None:
    begin = time.thread_time()
    while time.thread_time() - begin < seconds:
        pass


def test_host_time_of_one_thread_is_what_it_had_of_a_core(threads):
    threads(1)
    meter = HostMeter()
    assert meter.milliseconds(lambda: time.sleep(0.05)) < 25
    assert 20 <= meter.milliseconds(lambda: spin(0.02)) < 40
    assert meter.first_milliseconds(lambda: time.sleep(0.02)) >= 20
    assert "CPU time" in meter.clock


def test_host_time_of_several_threads_is_that_on_a_clock(threads):
    threads(2)
    meter = HostMeter()
    assert 20 <= meter.milliseconds(lambda: time.sleep(0.02)) < 2000
    assert "on a clock" in meter.clock


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
    assert meter.first_milliseconds(runtime.call) == 3.0
    assert "device" in meter.clock


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


class Ticking(FakeRuntime):
    """A device on whose clock something happens between any two events, and whose memory is that of a call's result."""

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        event = super().Event(enable_timing)
        record = event.record

        def tick() -> None:
            self.clock += 2.0
            self.peak += 50
            record()

        event.record = tick
        return event

    def max_memory_allocated(self, _device: object) -> int:
        return self.peak + 100


@pytest.mark.parametrize("cold", [False, True])
def test_a_case_is_measured_on_a_device_by_its_events_and_its_allocator(cold: bool):
    runtime = Ticking()
    runtime.get_device_properties = lambda _: SimpleNamespace(L2_cache_size=64)
    meter = AcceleratorMeter(torch.device("cpu"), cold=cold, runtime=runtime)
    case = ActivationUnit("tiny", batch=4, max_length=5, dim=4, hidden=(3,))
    task = case.task(Setting(torch.device("cpu")))
    rows = measure(task, meter, providers=["recattn", "eager"], budget=0, rounds=(3, 3))
    assert [(m.mode, m.provider) for m in rows] == [
        (mode, p) for mode in case.modes for p in ("recattn", "eager")
    ]
    for m in rows:
        assert (m.error, m.ms, m.first_ms, m.relative, m.peak_bytes) == (None, 2.0, 2.0, 1.0, 100)


def test_running_out_of_memory_is_told_from_other_failures():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("no kernel"))


def test_free_memory_of_the_host_is_known_on_linux():
    free = HostMeter().available_bytes()
    assert free is None or free > 2**20
