"""The picture of a scaling study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recattn.bench.console import missing_extra
from recattn.bench.scaling import Curve

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {"recattn": "#0072B2", "eager": "#D55E00", "compile": "#009E73", "deepctr_torch": "#CC79A7"}
OTHER_COLOR = "#555555"
MARKERS = {"recattn": "o", "eager": "s", "compile": "^", "deepctr_torch": "D"}
LINES = {"forward": "--", "forward+backward": "-"}


def plot_scaling(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Writes a PNG with time and peak memory over length, both on logarithmic axes.

    Raises:
        RuntimeError: if matplotlib is not installed.
        ValueError: if there is no curve.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none: no provider ran at any length")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    lengths = sorted({length for curve in curves for length in curve.lengths})
    for axes, label, index in zip(panels, ("time per call, ms", "peak memory, MiB"), (0, 1), strict=True):
        for curve in curves:
            values = curve.ms if index == 0 else [size / 2**20 for size in curve.peak_bytes]
            axes.plot(
                curve.lengths,
                values,
                color=COLORS.get(curve.provider, OTHER_COLOR),
                marker=MARKERS.get(curve.provider, "x"),
                linestyle=LINES[curve.mode],
                label=_label(curve, index),
            )
        axes.set(xscale="log", yscale="log", xlabel="longest history L, items", ylabel=label)
        axes.xaxis.set(major_locator=FixedLocator(lengths), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _label(curve: Curve, index: int) -> str:
    exponent = curve.exponents()[index]
    fit = "" if exponent is None else f" ∝ $L^{{{exponent:.2f}}}$"
    return f"{curve.provider}, {curve.mode}{fit}"
