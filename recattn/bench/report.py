"""Measurements for reading: on a terminal, and as Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recattn.bench.measure import Measurement
from recattn.bench.scaling import Curve

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("provider", "ms", "p20–p80", "faster by", "peak MiB", "smaller by", "error", "")
_LEFT = ("mode", "provider", "")
LEGEND = (
    "Medians of interleaved calls. faster by, smaller by: time and peak memory of a provider over those of"
    " recattn. Peak memory: tensors alive at once, inputs not counted. error: against float64, relative to"
    " the largest element."
)


def environment(device: torch.device, dtype: torch.dtype) -> str:
    """Where figures come from, in one line."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{_cpu_model()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{machine}, {str(dtype).removeprefix('torch.')}, PyTorch {torch.__version__}"


def table(title: str, measurements: Sequence[Measurement]) -> Table:
    """The measurements of one case, for a rich console; `failures` go below it."""
    from rich import box
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        left = column in _LEFT
        result.add_column(column, justify="left" if left else "right", no_wrap=column == "provider")
    for mode, group in groupby(measurements, key=lambda m: m.mode):
        result.add_section()
        result.add_row(mode, style="italic")
        for m, cells in rows(list(group)):
            result.add_row(*cells, style="red" if m.error else None)
    return result


def markdown(title: str, measurements: Sequence[Measurement]) -> str:
    """The same as a Markdown section."""
    columns = ("mode", *COLUMNS)
    lines: list[Sequence[str]] = [columns, [":--" if column in _LEFT else "--:" for column in columns]]
    for mode, group in groupby(measurements, key=lambda m: m.mode):
        lines += [(mode, *cells) for _, cells in rows(list(group))]
    text = f"## {title}\n\n" + "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    return text + "".join(f"\n- {line}\n" for line in failures(measurements))


def rows(measurements: Sequence[Measurement]) -> list[tuple[Measurement, tuple[str, ...]]]:
    """Cells for `COLUMNS`, of measurements of one case in one mode."""
    own = next((m for m in measurements if m.provider == "recattn"), None)
    return [(m, _cells(m, own)) for m in measurements]


def scaling_table(mode: str, measured: Mapping[int, Sequence[Measurement]], curves: Sequence[Curve]) -> Table:
    """Time and memory over length in one mode, one column per provider, the exponents below."""
    from rich import box
    from rich.table import Table

    by_length = {length: [m for m in ms if m.mode == mode] for length, ms in measured.items()}
    providers = list(dict.fromkeys(m.provider for ms in by_length.values() for m in ms))
    result = Table(title=mode, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("L", *(f"{p}, ms" for p in providers), *(f"{p}, MiB" for p in providers)):
        result.add_column(column, justify="right")
    for length, row in sorted(by_length.items()):
        own = next((m for m in row if m.provider == "recattn"), None)
        times = [_with_ratio(m.ms, own.ms if own and own is not m else None, milliseconds) for m in row]
        sizes = [
            _with_ratio(m.peak_bytes, own.peak_bytes if own and own is not m else None, mebibytes)
            for m in row
        ]
        result.add_row(str(length), *times, *sizes)
    fitted = {curve.provider: curve.exponents() for curve in curves if curve.mode == mode}
    exponents = [fitted.get(p, (None, None))[index] for index in (0, 1) for p in providers]
    result.add_section()
    result.add_row("", *("" if p is None else f"∝ L^{p:.2f}" for p in exponents), style="italic")
    return result


def _with_ratio(value: float | None, own: float | None, show: Callable[[float], str]) -> str:
    """A figure, and in brackets how many times recattn's it is, if that is given."""
    if value is None:
        return "failed"
    return f"{show(value)} ({value / own:.1f}×)" if own else show(value)


def failures(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each measurement without figures."""
    return [f"{m.case}, {m.mode}, {m.provider}: {m.error}" for m in measurements if m.error]


def _cells(m: Measurement, own: Measurement | None) -> tuple[str, ...]:
    if m.ms is None or m.ms_p20 is None or m.ms_p80 is None or m.peak_bytes is None:
        return (m.provider, "failed", *[""] * (len(COLUMNS) - 2))
    faster = smaller = ""
    if own is not None and own is not m and own.ms and own.peak_bytes:
        faster, smaller = f"{m.ms / own.ms:.2f}×", f"{m.peak_bytes / own.peak_bytes:.2f}×"
    spread = f"{milliseconds(m.ms_p20)}–{milliseconds(m.ms_p80)}"
    error = "" if m.deviation is None else f"{m.deviation:.0e}"
    note = ""
    if m.first_ms is not None and m.first_ms > max(1e3, 3 * m.ms):
        note = f"first call {m.first_ms / 1e3:.1f} s"
    return (
        m.provider,
        milliseconds(m.ms),
        spread,
        faster,
        mebibytes(m.peak_bytes),
        smaller,
        error,
        note,
    )


def milliseconds(ms: float) -> str:
    """Three or four digits that count."""
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.2f}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
