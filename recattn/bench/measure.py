"""Measures providers on a task: right first, then fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recattn.bench.roofline import Peaks
from recattn.bench.task import Prepared, Task, Work, name_of
from recattn.bench.timing import Meter, Run, Timing, describe, interleave, is_out_of_memory, ratio

OWN = "recattn"
# How far a result may be from the float64 reference, relative to its largest element: about twice what eager
# code in that precision comes to in the gradients of the parameters, where most cancels.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-1}
REDUCED_FLOAT32_LIMIT = 1e-2  # where float32 products may be rounded to TF32 or bfloat16
RECORD = (
    "op",
    "case",
    "provider",
    "mode",
    "device",
    "dtype",
    "ms",
    "ms_p20",
    "ms_p80",
    "peak_bytes",
    "error",
)


@dataclass(frozen=True)
class Measurement:
    """What one provider does on one case, in one mode; without figures where `error` says why.

    Args:
        ms, ms_p20, ms_p80: median and spread of the time of a call, in milliseconds.
        peak_bytes: the most bytes of tensors alive at once during a call, over those alive before.
        error: why there are no figures.
        first_ms: the time of the first call, which compiles what is compiled.
        deviation: the error against the float64 reference, relative to the largest element.
        relative, relative_low, relative_high: how many times as long as recattn's its calls take, see `timing.Ratio`.
        bytes, flops: what the pass has to move and to compute at least, whoever does.
        roofline: the least time that the device needs for that, over the time taken.
    """

    op: str
    case: str
    provider: str
    mode: str
    device: str
    dtype: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    peak_bytes: int | None = None
    error: str | None = None
    first_ms: float | None = None
    deviation: float | None = None
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    bytes: float | None = None
    flops: float | None = None
    roofline: float | None = None

    def record(self) -> dict[str, Any]:
        """What goes into a file of results."""
        fields = asdict(self)
        return {name: fields[name] for name in RECORD}


class Inaccurate(ArithmeticError):
    """A result that is too far from the reference to be worth timing."""


def measure(
    task: Task,
    meter: Meter,
    *,
    providers: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    budget: float = 10.0,
    rounds: tuple[int, int] = (5, 200),
    peaks: Peaks | None = None,
    check: bool = True,
    refuse: Callable[[str, str], str | None] = lambda provider, mode: None,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Measures providers in each mode that makes sense of the task.

    A provider that raises, or whose result is further than `LIMITS` from the float64 reference, gets a measurement with
    an error, and the others go on.

    Args:
        providers, modes: some of them; those that the task does not have are left out.
        budget: seconds of timed rounds per mode.
        rounds: at least and at most so many timed rounds; fewer than they could be once ratios to recattn are known.
        peaks: of the device, for the share of its roofline.
        check: whether to compare results, which for a huge case takes more than timing it.
        refuse: says of a provider in a mode why not to run it, if so.
        on_step: called with what comes next, in words.
    """
    torch.compiler.reset()  # else shapes of cases before count as too many to compile for
    names = [name for name in task.providers if providers is None or name in providers]
    prepared: dict[str, Prepared] = {}
    reference = task.reference() if check else None
    measured: list[Measurement] = []
    for mode in task.case.modes:
        if modes is not None and mode not in modes:
            continue
        expected = None
        if reference is not None:
            on_step(f"{mode}, float64 reference")
            expected = reference.result(mode)
        rows: dict[str, Measurement] = {}
        runs: dict[str, Run] = {}
        for name in names:
            row = _row(task, name, mode)
            on_step(f"{mode}, first call of {name}")
            refused = refuse(name, mode)
            try:
                if refused is not None:
                    raise MemoryError(refused)
                if name not in prepared:
                    prepared[name] = task.providers[name]()
                rows[name], runs[name] = _prove(row, prepared[name], meter, task, mode, expected)
            except Exception as error:
                if is_out_of_memory(error):
                    prepared.pop(name, None)
                    meter.recover()
                rows[name] = replace(row, error=describe(error))
        on_step(f"{mode}, timing")
        timings = interleave(runs, meter, budget=budget, rounds=rounds, base=OWN)
        for name, timing in timings.items():
            rows[name] = _timed(rows[name], timing, timings.get(OWN), peaks)
        measured += rows.values()
    return measured


def _row(task: Task, provider: str, mode: str) -> Measurement:
    device, dtype = task.setting.device.type, name_of(task.setting.dtype)
    row = Measurement(task.case.op, task.case.name, provider, mode, device, dtype)
    if task.work is None:
        return row
    work = task.work.of(mode)
    return replace(row, bytes=work.bytes, flops=work.flops)


def _prove(
    row: Measurement,
    prepared: Prepared,
    meter: Meter,
    task: Task,
    mode: str,
    expected: Sequence[Tensor] | None,
) -> tuple[Measurement, Run]:
    """The first call, which must be right, and the memory of the next; and what to time."""
    deviation = None
    results: list[list[Tensor]] = []
    first_ms = meter.first_milliseconds(lambda: results.append(prepared.result(mode)))
    if expected is not None:
        deviation = verified(results[0], expected, task)
    results.clear()
    run = prepared.run(mode)
    peak = meter.peak_bytes(run)
    return replace(row, first_ms=first_ms, deviation=deviation, peak_bytes=peak), meter.ready(run)


def verified(result: Sequence[Tensor], expected: Sequence[Tensor], task: Task) -> float:
    """How far the result is from the expected one.

    Raises:
        Inaccurate: if that is further than `LIMITS`.
    """
    parts = enumerate(zip(result, expected, strict=True))
    deviation = max(_deviation(got, want, task.kinked and bool(part)) for part, (got, want) in parts)
    limit = LIMITS[task.setting.dtype]
    if task.setting.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        limit = REDUCED_FLOAT32_LIMIT
    if not deviation <= limit:
        raise Inaccurate(f"{deviation:.1e} from the float64 reference, where {limit:.0e} is the limit")
    return deviation


def _deviation(got: Tensor, want: Tensor, kinked: bool) -> float:
    """The largest error relative to the largest element. Of kinked functions, the largest but for one in a
    hundred: a unit within rounding of its kink may fall on either side, and its gradient with it."""
    errors = (got.double() - want).abs().reshape(-1)
    if not errors.isfinite().all():
        return math.inf
    if not errors.numel():
        return 0.0
    count = math.ceil(0.99 * errors.numel()) if kinked else errors.numel()
    return float(errors.kthvalue(count).values / want.abs().max().clamp_min(torch.finfo(want.dtype).tiny))


def _timed(
    row: Measurement, timing: Timing | str, own: Timing | str | None, peaks: Peaks | None
) -> Measurement:
    if isinstance(timing, str):
        return replace(row, peak_bytes=None, error=timing)
    low, middle, high = ratio(timing.samples, own.samples) if isinstance(own, Timing) else (None, None, None)
    share = None
    if peaks is not None and row.bytes is not None and row.flops is not None:
        share = peaks.share(Work(row.bytes, row.flops), timing.ms)
    return replace(
        row,
        ms=timing.ms,
        ms_p20=timing.percentile(20),
        ms_p80=timing.percentile(80),
        relative=middle,
        relative_low=low,
        relative_high=high,
        roofline=share,
    )
