"""Runs each task in a process of its own, so that a compiler that crashes takes nothing else with it."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["Failure", "in_processes"]


class Failure(str):
    """What went wrong in a task, in one line."""


def in_processes(tasks: Sequence[Callable[[], Any]], workers: int) -> Iterator[tuple[int, Any]]:
    """Results as they come, each with the number of its task: what it returned, or a `Failure`.

    Processes are forked, so tasks need not be pickled and see what is imported. Each has an empty Triton cache.
    """
    context = multiprocessing.get_context("fork")
    waiting = deque(enumerate(tasks))
    running: dict[Connection, tuple[int, Any, Path]] = {}
    with tempfile.TemporaryDirectory(prefix="recattn-inspect-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    index, task = waiting.popleft()
                    place = Path(folder, str(index))
                    place.mkdir()
                    here, there = context.Pipe(duplex=False)
                    process = context.Process(target=_serve, args=(task, there, place), daemon=True)
                    process.start()
                    there.close()
                    running[here] = index, process, place
                for end in wait(list(running)):
                    assert isinstance(end, Connection)
                    index, process, place = running.pop(end)
                    yield index, _result(end, process, place)
        finally:
            for _, process, _ in running.values():
                process.terminate()


def _serve(task: Callable[[], Any], there: Connection, place: Path) -> None:
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):  # a compiler that fails says megabytes
        os.dup2(log, stream)
    os.environ["TRITON_CACHE_DIR"] = str(place / "cache")
    try:
        result = task()
    except Exception as error:
        result = Failure(f"{_first_cause(error)} {_complaint(place)}".strip())
    there.send(result)


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def _complaint(place: Path) -> str:
    """The first line that looks like one, of what a compiler wrote."""
    said = (place / "log").read_text(errors="replace").splitlines()
    return next((line.strip()[:300] for line in said if re.search(r"error|assert", line, re.IGNORECASE)), "")


def _result(end: Connection, process: Any, place: Path) -> Any:
    try:
        return end.recv()
    except EOFError:
        process.join()
        number = -process.exitcode
        died = signal.Signals(number).name if number > 0 else f"with status {process.exitcode}"
        return Failure(f"the compiler died: {died} {_complaint(place)}".strip())
    finally:
        end.close()
        process.join()
        shutil.rmtree(place)
