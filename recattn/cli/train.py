"""`recattn train`: models on a real log, fused and eager side by side."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from recattn.data import Examples, Interactions, fetch_movielens, read_movielens
from recattn.models import MODELS, RankingModel
from recattn.nn.twin import IMPLEMENTATIONS
from recattn.training import Curve, train_side_by_side

# How far apart the curves of one model computed in two ways may be.
LOSS_TOLERANCE = 1e-3  # relative
AUC_TOLERANCE = 2e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains each model twice on MovieLens from the same initial weights, on the same batches in fp32, once"
        " with fused layers and once with their eager twins. The latest fifth of the log is the test part."
    )
    parser.add_argument(
        "--model",
        choices=[*MODELS, "all"],
        nargs="+",
        default=["din"],
        metavar="NAME",
        help=f"one or more of {', '.join(MODELS)}; or all",
    )
    parser.add_argument(
        "--layers",
        choices=IMPLEMENTATIONS,
        nargs="+",
        default=list(IMPLEMENTATIONS),
        metavar="fused|eager",
        help="only one of the two; default: both",
    )
    parser.add_argument("--epochs", type=_positive, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of examples and dropout")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="MovieLens files; default: MovieLens-100K, downloaded once",
    )
    parser.add_argument("--batch-size", type=_positive, default=1024)
    parser.add_argument("--dim", type=_positive, default=32, help="width of each embedding; items have two")
    parser.add_argument("--lr", type=float, default=3e-3, help="of Adam")
    parser.add_argument("--max-history", type=_positive, default=200, help="most recent interactions kept")
    parser.add_argument("--threads", type=_positive, help="of the CPU; default: as many as PyTorch chooses")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write a list with a report per model: for fused and eager, a list per epoch of training loss, and"
        " label_loss without auxiliary terms, test auc, user-grouped auc (gauc), seconds and peak_bytes",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    try:
        import sklearn.metrics  # noqa: F401 (which the AUC would miss only after an epoch)
        from rich.console import Console
    except ImportError as error:
        raise RuntimeError(f'{error.name} is not installed; pip install "recattn[bench]"') from error
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: expected a file in an existing folder, got {args.json}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    log = read_movielens(args.data if args.data is not None else fetch_movielens())
    parts = log.examples(max_history=args.max_history).split()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    lengths = parts[0].history_lengths()
    console.print(
        f"{log.num_users} users, {log.num_items} items, {len(parts[0])} training and {len(parts[1])} test examples;"
        f" histories of {float(lengths.double().mean()):.0f} on average, {int(lengths.max())} at most;"
        f" {device}, {args.batch_size} examples a batch"
    )
    names = list(MODELS) if "all" in args.model else list(dict.fromkeys(args.model))
    curves = {name: _train(name, args, log, parts, device, console) for name in names}
    if len(names) > 1:
        console.print(_summary(curves, device))
    if args.json is not None:
        reports = [
            {"model": name, **{layers: asdict(curve) for layers, curve in of_model.items()}}
            for name, of_model in curves.items()
        ]
        args.json.write_text(json.dumps(reports, indent=2) + "\n")
    return 0


def _train(
    name: str,
    args: argparse.Namespace,
    log: Interactions,
    parts: tuple[Examples, Examples],
    device: torch.device,
    console: Any,
) -> dict[str, Curve]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    models = _twins(name, args, log, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        batches = -(-len(parts[0]) // args.batch_size)
        task = progress.add_task("warming up", total=batches * args.epochs)
        curves = train_side_by_side(
            models,
            *parts,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=args.seed,
            device=device,
            progress=lambda epoch, done: progress.update(
                task, advance=done, description=f"{name}, epoch {epoch + 1}, {' and '.join(models)}"
            ),
        )
    console.print(_table(name, curves, device))
    if len(curves) == 2:
        for line in _verdict(curves["fused"], curves["eager"]):
            console.print(line)
    return curves


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected cpu, since PyTorch finds no CUDA device, got {device}")
    return device


def _twins(
    name: str, args: argparse.Namespace, log: Interactions, device: torch.device
) -> dict[str, RankingModel]:
    """Copies of one model, with fused layers and with eager ones."""
    torch.manual_seed(args.seed)
    model = MODELS[name](log.num_users, log.num_items, log.num_categories, dim=args.dim).to(device)
    return {layers: copy.deepcopy(model).use(layers) for layers in IMPLEMENTATIONS if layers in args.layers}


def _table(model: str, curves: dict[str, Curve], device: torch.device) -> Any:
    from rich.table import Table

    held = "allocated" if device.type == "cuda" else "resident"
    table = Table(title=f"{model.upper()}, {' and '.join(curves)} from the same weights on the same batches")
    apart = any(curve.label_loss != curve.loss for curve in curves.values())
    parts = ("loss", "of labels") if apart else ("loss",)
    for heading in ("epoch", "layers", *parts, "test AUC", "by user", "seconds", f"peak {held}"):
        table.add_column(heading, justify="left" if heading == "layers" else "right")
    for epoch in range(len(next(iter(curves.values())).loss)):
        for name, curve in curves.items():
            losses = (curve.loss, curve.label_loss)[: len(parts)]
            figures = (f"{figure[epoch]:.5f}" for figure in (*losses, curve.auc, curve.gauc))
            last = name == list(curves)[-1]
            table.add_row(
                str(epoch + 1) if name == next(iter(curves)) else "",
                name,
                *figures,
                f"{curve.seconds[epoch]:.2f}",
                _mebibytes(curve.peak_bytes[epoch]),
                end_section=last,
            )
    return table


def _summary(curves: dict[str, dict[str, Curve]], device: torch.device) -> Any:
    """A row per model, by its last epoch; seconds are medians over the epochs."""
    from rich.table import Table

    held = "allocated" if device.type == "cuda" else "resident"
    table = Table(title="All models after the last epoch")
    for heading in ("model", "test AUC", "by user", "over mean pooling", "s/epoch fused", "eager"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for heading in (f"peak {held}, fused", "eager"):
        table.add_column(heading, justify="right")
    base = next(iter(curves["mean"].values())) if "mean" in curves else None
    for name, of_model in curves.items():
        trained = next(iter(of_model.values()))
        both = [of_model.get(layers) for layers in IMPLEMENTATIONS]
        table.add_row(
            name,
            f"{trained.auc[-1]:.4f}",
            f"{trained.gauc[-1]:.4f}",
            "" if base is None else f"{trained.gauc[-1] - base.gauc[-1]:+.4f}",
            *("" if curve is None else f"{statistics.median(curve.seconds):.1f}" for curve in both),
            *("" if curve is None else _mebibytes(_peak(curve)) for curve in both),
        )
    return table


def _peak(curve: Curve) -> int | None:
    return max((peak for peak in curve.peak_bytes if peak), default=None)


def _mebibytes(size: float | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:.1f} MiB"


def _verdict(fused: Curve, eager: Curve) -> list[str]:
    loss = max(abs(f - e) / abs(e) for f, e in zip(fused.loss, eager.loss, strict=True))
    auc = _largest_gap(fused.auc, eager.auc)
    gauc = _largest_gap(fused.gauc, eager.gauc)
    agree = loss <= LOSS_TOLERANCE and max(auc, gauc) <= AUC_TOLERANCE
    lines = [
        f"The curves {'agree' if agree else 'DO NOT agree'}: largest relative difference of the loss"
        f" {loss:.1e} (tolerance {LOSS_TOLERANCE:g}), of the AUC {auc:.1e}, by user {gauc:.1e}"
        f" (tolerance {AUC_TOLERANCE:g}).",
        f"Eager takes {sum(eager.seconds) / sum(fused.seconds):.2f} times the seconds of fused.",
    ]
    fused_peaks = [peak for peak in fused.peak_bytes if peak]
    eager_peaks = [peak for peak in eager.peak_bytes if peak is not None]
    if fused_peaks and eager_peaks:
        lines.append(f"Eager takes {max(eager_peaks) / max(fused_peaks):.2f} times the peak memory of fused.")
    return lines


def _largest_gap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
