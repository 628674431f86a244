"""Measures providers on a case: right first, then fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recattn import reference
from recattn.bench.cases import Case, Inputs
from recattn.bench.providers import Prepared, Provider
from recattn.bench.timing import Meter, Timing, describe, interleave

OP = "activation_unit"
MODES = ("forward", "forward+backward")
# How far a result may be from the float64 reference, relative to its largest element: about twice what eager
# code in that precision comes to in the gradients of the parameters, where most cancels.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-1}
KINKED = ("relu", "leaky_relu", "prelu")
REDUCED_FLOAT32_LIMIT = 1e-2  # where float32 products may be rounded to TF32 or bfloat16


@dataclass(frozen=True)
class Measurement:
    """What one provider does on one case, in one mode; without figures where `error` says why.

    Args:
        ms, ms_p20, ms_p80: median and spread of the time of a call, in milliseconds.
        peak_bytes: the most bytes of tensors alive at once during a call, over those alive before.
        error: why there are no figures.
        first_ms: the time of the first call, which compiles what is compiled.
        deviation: the error against the float64 reference, relative to the largest element.
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

    def record(self) -> dict[str, Any]:
        """What goes into a file of results: the fields from `op` to `error`."""
        return {name: value for name, value in asdict(self).items() if name not in ("first_ms", "deviation")}


class Inaccurate(ArithmeticError):
    """A result that is too far from the reference to be worth timing."""


def measure(
    case: Case,
    inputs: Inputs,
    providers: Mapping[str, Provider],
    meter: Meter,
    *,
    modes: Sequence[str] = MODES,
    budget: float = 10.0,
    rounds: tuple[int, int] = (5, 200),
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Measures all providers in each mode.

    `"forward"` is inference, without a graph; `"forward+backward"` also computes the gradients of query,
    keys, weights and biases. A provider that raises, or whose result is further than `LIMITS` from the
    float64 reference, gets a measurement with an error, and the others go on.

    Args:
        budget: seconds of timed rounds per mode.
        rounds: at least and at most so many timed rounds.
        on_step: called with what comes next, in words.
    """
    on_step("float64 reference")
    expected = reference_result(case, inputs)
    measured: list[Measurement] = []
    for mode in modes:
        rows, runs = {}, {}
        for name, provider in providers.items():
            row = Measurement(OP, case.name, name, mode, inputs.query.device.type, _name(inputs.query.dtype))
            on_step(f"{mode}, first call of {name}")
            try:
                run = runnable(provider(case, inputs), mode, inputs.grad)
                first_ms, deviation = first_call(run, meter, case, inputs, expected)
                on_step(f"{mode}, memory of {name}")
                peak = meter.peak_bytes(run)
            except Exception as error:
                rows[name] = replace(row, error=describe(error))
                continue
            rows[name] = replace(row, first_ms=first_ms, deviation=deviation, peak_bytes=peak)
            runs[name] = run
        on_step(f"{mode}, timing")
        for name, timing in interleave(runs, meter, budget=budget, rounds=rounds).items():
            rows[name] = _timed(rows[name], timing)
        measured += rows.values()
    return measured


def runnable(call: Prepared, mode: str, grad: Tensor) -> Callable[[], list[Tensor]]:
    """What is timed: a function that returns the output and, with backward, the gradients of the leaves."""
    if mode == "forward":
        return torch.no_grad()(lambda: [call.forward()])

    def forward_backward() -> list[Tensor]:
        out = call.forward()
        return [out.detach(), *torch.autograd.grad(out, call.leaves, grad)]

    return forward_backward


def first_call(
    run: Callable[[], list[Tensor]], meter: Meter, case: Case, inputs: Inputs, expected: list[Tensor]
) -> tuple[float, float]:
    """Its time in milliseconds, and how far the result is from the expected one.

    Raises:
        Inaccurate: if that is further than `LIMITS`.
    """
    result: list[Tensor] = []
    first_ms = meter.milliseconds(lambda: result.extend(run()))
    kinked = case.activation in KINKED
    parts = enumerate(zip(_parts(result, inputs.mask), expected, strict=False))
    deviation = max(_deviation(got, want, kinked and bool(part)) for part, (got, want) in parts)
    limit = LIMITS[inputs.query.dtype]
    if inputs.query.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        limit = REDUCED_FLOAT32_LIMIT
    if not deviation <= limit:
        raise Inaccurate(f"{deviation:.1e} from the float64 reference, where {limit:.0e} is the limit")
    return first_ms, deviation


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


def _parts(result: list[Tensor], mask: Tensor) -> list[Tensor]:
    """What is compared: output, gradients of the query, of the keys `[T, D]`, and of all parameters together.

    Together, since softmax makes the gradient of the last bias 0, whose relative error means nothing.
    """
    if len(result) == 1:
        return result
    out, query, keys, *parameters = result
    keys = keys[mask] if keys.dim() == 3 else keys
    return [out, query, keys, torch.cat([p.reshape(-1) for p in parameters])]


def reference_result(case: Case, inputs: Inputs) -> list[Tensor]:
    """What `first_call` expects, in float64."""
    query, keys, *layers = leaves = [
        t.detach().double().requires_grad_()
        for t in (inputs.query, inputs.keys.values, *inputs.weights, *inputs.biases)
    ]
    weights, biases = layers[: len(inputs.weights)], layers[len(inputs.weights) :]
    out = reference.activation_unit(query, keys, inputs.keys.offsets, weights, biases, **case.options)
    assert isinstance(out, Tensor)
    gradients = torch.autograd.grad(out, leaves, inputs.grad.double())
    return _parts([out.detach(), *gradients], inputs.mask)


def _timed(row: Measurement, timing: Timing | str) -> Measurement:
    if isinstance(timing, str):
        return replace(row, peak_bytes=None, error=timing)
    return replace(row, ms=timing.ms, ms_p20=timing.percentile(20), ms_p80=timing.percentile(80))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
