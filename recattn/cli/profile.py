"""`recattn profile`: time and memory as the history grows, with a picture."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from recattn.bench import report
from recattn.bench.cases import SCALED_LOG, Case, draw_lengths, make_inputs
from recattn.bench.console import (
    add_device_arguments,
    chosen_device,
    positive,
    progress,
    read_log,
    write_json,
)
from recattn.bench.measure import MODES, Measurement, measure
from recattn.bench.plot import plot_scaling
from recattn.bench.providers import PROVIDERS
from recattn.bench.scaling import Curve, curves
from recattn.bench.timing import meter_for
from recattn.data import LENGTH_DISTRIBUTIONS

QUICK_LENGTHS = tuple(2**n for n in range(4, 13))
LENGTHS = tuple(2**n for n in range(4, 15))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="up to L=4096, few rounds: about a minute")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", metavar="L", help="of the longest history; at least two"
    )
    parser.add_argument("--batch", type=positive, help="default: 32 on a CPU, 256 on a GPU")
    parser.add_argument("--dim", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--hidden", type=positive, nargs="+", default=[80, 40], help="default: 80 40")
    parser.add_argument(
        "--distribution", default="lognormal", choices=LENGTH_DISTRIBUTIONS, help="default: %(default)s"
    )
    parser.add_argument(
        "--data",
        default="synthetic",
        metavar="synthetic|movielens|PATH",
        help="lengths: of --distribution, or like those of MovieLens-100K or of a MovieLens data set in a folder,"
        " scaled to L (default: %(default)s)",
    )
    parser.add_argument("--fill", type=float, default=0.2, help="mean length over L (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    add_device_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where profile.png and profile.json go (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    device, dtype = chosen_device(args)
    lengths = sorted(set(args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)))
    if len(lengths) < 2:
        raise ValueError(f"lengths: expected at least two different ones, got {lengths}")
    names = ("recattn", "eager", "compile") if args.compile else ("recattn", "eager")
    providers = {name: PROVIDERS[name] for name in names}
    meter = meter_for(device)
    batch = args.batch or (32 if device.type == "cpu" else 256)
    hidden = tuple(args.hidden)
    log = read_log(args.data)
    distribution = args.distribution if log is None else SCALED_LOG
    case = Case("sweep", batch, None, args.dim, hidden, lengths=distribution, fill=args.fill)
    budget, rounds = (0.5, (3, 30)) if args.quick else (3.0, (5, 100))
    fill = float(draw_lengths(case, lengths[-1], log, seed=0).double().mean()) / lengths[-1]
    lengths_like = args.distribution if log is None else f"lengths as in {args.data}"
    setting = f"activation_unit, B={batch}, D={args.dim}, hidden {hidden}, {lengths_like}, {fill:.0%} full"
    machine = report.environment(device, dtype)
    measured: dict[int, list[Measurement]] = {}
    with progress(len(lengths)) as bar:
        bar.console.print(f"{setting}, on {machine}")
        for length in lengths:
            bar.begin(f"L={length}")
            at_length = replace(case, name=f"L={length}", max_length=length)
            inputs = make_inputs(at_length, device, dtype, log=log)
            measured[length] = measure(
                at_length, inputs, providers, meter, budget=budget, rounds=rounds, on_step=bar.say
            )
            bar.end()
        fitted = curves(measured)
        for mode in MODES:
            results = [m for results in measured.values() for m in results if m.mode == mode]
            bar.show(report.scaling_table(mode, measured, fitted), report.failures(results))
    write_json(args.output / "profile.json", _content(measured, fitted))
    plot_scaling(fitted, f"{setting}\n{machine}", args.output / "profile.png")
    print(f"wrote {args.output / 'profile.png'} and {args.output / 'profile.json'}")
    return 0


def _content(measured: dict[int, list[Measurement]], fitted: list[Curve]) -> dict[str, Any]:
    """The records with their lengths, and the exponents of the curves through them."""
    records = [{"length": length, **m.record()} for length, results in measured.items() for m in results]
    exponents = []
    for curve in fitted:
        time, memory = curve.exponents()
        exponents.append({"provider": curve.provider, "mode": curve.mode, "time": time, "memory": memory})
    return {"records": records, "exponents": exponents}
