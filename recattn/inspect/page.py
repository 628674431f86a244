"""Records as one HTML page that needs nothing else: rooflines as pictures, the table below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby

import triton

from recattn.inspect.chips import CHIPS, Chip
from recattn.inspect.records import Record
from recattn.inspect.report import COLUMNS, LEGEND, cells, failures, groups

__all__ = ["page"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } svg { max-width: 100%; height: auto } svg text { font-size: 11px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap } thead th { border-bottom: 1px solid #999 }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left }
tr.call td { padding-top: .7rem; font-style: italic; text-align: left } tr.bad td { color: #b00020; font-weight: 600 }
.legend span { margin-right: 1.2rem; white-space: nowrap } .dim { color: #666 }
"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 380, 56, 16, 30, 44
INTENSITIES = (0.25, 4096.0)  # flops per byte
_Scale = Callable[[float], float]


def page(records: Sequence[Record]) -> str:
    """The whole page."""
    ops = list(dict.fromkeys(r.op for r in records))
    colors = {op: COLORS[i % len(COLORS)] for i, op in enumerate(ops)}
    archs = dict.fromkeys(r.arch for r in records)
    plots = "".join(_plot(CHIPS[arch], [r for r in records if r.arch == arch], colors) for arch in archs)
    legend = "".join(
        f'<span style="color:{color}">●</span><span>{escape(op)}</span>' for op, color in colors.items()
    )
    bad = failures(records)
    verdict = (
        f"{len(bad)} of {len(records)} kernels are not clean"
        if bad
        else f"all {len(records)} kernels are clean"
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in bad)
    sections = "".join(_section(title, group) for title, group in groups(records))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>recattn inspect</title>
<style>{STYLE}</style>
<h1>recattn inspect: {verdict}</h1>
<p>Compiled by Triton {escape(triton.__version__)}, with no GPU. {escape(LEGEND)}</p>
<ul>{lines}</ul>
<h2>Rooflines</h2>
<p>Each point is the forward (full) or backward (hollow) of an operator, at its bytes and flops: where on the chip it
would be if its binding resource were busy all the time. Points below the roof are bound by special functions or by
work outside the matrix units.</p>
<p class="legend">{legend}</p>
<div class="plots">{plots}</div>
{sections}
</html>
"""


def _section(title: str, records: Sequence[Record]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = []
    for (op, shape), group in groupby(records, key=lambda r: (r.op, r.shape)):
        rows.append(f'<tr class="call"><td colspan="{len(COLUMNS)}">{escape(op)}: {escape(shape)}</td></tr>')
        for record in group:
            config = ", ".join(f"{name}={value}" for name, value in record.config.items())
            figures = "".join(f"<td>{escape(cell)}</td>" for cell in cells(record))
            kind = "" if record.ok else ' class="bad"'
            rows.append(f'<tr{kind} title="{escape(record.error or config)}">{figures}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2>{escape(title)}</h2><div class="scroll">{table}</div>'


def _plot(chip: Chip, records: Sequence[Record], colors: dict[str, str]) -> str:
    peaks = {
        f"matrix units, {dtype}": chip.products(dtype) for dtype in dict.fromkeys(r.dtype for r in records)
    }
    peaks["fma"] = chip.fma
    most = 2 * max(peaks.values())
    least = INTENSITIES[0] * chip.bandwidth / 2

    def x(intensity: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(intensity, *INTENSITIES)

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(rate, least, most)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="roofline of {escape(chip.name)}">',
        f'<text x="{LEFT}" y="18" font-weight="bold">{escape(chip.name)} ({escape(chip.arch)})</text>',
        *_grid(x, y, least, most),
    ]
    for name, peak in peaks.items():
        ridge = peak / chip.bandwidth
        corners = ((INTENSITIES[0], INTENSITIES[0] * chip.bandwidth), (ridge, peak), (INTENSITIES[1], peak))
        path = " ".join(f"{x(i):.1f},{y(r):.1f}" for i, r in corners)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#555" stroke-width="1.2"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{y(peak) - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    drawn = {(r.op, r.shape, r.step, r.dtype): r for r in records}
    for record in drawn.values():
        bound, color = record.roofline, colors[record.op]
        fill = color if record.step == "forward" else "white"
        label = f"{record.op} {record.step}, {record.dtype}, {record.shape}: {bound.microseconds:.1f} µs, {bound.binds}"
        parts.append(
            f'<circle cx="{x(bound.intensity):.1f}" cy="{y(bound.rate):.1f}" r="4.5" fill="{fill}" stroke="{color}"'
            f' stroke-width="1.6"><title>{escape(label)}</title></circle>'
        )
    return "".join([*parts, "</svg>"])


def _grid(x: _Scale, y: _Scale, least: float, most: float) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    for power in range(math.ceil(math.log10(INTENSITIES[0])), math.floor(math.log10(INTENSITIES[1])) + 1):
        at = x(10.0**power)
        yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}" stroke="#eee"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{10.0**power:g}</text>'
    for power in range(math.ceil(math.log10(least)), math.floor(math.log10(most)) + 1):
        at = y(10.0**power)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#eee"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">flops per byte</text>'
    yield f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">Tflop/s</text>'


def _share(value: float, least: float, most: float) -> float:
    """Where a value lies between two others, on a logarithmic axis."""
    return min(max(math.log(value / least) / math.log(most / least), 0.0), 1.0)
