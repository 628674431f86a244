"""`recattn bench`: operators against eager code, `torch.compile` and installed libraries."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from recattn.bench import library, report
from recattn.bench.cases import CASES, make_inputs, select_cases
from recattn.bench.console import (
    add_device_arguments,
    chosen_device,
    progress,
    read_log,
    write_json,
    write_records,
)
from recattn.bench.libraries import LIBRARIES, Sizes
from recattn.bench.measure import Measurement, measure
from recattn.bench.providers import PROVIDERS
from recattn.bench.timing import meter_for
from recattn.swap import SEMANTICS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute or two")
    parser.add_argument(
        "--data",
        default="synthetic",
        metavar="synthetic|movielens|PATH",
        help="histories: of generated lengths, of MovieLens-100K, or of a MovieLens data set in a folder"
        " (default: %(default)s)",
    )
    parser.add_argument("--case", nargs="+", metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--provider", nargs="+", metavar="NAME", help=", ".join(PROVIDERS))
    parser.add_argument(
        "--library",
        choices=LIBRARIES,
        help="instead, whole models of a library before and after recattn.fuse",
    )
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help="of the library; all that there are if not given"
    )
    parser.add_argument(
        "--semantics", choices=SEMANTICS, default="exact", help="of the fused models (default: %(default)s)"
    )
    add_device_arguments(parser)
    parser.add_argument("--cold", action="store_true", help="overwrite the GPU's L2 cache before each call")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the measurements as a list of records"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write bench.json and bench.md")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if recattn itself failed somewhere; another provider that fails is a row of the table."""
    device, dtype = chosen_device(args)
    meter = meter_for(device, args.cold)
    if args.library:
        return _run_library(args, device, dtype)
    names = args.provider or list(PROVIDERS)
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"provider: expected some of {', '.join(PROVIDERS)}, got {name!r}")
    providers = {name: PROVIDERS[name] for name in names}
    cases = select_cases(args.case, from_log=args.data != "synthetic", quick=args.quick)
    log = read_log(args.data)
    heading = f"activation_unit on {report.environment(device, dtype)}, data: {args.data}"
    budget, rounds = (2.0, (3, 50)) if args.quick else (10.0, (5, 200))
    measured: list[Measurement] = []
    sections = []
    with progress(len(cases)) as bar:
        bar.console.print(heading, markup=False)
        for case in cases:
            bar.begin(case.name)
            inputs = make_inputs(case, device, dtype, log=log)
            results = measure(case, inputs, providers, meter, budget=budget, rounds=rounds, on_step=bar.say)
            title = f"{case.name}: {case.describe(inputs.fill)}"
            bar.show(report.table(title, results), report.failures(results))
            sections.append(report.markdown(title, results))
            measured += results
            bar.end()
        bar.console.print(report.LEGEND, style="dim")
    if args.json is not None:
        write_records(args.json, measured)
    if args.output is not None:
        write_records(args.output / "bench.json", measured)
        text = "\n".join([f"# Benchmark\n\n{heading}.\n\n{report.LEGEND}\n", *sections])
        (args.output / "bench.md").write_text(text, encoding="utf-8")
    return int(any(m.error for m in measured if m.provider == "recattn"))


def _run_library(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    if device.type != "cpu" or dtype != torch.float32:
        raise ValueError(f"library: expected device cpu and dtype float32, got {device} and {dtype}")
    names = LIBRARIES[args.library][0]
    for name in args.model or ():
        if name not in names:
            raise ValueError(f"model: expected some of {', '.join(names)}, got {name!r}")
    sizes = Sizes(batch=64, longest=50) if args.quick else Sizes()
    budget, rounds = (2.0, (3, 20)) if args.quick else (20.0, (7, 100))
    compared: list[library.Comparison] = []
    with progress(len(args.model or names)) as bar:
        heading = (
            f"{args.library} on {report.environment(device, dtype)}, {args.semantics} semantics: {sizes}"
        )
        bar.console.print(heading, markup=False)
        for name in args.model or names:
            bar.begin(name)
            swapped, found = library.compare(
                args.library,
                name,
                sizes,
                meter_for(device, args.cold),
                semantics=args.semantics,
                budget=budget,
                rounds=rounds,
            )
            bar.console.print(f"{name}:\n{swapped}", markup=False, highlight=False)
            compared += found
            bar.end()
        bar.console.print(library.table(compared))
        bar.console.print(library.LEGEND, style="dim")
    records = [{"library": args.library, **asdict(c)} for c in compared]
    if args.json is not None:
        write_json(args.json, records)
    if args.output is not None:
        write_json(args.output / f"{args.library}.json", records)
    return 0
