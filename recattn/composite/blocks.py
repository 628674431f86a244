"""Blocks of rows that fit in a cache, and what lies between their rows and the sequences they are of."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recattn.composite.segments import Segments

# From this length on W_eff(q) of a sequence is built faster than q is copied to its rows and multiplied.
LONG = 16
# As many rows of sequences of one length repay a span of their own.
RUN = 2048


@dataclass(frozen=True)
class Histories:
    """Where the sequences lie.

    Args:
        offsets: `[B + 1]`, int64.
        sequence: `[T]`, the sequence of each row. On the CPU slack is left out; elsewhere it is counted to
            the last sequence here, but is in no sum.
        bounds: the offsets on the host, where reading them does not synchronise.
    """

    offsets: Tensor
    sequence: Tensor
    bounds: list[int] | None

    @classmethod
    def of(cls, offsets: Tensor, total: int) -> Histories:
        offsets = offsets.to(torch.int64)
        lengths = offsets.diff()
        if offsets.is_cpu:
            return cls(offsets, torch.repeat_interleave(lengths), offsets.tolist())
        if lengths.numel():
            lengths[-1] += total - offsets[-1]
        return cls(offsets, torch.repeat_interleave(lengths, output_size=total), None)

    def spans(self) -> list[Block]:
        """Blocks of whole sequences, as long as they can be."""
        batch, total = self.offsets.numel() - 1, self.sequence.numel()
        if total == 0:
            return []
        if self.bounds is None or total < RUN:
            return [self.ragged(0, total, 0, batch)]
        spans, done, bounds = [], 0, self.bounds
        for first, last, length in [*runs(self.offsets), (batch, batch, 0)]:
            if bounds[done] < bounds[first]:
                spans.append(self.ragged(bounds[done], bounds[first], done, first))
            if length:
                spans.append(
                    Block(self, slice(bounds[first], bounds[last]), slice(first, last), length, None)
                )
            done = last
        return spans

    def ragged(self, begin: int, end: int, first: int, last: int) -> Block:
        """The rows `begin` to `end`, of the sequences `first` to `last`."""
        return Block(self, slice(begin, end), slice(first, last), 1, self.sequence[begin:end])


@dataclass(frozen=True)
class Block:
    """Some rows, and the sequences they are of: `length` rows of each, or any number of each.

    Arithmetic between rows and sequences broadcasts over `[n, length, ...]`, where what belongs to a sequence
    comes as `[n, 1, ...]`. If lengths vary, each row stands for a sequence of length 1.
    """

    histories: Histories
    rows: slice
    owners: slice
    length: int
    sequence: Tensor | None  # of each row, if lengths vary

    @cached_property
    def segments(self) -> Segments:
        """The sequences among the rows, from 0."""
        begin, end = self.rows.start, self.rows.stop
        offsets = self.histories.offsets[self.owners.start : self.owners.stop + 1]
        return Segments.of(offsets.sub(begin).clamp_(0, end - begin), end - begin)

    def split(self, x: Tensor) -> Tensor:
        """Rows, `[rows, ...]`, as `[n, length, ...]`."""
        return x.unsqueeze(1) if self.length == 1 else x.unflatten(0, (-1, self.length))

    def take(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Of `[B, ...]` what belongs to the rows, `[n, 1, ...]`. `out` is for a copy, if one is made."""
        if self.sequence is None:
            return x[self.owners].unsqueeze(1)
        return torch.index_select(x, 0, self.sequence, out=out).unsqueeze(1)

    def dot(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """`Σ_c x y` of `x [rows, C]` and of what was taken as `y [n, 1, C]`: `[n, length]`. May overwrite
        `out [rows, C]`."""
        if self.sequence is None:
            return torch.bmm(self.split(x), y.mT).squeeze(2)
        return torch.mul(x, y.squeeze(1), out=out).sum(1, keepdim=True)

    def sum(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums of `[rows, C]` over each sequence, `[sequences, C]`, weighted if asked."""
        if self.sequence is None and weights is None:
            return self.split(x).sum(1)
        return self.segments.sum(x, weights)

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """`"max"` or `"sum"` of `[rows]` over each sequence, `[sequences]`."""
        if self.sequence is not None:
            if how == "sum":
                return self.segments.sum_numbers(x)
            return torch.segment_reduce(x, how, offsets=self.segments.offsets, unsafe=True)
        return self.split(x).amax(1) if how == "max" else self.split(x).sum(1)

    def pieces(self, size: int) -> Iterator[Block]:
        """Blocks of at most `size` rows."""
        rows, owners, bounds = self.rows, self.owners, self.histories.bounds
        if self.sequence is not None:
            for begin in range(rows.start, rows.stop, size):
                end = min(begin + size, rows.stop)
                first, last = owners.start, owners.stop
                if bounds is not None:
                    first, last = bisect_right(bounds, begin) - 1, bisect_left(bounds, end)
                yield self.histories.ragged(begin, end, first, last)
            return
        assert bounds is not None
        step = max(size // self.length, 1)
        for first in range(owners.start, owners.stop, step):
            last = min(first + step, owners.stop)
            for begin in range(bounds[first], bounds[last], size):
                end = min(begin + size, bounds[last])
                length = min(self.length, end - begin)
                yield Block(self.histories, slice(begin, end), slice(first, last), length, None)


class Workspace:
    """Buffers by name that are kept from one block to the next: fresh memory costs more than arithmetic.

    Args:
        rows: as many as a block has at most.
    """

    def __init__(self, like: Tensor, rows: int) -> None:
        self._like, self._rows = like, rows
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        view = self._views.get(name)
        if view is None or view.shape[0] != rows:
            if name not in self._buffers:
                self._buffers[name] = self._like.new_empty(self._rows, width)
            view = self._views[name] = self._buffers[name][:rows]
        return view


def runs(offsets: Tensor) -> list[tuple[int, int, int]]:
    """Neighbouring sequences of one length that are worth it: the first, the one behind, the length."""
    lengths = np.diff(offsets.numpy())
    edges = np.flatnonzero(np.concatenate(([True], lengths[1:] != lengths[:-1], [True])))
    firsts, ends = edges[:-1], edges[1:]
    length = lengths[firsts]
    worth = (length >= LONG) & (length * (ends - firsts) >= RUN)
    return list(zip(*(x[worth].tolist() for x in (firsts, ends, length)), strict=True))
