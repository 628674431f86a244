"""Runs over time: one line of JSON each, and what moved from one to another."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from recattn.bench.measure import OWN, Measurement

MOVED = 0.1  # smaller changes than this part are noise
KEY = ("op", "case", "provider", "mode", "device", "dtype")


def append(
    path: Path, measured: Sequence[Measurement], *, command: str, commit: str | None, machine: str
) -> None:
    """Adds a run as one line."""
    run = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit,
        "machine": machine,
        "records": [asdict(m) for m in measured],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The runs, oldest first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a line that is no run.
    """
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            run = json.loads(line)
            run["records"], run["machine"], run["commit"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a run of recattn bench, got {error}"
            ) from error
        runs.append(run)
    return runs


class Moved(NamedTuple):
    """A measurement that changed; `factor` is the new time over the old one, None where one of them failed."""

    name: str
    before: str
    after: str
    factor: float | None


def moved(runs: Sequence[dict[str, Any]], measured: Sequence[Measurement]) -> Iterator[Moved]:
    """What changed since the latest of the runs that have it: medians by more than a tenth, with p20 to p80 of both
    apart, or that something fails, or fails no more."""
    for name, old, new, m in _both(runs, measured):
        if old["ms"] is None or m.ms is None:
            if (old["ms"] is None) != (m.ms is None):
                yield Moved(name, _words(old), _words(new), None)
            continue
        apart = new["ms_p20"] > old["ms_p80"] or new["ms_p80"] < old["ms_p20"]
        factor = m.ms / old["ms"]
        if apart and max(factor, 1 / factor) > 1 + MOVED:
            yield Moved(name, _words(old), _words(new), factor)


def moved_speedups(runs: Sequence[dict[str, Any]], measured: Sequence[Measurement]) -> Iterator[Moved]:
    """Of how many times as long as recattn's calls those of others take, what changed by more than a tenth, with the
    bounds of both apart. The machine's state falls on both, and so it does less to this than to times."""
    for name, old, _, m in _both(runs, measured):
        low, high = old.get("relative_low"), old.get("relative_high")
        if m.provider == OWN or m.relative is None or m.relative_low is None or m.relative_high is None:
            continue
        if low is None or high is None:
            continue
        factor = m.relative / old["relative"]
        apart = m.relative_low > high or m.relative_high < low
        if apart and max(factor, 1 / factor) > 1 + MOVED:
            yield Moved(name, f"{old['relative']:.2f}×", f"{m.relative:.2f}×", factor)


def _both(
    runs: Sequence[dict[str, Any]], measured: Sequence[Measurement]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], Measurement]]:
    """The name, the latest record and the new one of what was measured before."""
    before = {tuple(record[k] for k in KEY): record for run in runs for record in run["records"]}
    for m in measured:
        new = asdict(m)
        old = before.get(tuple(new[k] for k in KEY))
        if old is not None:
            yield ", ".join(new[k] for k in ("op", "case", "mode", "provider")), old, new, m


def _words(record: dict[str, Any]) -> str:
    return f"{record['ms']:.3g} ms" if record["ms"] is not None else f"failed ({record['error']})"


def compare(path: Path, runs: Sequence[dict[str, Any]], measured: Sequence[Measurement], machine: str) -> str:
    """What moved, in lines to print."""
    if not runs:
        return f"{path} has no runs to compare with"
    lines = [
        f"Against {path}, {len(runs)} runs, the last of {runs[-1]['time']}, commit {runs[-1]['commit']}:"
    ]
    if runs[-1]["machine"] != machine:
        lines.append(f"  That was on another machine: {runs[-1]['machine']}.")
    changes = list(moved(runs, measured))
    for change in changes:
        factor = change.factor
        verdict = "" if factor is None else f", {factor:.2f}× {'slower' if factor > 1 else 'the time'}"
        lines.append(f"  {change.name}: {change.before} -> {change.after}{verdict}")
    factors = [change.factor for change in changes if change.factor is not None]
    if len(factors) > len(measured) / 2 and (min(factors) > 1 or max(factors) < 1):
        middle = statistics.median(factors)
        lines.append(f"  Most moved alike, {middle:.2f}× in the median: look at the machine first.")
    if not changes:
        lines.append("  No time moved by more than a tenth and beyond its spread.")
    speedups = list(moved_speedups(runs, measured))
    lines += [f"  {change.name}, over recattn: {change.before} -> {change.after}" for change in speedups]
    if not speedups:
        lines.append("  No speed-up moved by more than a tenth and beyond what it is known to.")
    return "\n".join(lines)
