"""`recattn profile`: time and memory along one size of an operator's calls, with a picture."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from recattn.bench import page, plot, scaling
from recattn.bench.cases import SWEPT, check_providers, default_providers
from recattn.bench.console import (
    add_data_argument,
    add_device_arguments,
    chosen_device,
    positive,
    progress,
    read_log,
    write_json,
)
from recattn.bench.environment import command_line, details, environment
from recattn.bench.histories import SCALED_LOG
from recattn.bench.measure import OWN, Measurement, measure
from recattn.bench.roofline import peaks_of
from recattn.bench.scaling import AXES, Curve
from recattn.bench.task import MODES, Case, Setting
from recattn.bench.timing import Meter, meter_for
from recattn.data import LENGTH_DISTRIBUTIONS

CHECKED = 8_000_000  # elements of work up to which results are compared with the float64 reference
BUT = (
    "compile",
    "compile_jagged",
    "recattn_padded",
)  # providers to ask for: each size would be compiled anew
LEGEND = (
    "Medians of interleaved calls; in brackets how many times recattn's. Exponents are fitted over the upper half of"
    " the sizes. Results are compared with float64 at sizes where that takes no longer than the rest."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: about a minute")
    parser.add_argument("--op", default="activation_unit", choices=SWEPT, help="default: %(default)s")
    parser.add_argument("--over", default="length", choices=AXES, help="what grows (default: %(default)s)")
    parser.add_argument("--sizes", type=float, nargs="+", metavar="N", help="its values; at least two")
    parser.add_argument("--length", type=positive, help="of the longest history, where something else grows")
    parser.add_argument("--batch", type=positive, help="default: 8 with --quick, 32 on a CPU, 256 on a GPU")
    parser.add_argument("--dim", type=positive, help="default: that of the operator's cases")
    parser.add_argument("--hidden", type=positive, nargs="+", help="of activation_unit; default: 80 40")
    parser.add_argument(
        "--distribution", default="lognormal", choices=LENGTH_DISTRIBUTIONS, help="default: %(default)s"
    )
    add_data_argument(parser, "lengths, if not of --distribution, those of a log scaled to L")
    parser.add_argument("--fill", type=float, default=0.2, help="mean length over L (default: %(default)s)")
    parser.add_argument(
        "--provider", nargs="+", metavar="NAME", help=f"default: all that there are, but {', '.join(BUT)}"
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=MODES[:3],
        default=["inference", "forward+backward"],
        help="default: both",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="run nothing that would take more, to judge by its growth (default: three quarters of what is free)",
    )
    add_device_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where profile.json, profile.html and the picture go (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    device, dtype = chosen_device(args)
    axis, case = AXES[args.over], _case(args, device.type)
    sizes = sorted(set(args.sizes or (axis.quick if args.quick else axis.full)))
    if len(sizes) < 2 or min(sizes) <= 0 or (args.over != "fill" and any(n % 1 for n in sizes)):
        raise ValueError(f"sizes: expected at least two different ones, whole but for fill, got {sizes}")
    check_providers(args.provider, [case])
    names = args.provider or [name for name in default_providers(case, quick=False) if name not in BUT]
    cases = {size: scaling.at(case, args.over, size) for size in sizes}
    meter = meter_for(device)
    limit = _limit(args.memory_limit, meter)
    setting = Setting(device, dtype, read_log(args.data))
    budget, rounds = (0.5, (3, 30)) if args.quick else (3.0, (5, 100))
    peaks = peaks_of(device, dtype)
    measured: dict[float, list[Measurement]] = {}
    roofline: dict[str, dict[float, float]] = {mode: {} for mode in args.mode}
    setup = ""
    with progress(len(sizes)) as bar:
        bar.console.print(f"{args.op} over {args.over}, on {environment(device, dtype)}", markup=False)
        for size, sized in cases.items():
            bar.begin(f"{axis.letter}={size:g}")
            task = sized.task(setting)
            assert task.work is not None
            guard = Guard(scaling.curves(measured), size, limit)
            measured[size] = measure(
                task,
                meter,
                providers=names,
                modes=args.mode,
                budget=budget,
                rounds=rounds,
                peaks=peaks,
                check=task.work.bytes / dtype.itemsize <= CHECKED,
                refuse=guard.refuse,
                on_step=bar.say,
            )
            for mode in args.mode:
                roofline[mode][size] = peaks.ms(task.work.of(mode))
            setup = task.description
            bar.end()
        fitted = scaling.curves(measured)
        notes = [*scaling.crossovers(fitted, axis.letter), *scaling.ends(measured, axis.letter)]
        if limit is not None and args.over != "fill":
            notes += scaling.reaches(fitted, limit, axis.letter)
        tables = {
            f"{mode}: {label}": scaling.cells(mode, field, measured, fitted, axis.letter)
            for mode in args.mode
            for field, (label, _) in scaling.FIGURES.items()
        }
        for title, cells in tables.items():
            bar.show(scaling.table(title, cells), [])
        for line in notes:
            bar.console.print(line, markup=False, highlight=False)
    title = (
        f"{args.op} over {args.over}; at {axis.letter}={sizes[-1]:g}: {setup}\n{environment(device, dtype)}"
    )
    stem = (
        "profile"
        if (args.op, args.over) == ("activation_unit", "length")
        else f"profile-{args.op}-{args.over}"
    )
    figure = plot.scaling(fitted, axis, title, roofline)
    written = [
        *plot.save(figure, args.output / stem),
        args.output / f"{stem}.json",
        args.output / f"{stem}.html",
    ]
    write_json(written[2], _content(measured, fitted, notes, args.over))
    html = page.page(
        f"recattn profile: {args.op} over {args.over}",
        [_summary(fitted, args.over), *notes],
        [plot.inline(figure)],
        [page.table(name, cells) for name, cells in tables.items()],
        environment={**details(device, dtype), "time": meter.clock, "roofline": peaks.describe()},
        command=command_line(sys.argv[1:]),
        legend=f"{setup}, at the largest size. {LEGEND}",
    )
    written[3].write_text(html, encoding="utf-8")
    print("wrote", ", ".join(map(str, written)))
    return 0


def _case(args: argparse.Namespace, device: str) -> Case:
    case = SWEPT[args.op]
    batch = args.batch or (8 if args.quick else 32 if device == "cpu" else 256)
    lengths = args.distribution if args.data == "synthetic" else SCALED_LOG
    chosen: dict[str, Any] = {
        "batch": batch,
        "max_length": args.length or 200,
        "lengths": lengths,
        "fill": args.fill,
        "dim": args.dim,
    }
    if args.hidden is not None:
        chosen["hidden"] = (
            tuple(args.hidden) if isinstance(getattr(case, "hidden", None), tuple) else args.hidden[0]
        )
    return replace(case, **{k: v for k, v in chosen.items() if v is not None and hasattr(case, k)})


def _limit(gibibytes: float | None, meter: Meter) -> float | None:
    """In bytes."""
    if gibibytes is not None:
        if gibibytes <= 0:
            raise ValueError(f"memory-limit: expected a positive size, got {gibibytes}")
        return gibibytes * 2**30
    free = meter.available_bytes()
    return None if free is None else 0.75 * free


class Guard:
    """Refuses what would take more memory than there is, to judge by the sizes before."""

    def __init__(self, fitted: list[Curve], size: float, limit: float | None) -> None:
        self.size, self.limit = size, limit
        self.curves = {(curve.provider, curve.mode): curve for curve in fitted}

    def refuse(self, provider: str, mode: str) -> str | None:
        """Why not, if so."""
        curve = self.curves.get((provider, mode))
        if curve is None or self.limit is None:
            return None
        needed = curve.forecast_bytes(self.size)
        if needed <= self.limit:
            return None
        return f"it would take about {needed / 2**30:.3g} GiB, over the limit of {self.limit / 2**30:.3g}"


def _summary(fitted: list[Curve], over: str) -> str:
    """How recattn itself grows, in a sentence."""
    grown = []
    for curve in fitted:
        time, memory = curve.exponents()
        if curve.provider == OWN and time is not None and memory is not None:
            grown.append(
                f"{curve.mode} with the power {time:.2f} of {over} in time and {memory:.2f} in memory"
            )
    return (
        f"recattn grows in {'; in '.join(grown)}."
        if grown
        else "recattn ran at too few sizes to tell its growth."
    )


def _content(
    measured: dict[float, list[Measurement]], fitted: list[Curve], notes: list[str], over: str
) -> dict[str, Any]:
    """The records with their sizes, the exponents of the curves through them, and what follows from them."""
    records = [{over: size, **m.record()} for size, results in measured.items() for m in results]
    exponents = []
    for curve in fitted:
        time, memory = curve.exponents()
        exponents.append({"provider": curve.provider, "mode": curve.mode, "time": time, "memory": memory})
    return {"over": over, "records": records, "exponents": exponents, "findings": notes}
