"""Histories in sessions: runs of what happened without a long pause."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recattn.jagged import Jagged, select_rows

__all__ = ["Sessions", "split_sessions"]


class Sessions(NamedTuple):
    """B histories of S sessions of R rows; sessions are Jagged over the rows, and histories over the sessions."""

    rows: Tensor  # [R] int64, rows of the histories that were split
    offsets: Tensor  # [S + 1], of the sessions over `rows`
    histories: Tensor  # [B + 1], of the histories over the sessions


def split_sessions(
    timestamp: Jagged, gap: int, *, max_sessions: int | None = None, max_length: int | None = None
) -> Sessions:
    """Cuts each history where more than `gap` passes between two of its rows.

    Args:
        timestamp: of the histories, `[T]`, oldest first.
        gap: the longest pause within a session, in the unit of the timestamps.
        max_sessions: of each history, the most recent are kept; None keeps all.
        max_length: of each session, the most recent rows are kept; None keeps all.

    Returns:
        The sessions, oldest first, none of them empty. On an accelerator, which nothing waits for, there are T rows
        and T sessions, or as many as the limits allow, instead of as many as there are: those behind the last are
        slack, and such sessions are empty.

    Raises:
        ValueError: for a negative gap or a limit below 1, or timestamps that are not `[T]`.
    """
    if gap < 0:
        raise ValueError(f"gap: expected at least 0, got {gap}")
    for name, limit in (("max_sessions", max_sessions), ("max_length", max_length)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name}: expected at least 1, got {limit}")
    if timestamp.values.dim() != 1:
        raise ValueError(f"timestamp: expected [T], got {list(timestamp.values.shape)}")
    total = timestamp.values.shape[0]
    begins = timestamp.values[1:] - timestamp.values[:-1] > gap  # [T - 1], of all rows but the first
    begins = torch.nn.functional.pad(begins, (1, 1) if total else (0, 1))
    begins = begins.index_fill(0, timestamp.offsets.to(torch.int64), True)[:total]
    offsets, histories = _over_runs(timestamp.offsets, begins)
    rows = torch.arange(total, device=timestamp.device)
    if max_sessions is None and max_length is None:
        return Sessions(rows, offsets, histories)

    sessions = Jagged(rows, offsets)
    kept = sessions.last(total if max_length is None else max_length)
    if max_sessions is not None:
        recent = Jagged(offsets[:-1], histories).last(max_sessions)
        kept = kept & torch.nn.functional.pad(recent, (0, 1))[sessions.segment_ids()]
    # Only first rows of a session go, or all: what is left begins with its first row, or where one before it went.
    begins = begins | ~torch.nn.functional.pad(kept, (1, 0))[:total]
    most_sessions = total if max_sessions is None else timestamp.batch_size * max_sessions
    most_rows = total if max_length is None else most_sessions * max_length
    rows, over_rows = select_rows(timestamp.offsets, kept, most_rows)
    return Sessions(rows, *_over_runs(over_rows, begins[rows], most_sessions))


def _over_runs(offsets: Tensor, begins: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Of sequences over `offsets [B + 1]`, whose runs begin at the rows where `begins [T]` holds, the offsets of the
    runs over the rows, `[S + 1]`, and of the sequences over the runs, `[B + 1]`; for `most` see `select_rows`."""
    first, sequences = select_rows(offsets, begins, most)
    runs = torch.nn.functional.pad(first, (0, 1)).to(offsets.dtype)
    there = torch.arange(runs.shape[0], device=runs.device) < sequences[-1]
    return torch.where(there, runs, offsets[-1]), sequences
