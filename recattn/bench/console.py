"""What the commands that time things share: arguments, a progress bar, files of records."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recattn.data import Interactions, fetch_movielens, read_movielens

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

DTYPES = {
    str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def read_log(data: str) -> Interactions | None:
    """The log that `--data` names: none for `synthetic`, MovieLens-100K for `movielens`, or a folder's."""
    if data == "synthetic":
        return None
    return read_movielens(fetch_movielens() if data == "movielens" else Path(data))


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--dtype` and `--threads`."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)"
    )


def add_data_argument(parser: argparse.ArgumentParser, meaning: str) -> None:
    """`--data`."""
    parser.add_argument(
        "--data",
        default="synthetic",
        metavar="synthetic|movielens|PATH",
        help=f"{meaning}: generated, of MovieLens-100K, or of a MovieLens data set in a folder (default: %(default)s)",
    )


def chosen_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What `add_device_arguments` parsed; sets the number of threads.

    Raises:
        RuntimeError: for a device that does not exist here.
    """
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.empty(0, device=device)
    return device, DTYPES[args.dtype]


def positive(text: str) -> int:
    """A command-line integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


class Steps:
    """A progress bar that says what is being done, with room above it for what is finished."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar, self._task, self._section = bar, bar.add_task("", total=total), ""

    @property
    def console(self) -> Console:
        return self._bar.console

    def begin(self, section: str) -> None:
        """The next piece of work."""
        self._section = section
        self.say("inputs")

    def say(self, step: str) -> None:
        """The next step of this piece of work."""
        self._bar.update(self._task, description=f"{self._section}: {step}")

    def show(self, table: Table, failures: Sequence[str]) -> None:
        """What came out."""
        self.console.print(table)
        for line in failures:
            self.console.print(line, style="red", markup=False, highlight=False)

    def end(self) -> None:
        """This piece of work is done."""
        self._bar.advance(self._task)


@contextmanager
def progress(total: int) -> Iterator[Steps]:
    """A progress bar over `total` pieces of work, gone in the end.

    Raises:
        RuntimeError: if rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    columns = (SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        yield Steps(bar, total)


def missing_extra(error: ModuleNotFoundError) -> RuntimeError:
    """What to say where a package of the extra `bench` is missing."""
    return RuntimeError(f'{error}; pip install "recattn[bench]" brings it')


def write_json(path: Path, content: Any) -> None:
    """Folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
