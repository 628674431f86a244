"""A library's whole models before and after `recattn.fuse`: time, memory, and how far apart they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recattn.bench.libraries import LIBRARIES, Example, Sizes
from recattn.bench.report import mebibytes, milliseconds
from recattn.bench.timing import Meter, Timing, interleave, ratio
from recattn.swap import Report, fuse

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("model", "mode", "own, ms", "fused, ms", "faster by", "own, MiB", "fused, MiB", "difference")
SAME = 1e-3  # relative to the largest element; a unit within rounding of its kink may fall on either side
LEGEND = (
    "fit step: loss, backward, Adam. faster by: the median of the ratios of neighbouring calls. MiB: the most tensors"
    " alive at once over those before. difference: of predictions or gradients, the largest, relative to the largest."
)


@dataclass(frozen=True)
class Comparison:
    """One model in one mode, in milliseconds and bytes, by the library's own layers and fused; no speed-up where they
    are to compute the same and do not."""

    model: str
    mode: str
    own_ms: float
    fused_ms: float
    faster_by: float | None
    own_bytes: int
    fused_bytes: int
    difference: float


def compare(
    library: str,
    model: str,
    sizes: Sizes,
    meter: Meter,
    *,
    semantics: str,
    budget: float,
    rounds: tuple[int, int],
) -> tuple[Report, list[Comparison]]:
    """Measures a model of a library.

    Raises:
        ValueError: for a library that does not exist.
        ModuleNotFoundError: where it, or something that it needs, is not installed.
        RuntimeError: if a call failed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(LIBRARIES)}, got {library!r}")
    torch.manual_seed(0)
    example = LIBRARIES[library][1](model, sizes)
    _spread(example.model)
    models = {"own": example.model, "fused": copy.deepcopy(example.model)}
    report = fuse(models["fused"], semantics=semantics)
    result = []
    for mode, differing in (("predict", _predictions), ("fit step", _gradients)):
        pairs = zip(*(differing(example, m) for m in models.values()), strict=True)
        difference = max(_relative(a, b) for a, b in pairs)
        runs = {name: _run(example, m, mode) for name, m in models.items()}
        timings = interleave(runs, meter, budget=budget, rounds=rounds, base="fused")
        own, fused = timings["own"], timings["fused"]
        if not isinstance(own, Timing) or not isinstance(fused, Timing):
            raise RuntimeError(f"{library} {model}, {mode}: {own if isinstance(own, str) else fused}")
        same = difference <= SAME or semantics != "exact"
        faster_by = ratio(own.samples, fused.samples).middle if same else None
        peaks = [meter.peak_bytes(run) for run in runs.values()]
        result.append(Comparison(model, mode, own.ms, fused.ms, faster_by, peaks[0], peaks[1], difference))
    return report, result


def table(comparisons: Sequence[Comparison]) -> Table:
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        result.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for c in comparisons:
        result.add_row(
            c.model,
            c.mode,
            milliseconds(c.own_ms),
            milliseconds(c.fused_ms),
            "differs" if c.faster_by is None else f"{c.faster_by:.2f}×",
            mebibytes(c.own_bytes),
            mebibytes(c.fused_bytes),
            f"{c.difference:.0e}",
        )
    return result


def _spread(model: nn.Module) -> None:
    """Some libraries start with weights of 1e-4, by which all histories look alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _run(example: Example, model: Any, mode: str) -> Any:
    if mode == "predict":

        def predict() -> Tensor:
            model.eval()
            with torch.no_grad():
                return example.forward(model)

        return predict
    optimizer = torch.optim.Adam(model.parameters())

    def fit_step() -> None:
        model.train()
        optimizer.zero_grad()
        example.loss(model).sum().backward()
        optimizer.step()

    return fit_step


def _predictions(example: Example, model: Any) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [example.forward(model)]


def _gradients(example: Example, model: Any) -> list[Tensor]:
    """As one vector: the gradient of some parameters is 0 but for rounding."""
    model.train()
    model.zero_grad()
    example.loss(model).sum().backward()
    return [torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))
