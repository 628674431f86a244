"""Launch settings found by measuring: on request only, kept on disk, for kinds of calls and not for lengths."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .settings import Launch

ENABLED = os.environ.get("RECATTN_AUTOTUNE", "0") not in ("", "0")


class Tuned(NamedTuple):
    """What measuring one kernel has found."""

    kernel: str  # and what it was tuned for
    launch: Launch
    milliseconds: float
    default: Launch
    default_milliseconds: float
    failed: dict[str, str]  # settings that did not compile or run, and why


class _Trial:
    """Answers every question for settings, with one answer changed, and remembers the questions."""

    def __init__(self) -> None:
        self.asked: dict[str, Launch] = {}
        self.changed: dict[str, Launch] = {}

    def __call__(self, key: str, default: Launch) -> Launch:
        self.asked.setdefault(key, default)
        return self.changed.get(key, default)


_trial: _Trial | None = None
_measuring = threading.Lock()
_stored: dict[Path, dict[str, Launch]] = {}


def tuned(
    kernel: str, row: str, default: Launch, dim: int, hidden: Sequence[int], device: torch.device
) -> Launch:
    """The settings of a kernel: what was found for this kind of call on this GPU, if that is asked for, else the
    default. A kind is the kernel, the row of its table, and widths rounded up to powers of two."""
    if _trial is None and not ENABLED:
        return default
    widths = "x".join(str(triton.next_power_of_2(n)) for n in (dim, *hidden))
    key = f"{kernel} {row} {widths}"
    if _trial is not None:
        return _trial(key, default)
    return _load(cache_file(device)).get(key, default)


def cache_file(device: torch.device) -> Path:
    """Where results are kept: per GPU and Triton, in `RECATTN_CACHE` or the user's cache folder."""
    folder = os.environ.get("RECATTN_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "recattn"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path(folder) / f"launches-{re.sub(r'[^A-Za-z0-9]+', '-', name)}-triton-{triton.__version__}.json"


def alternatives(default: Launch) -> Iterator[Launch]:
    """Settings that differ from the default in one respect."""
    choices: dict[str, tuple[int, ...]] = {
        "block": (16, 32, 64, 128),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3),
        "programs_per_sm": (default.programs_per_sm // 2, default.programs_per_sm * 2),
        "least_rows": (default.least_rows // 2, default.least_rows * 2),
    }
    for field, values in choices.items():
        for value in values:
            if value > 0 and value != getattr(default, field):
                yield Launch(**default._asdict() | {field: value})


def autotune(
    call: Callable[[], Any], device: torch.device, timer: Callable[[Callable[[], Any]], float]
) -> list[Tuned]:
    """Measures `call` with alternatives for each kernel that it launches, and keeps the fastest on disk. One thread at
    a time measures; others wait."""
    results = []
    with _measuring, _trying() as trial:
        call()
        for key, default in list(trial.asked.items()):
            before = timer(call)
            best, best_time, failed = default, before, {}
            for launch in alternatives(default):
                trial.changed[key] = launch
                try:
                    spent = timer(call)
                except (RuntimeError, ValueError, triton.CompilationError, triton.OutOfResources) as error:
                    failed[str(launch)] = f"{type(error).__name__}: {str(error)[:200]}"
                    continue
                if spent < best_time:
                    best, best_time = launch, spent
            trial.changed[key] = best
            results.append(Tuned(key, best, best_time, default, before, failed))
        path = cache_file(device)
        found = _load(path) | {result.kernel: result.launch for result in results}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(
            json.dumps({key: launch._asdict() for key, launch in sorted(found.items())}, indent=1)
        )
        partial.replace(path)
        _stored[path] = found
    return results


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of some runs."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(call, return_mode="median"))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times)[1]


@contextmanager
def _trying() -> Iterator[_Trial]:
    global _trial
    _trial = _Trial()
    try:
        yield _trial
    finally:
        _trial = None


def _load(path: Path) -> dict[str, Launch]:
    if path not in _stored:
        found = json.loads(path.read_text()) if path.exists() else {}
        _stored[path] = {
            key: Launch(**fields | {"last_slab": tuple(fields["last_slab"])}) for key, fields in found.items()
        }
    return _stored[path]
