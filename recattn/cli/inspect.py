"""`recattn inspect`: what the kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from recattn.inspect import report
from recattn.inspect.calls import select_calls
from recattn.inspect.chips import CHIPS

ARCHS = "sm_80,sm_90,gfx942"
DTYPES = ("bf16", "fp16", "tf32", "fp32")
LONG_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # as other commands have them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compiles what each operator launches by default, and reports registers, spills, shared memory, occupancy,"
        " instructions and the roofline of the operator. The exit status is 1 where a kernel spills registers, does not"
        " compile, or does not fit the GPU."
    )
    parser.add_argument(
        "--arch", default=ARCHS, metavar="A,B", help=f"some of {', '.join(CHIPS)} (default: {ARCHS})"
    )
    parser.add_argument("--op", metavar="A,B", help="operators (default: all)")
    parser.add_argument(
        "--dtype",
        default="bf16",
        metavar="A,B",
        help=f"some of {', '.join(DTYPES)}; tf32 is float32 (default: bf16)",
    )
    parser.add_argument(
        "--shape",
        metavar="D=64,...",
        help="sizes to change, as a record's shape has them, such as hidden=80x40",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of records")
    parser.add_argument(
        "--html",
        type=Path,
        default=Path("results/inspect.html"),
        metavar="FILE",
        help="where the page with the rooflines goes (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: one per core"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 1 if a kernel spills registers, does not compile, or does not fit the GPU."""
    archs = _some("arch", args.arch, tuple(CHIPS))
    dtypes = _some("dtype", ",".join(LONG_NAMES.get(d, d) for d in args.dtype.split(",")), DTYPES)
    calls = select_calls(args.op and args.op.split(","), args.shape)
    if args.workers < 1:
        raise ValueError(f"workers: expected at least 1, got {args.workers}")
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError as error:
        raise RuntimeError(f'{error}; pip install "recattn[bench]" brings it') from error
    try:
        from recattn.inspect.page import page
        from recattn.inspect.planning import Job, compiled, plan
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; Triton is what compiles the kernels") from error

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    # No thread may refresh the bar: processes are forked beside it.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("what is launched", total=None)
        bar.refresh()
        planned = plan(calls, dtypes, [CHIPS[arch] for arch in archs])
        bar.update(task, total=planned.compilations)

        def on_done(job: Job) -> None:
            bar.update(task, advance=1, description=f"{job.chip.arch} {job.dtype} {job.kernel}", refresh=True)

        records = compiled(planned.jobs, args.workers, on_done)
    for table in report.tables(records):
        console.print(table)
    console.print(report.LEGEND, style="dim")
    for line in planned.uncovered:
        console.print(f"no kernel: {line}", style="dim", markup=False, highlight=False)
    bad = report.failures(records)
    for line in bad:
        console.print(line, style="red", markup=False, highlight=False)
    console.print(f"{len(records)} kernels, {len(bad)} of them not clean")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([r.as_json() for r in records], indent=2) + "\n", encoding="utf-8")
    args.html.parent.mkdir(parents=True, exist_ok=True)
    args.html.write_text(page(records), encoding="utf-8")
    console.print(f"wrote {args.html}")
    return int(bool(bad))


def _some(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    chosen = list(dict.fromkeys(text.split(",")))
    for value in chosen:
        if value not in known:
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {value!r}")
    return chosen
