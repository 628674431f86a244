"""`recattn bench`: operators and models against eager code, `torch.compile` and installed libraries."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from recattn.bench import history, library, page, plot, report
from recattn.bench.cases import CASES, check_providers, default_providers, select_cases
from recattn.bench.console import (
    add_data_argument,
    add_device_arguments,
    chosen_device,
    progress,
    read_log,
    write_json,
)
from recattn.bench.environment import command_line, commit, details, environment, machine
from recattn.bench.libraries import LIBRARIES, Sizes
from recattn.bench.measure import Measurement, measure
from recattn.bench.report import Section
from recattn.bench.roofline import peaks_of
from recattn.bench.task import MODES, Setting
from recattn.bench.timing import meter_for
from recattn.swap import SEMANTICS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: some minutes")
    add_data_argument(parser, "histories")
    parser.add_argument("--op", nargs="+", metavar="NAME", help=", ".join(dict.fromkeys(c.op for c in CASES)))
    parser.add_argument("--case", nargs="+", metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument(
        "--provider",
        nargs="+",
        metavar="NAME",
        help="default: all that a case has, but for libraries that are not installed",
    )
    parser.add_argument(
        "--mode", nargs="+", choices=MODES, help="default: all but forward, which keeps a graph and drops it"
    )
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
    parser.add_argument("--graph", action="store_true", help="time replays of a CUDA graph of each call")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the measurements as a list of records"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write bench.json, bench.md, bench.html, and a picture as PNG and SVG",
    )
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="append this run to a file of JSON lines (default: history.jsonl in --output, if that is given)",
    )
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print what moved since such a file")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if recattn itself failed somewhere; another provider that fails is a row of the table."""
    device, dtype = chosen_device(args)
    if args.library:
        return _run_library(args, device, dtype)
    meter = meter_for(device, args.cold, args.graph)
    cases = select_cases(args.case, args.op, from_log=args.data != "synthetic", quick=args.quick)
    check_providers(args.provider, cases)
    earlier = history.read(args.compare) if args.compare else []
    setting = Setting(device, dtype, read_log(args.data))
    modes = args.mode or [mode for mode in MODES if mode != "forward"]
    budget, rounds = (4.0, (5, 60)) if args.quick else (15.0, (9, 200))
    heading = f"{environment(device, dtype)}, data: {args.data}, {meter.clock}"
    sections = []
    with progress(len(cases)) as bar:
        bar.console.print(heading, markup=False)
        peaks = peaks_of(device, dtype)
        bar.console.print(f"roofline: {peaks.describe()}", markup=False)
        for case in cases:
            bar.begin(case.name)
            task = case.task(setting)
            measured = measure(
                task,
                meter,
                providers=args.provider or default_providers(case, quick=args.quick),
                modes=modes,
                budget=budget,
                rounds=rounds,
                peaks=peaks,
                on_step=bar.say,
            )
            found = Section(f"{case.op}, {case.name}: {task.description}", measured)
            bar.show(report.table(found), report.failures(measured))
            sections.append(found)
            bar.end()
        measured = [m for found in sections for m in found.measured]
        bar.console.print(report.LEGEND, style="dim")
        bar.console.print(report.summary(measured), markup=False, highlight=False)
        if args.compare:
            moved = history.compare(args.compare, earlier, measured, machine(device))
            bar.console.print(moved, markup=False, highlight=False)
    if args.json is not None:
        write_json(args.json, report.records(measured))
    log = args.history or (args.output and args.output / "history.jsonl")
    if log is not None:
        command = command_line(sys.argv[1:])
        history.append(log, measured, command=command, commit=commit(), machine=machine(device))
    if args.output is not None:
        known = {**details(device, dtype), "time": meter.clock, "roofline": peaks.describe()}
        _write(args.output, heading, sections, known)
    return int(any(m.error for m in measured if m.provider == "recattn"))


def _write(folder: Path, heading: str, sections: list[Section], known: dict[str, str]) -> None:
    """The files of `--output`."""
    measured: list[Measurement] = [m for section in sections for m in section.measured]
    write_json(folder / "bench.json", report.records(measured))
    summary = report.summary(measured)
    content = [f"# Benchmark\n\n{summary}\n\n{heading}.\n\n{report.LEGEND}\n"]
    content += [report.markdown(section) for section in sections]
    (folder / "bench.md").write_text("\n".join(content), encoding="utf-8")
    pictures = []
    if any(m.ms for m in measured if m.provider == report.OWN):
        figure = plot.ratios(measured, heading)
        plot.save(figure, folder / "bench")
        pictures.append(plot.inline(figure))
    html = page.page(
        "recattn bench",
        [summary],
        pictures,
        [page.section(section) for section in sections],
        environment=known,
        command=command_line(sys.argv[1:]),
        legend=report.LEGEND,
    )
    (folder / "bench.html").write_text(html, encoding="utf-8")


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
        heading = f"{args.library} on {environment(device, dtype)}, {args.semantics} semantics: {sizes}"
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
