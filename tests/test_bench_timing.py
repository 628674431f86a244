import time
from collections.abc import Callable

import pytest
import torch

from recattn.bench.timing import HostMeter, Timing, describe, interleave, meter_for


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


def test_an_error_is_described_in_one_line():
    assert describe(ValueError("  first\nsecond")) == "ValueError: first"
    assert describe(KeyError()) == "KeyError"
    assert len(describe(ValueError("x" * 1000))) == 200
