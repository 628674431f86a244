"""Pictures of measurements: for files, and for pages that may be light or dark."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recattn.bench.console import missing_extra
from recattn.bench.measure import Measurement
from recattn.bench.report import OWN, times
from recattn.bench.scaling import Axis, Curve

# Colours that colour-blind readers can tell apart, the first of Okabe and Ito's but for black and yellow, of which one
# would not show on any background; and a shape for each provider.
STYLES = {
    OWN: ("#0072B2", "o"),
    "recattn_padded": ("#56B4E9", "p"),
    "eager": ("#D55E00", "s"),
    "eager_jagged": ("#E69F00", "P"),
    "compile": ("#009E73", "^"),
    "compile_jagged": ("#66C2A5", "v"),
    "deepctr_torch": ("#CC79A7", "D"),
    "fuxictr": ("#7B6FD0", "h"),
    "recbole": ("#B2182B", ">"),
    "torch_rechub": ("#6B8E23", "d"),
    "torch_easy_rec": ("#4D9DA8", "H"),
    "fbgemm": ("#8C6D31", "<"),
    "nested": ("#999999", "X"),
    "sdpa": ("#5E7A8C", "*"),
    "torch_gru": ("#9C755F", "8"),
}
OTHER = ("#999999", ".")
LEGEND_INCHES = 1.7  # that a provider takes in a legend
LETTERS = 11  # of a title, in an inch
INK = "#4b5563"  # of text and axes; a page puts its own colour in its place


def scaling(
    curves: Sequence[Curve], axis: Axis, title: str, roofline: Mapping[str, Mapping[float, float]]
) -> Any:
    """A figure: time of each mode, and peak memory of the last, over size, all axes logarithmic.

    Args:
        roofline: by mode and size the least time in milliseconds.

    Raises:
        RuntimeError: if matplotlib is not installed.
        ValueError: if there is no curve.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none: no provider ran at any size")
    modes = list(dict.fromkeys(curve.mode for curve in curves))
    sizes = sorted({size for curve in curves for size in curve.sizes})
    figure, panels = _figure(1 + len(modes), title)
    shown = [(mode, "ms", f"{mode}: time per call, ms") for mode in modes]
    for axes, (mode, field, label) in zip(
        panels, [*shown, (modes[-1], "peak_bytes", f"{modes[-1]}: peak memory, MiB")], strict=True
    ):
        for curve in curves:
            if curve.mode != mode:
                continue
            values = curve.ms if field == "ms" else [size / 2**20 for size in curve.peak_bytes]
            color, marker = STYLES.get(curve.provider, OTHER)
            axes.plot(curve.sizes, values, color=color, marker=marker, label=_label(curve, axis, field))
        if field == "ms" and roofline.get(mode):
            least = sorted(roofline[mode].items())
            axes.plot(*zip(*least, strict=True), color=INK, linestyle=":", label="roofline")
        axes.set(xscale="log", yscale="log", xlabel=axis.label, ylabel=label)
        _ticks(axes, sizes)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=1,
            frameon=False,
            fontsize="small",
            labelcolor=INK,
        )
    return figure


def ratios(measured: Sequence[Measurement], title: str) -> Any:
    """A figure: by case the time of each provider over that of recattn, one panel per mode.

    Raises:
        RuntimeError: if matplotlib is not installed.
        ValueError: if recattn has no figures anywhere.
    """
    own = {(m.case, m.mode): m for m in measured if m.provider == OWN and m.ms}
    if not own:
        raise ValueError("measured: expected figures of recattn, got none")
    modes = list(dict.fromkeys(mode for _, mode in own))
    cases = list(dict.fromkeys(case for case, _ in own))[::-1]
    providers = list(dict.fromkeys(m.provider for m in measured if m.ms))
    figure, panels = _figure(len(modes), title, height=1.6 + 0.3 * len(cases))
    from matplotlib.ticker import LogLocator

    for axes, mode in zip(panels, modes, strict=True):
        for provider in providers:
            points = [
                (times(m, own[m.case, mode]), cases.index(m.case))
                for m in measured
                if m.provider == provider and m.mode == mode and m.ms and (m.case, mode) in own
            ]
            color, marker = STYLES.get(provider, OTHER)
            if points:
                axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=40, label=provider)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set(xscale="log", xlabel=f"{mode}: time over that of recattn", ylim=(-0.6, len(cases) - 0.4))
        axes.set_yticks(range(len(cases)), cases)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
        axes.xaxis.set_minor_formatter("")
    handles: dict[str, Any] = {}
    for axes in panels:
        handles.update(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=int(figure.get_figwidth() / LEGEND_INCHES),
        frameon=False,
        labelcolor=INK,
    )
    return figure


def save(figure: Any, path: Path) -> list[Path]:
    """Writes it as PNG and as SVG, beside each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for each in paths:
        figure.savefig(each, dpi=150, facecolor="white")
    return paths


def inline(figure: Any) -> str:
    """As an SVG element, without a background, its text and axes in the colour of the page around it, as large as it is
    or as the page has room for."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    own = f'role="img" style="width: 100%; max-width: {figure.get_figwidth():.2f}in"'
    return re.sub(r'(<svg [^>]*?)width="[^"]*pt" height="[^"]*pt"', rf"\1{own}", text, count=1)


def _figure(panels: int, title: str, height: float = 5.2) -> tuple[Any, list[Any]]:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    figure = Figure(figsize=(1.5 + 4.6 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    letters = int(LETTERS * figure.get_figwidth())
    lines = [line for part in title.splitlines() for line in textwrap.wrap(part, letters)]
    figure.suptitle("\n".join(lines), color=INK, fontsize="medium")
    drawn = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in drawn:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(INK)
        axes.tick_params(which="both", color=INK, labelcolor=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return figure, drawn


def _ticks(axes: Any, sizes: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    step = -(-len(sizes) // 7)
    axes.xaxis.set(major_locator=FixedLocator(list(sizes[::step])), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter("")


def _label(curve: Curve, axis: Axis, field: str) -> str:
    exponent = curve.exponents()[0 if field == "ms" else 1]
    return curve.provider if exponent is None else f"{curve.provider} ∝ {axis.letter}^{exponent:.2f}"
