"""Blocks of rows small enough for a cache, and what lies between their rows and the sequences that own them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# From this length on W_eff(q) of a sequence is built faster than q is copied to its rows and multiplied with k.
LONG = 16
# As many rows of sequences of one length are worth a block of their own.
RUN = 512


@dataclass(frozen=True)
class Histories:
    """Where the sequences lie.

    Args:
        offsets: `[B + 1]`, int64.
        sequence: `[T]`, the sequence of each row; slack is counted to the last one.
        bounds: the offsets on the host, where reading them costs no synchronisation.
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
        """Blocks of whole sequences, as long as they can be. Slack is left out on the CPU; elsewhere it belongs to
        no sequence's sum."""
        batch, total = self.offsets.numel() - 1, self.sequence.numel()
        if total == 0:
            return []
        if self.bounds is None:
            return [Block(self, 0, total, 0, batch)]
        spans, done, bounds = [], 0, self.bounds
        for first, last, length in [*runs(self.offsets), (batch, batch, 0)]:
            if bounds[done] < bounds[first]:
                spans.append(Block(self, bounds[done], bounds[first], done, first))
            if length:
                spans.append(Block(self, bounds[first], bounds[last], first, last, length))
            done = last
        return spans


@dataclass(frozen=True)
class Block:
    """Rows `begin` to `end`, of the sequences `first` to `last`: `length` of each, or if that is 0 any number of each.

    Arithmetic between rows and sequences broadcasts over `[n, length, ...]`, where what belongs to a sequence comes
    as `[n, 1, ...]`. If lengths vary, each row stands for a sequence of length 1.
    """

    histories: Histories
    begin: int
    end: int
    first: int
    last: int
    length: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.begin, self.end)

    @cached_property
    def rows(self) -> slice:
        return slice(self.begin, self.end)

    @cached_property
    def owners(self) -> slice:
        return slice(self.first, self.last)

    @cached_property
    def sequence(self) -> Tensor:
        """Of each row, `[end - begin]`."""
        return self.histories.sequence[self.rows]

    @cached_property
    def offsets(self) -> Tensor:
        """Of the sequences, `[last - first + 1]`, from 0 = `begin`."""
        offsets = self.histories.offsets[self.first : self.last + 1]
        return offsets.sub(self.begin).clamp_(0, self.end - self.begin)

    @cached_property
    def positions(self) -> Tensor:
        return torch.arange(self.end - self.begin, device=self.histories.offsets.device)

    def split(self, x: Tensor) -> Tensor:
        """Rows, `[end - begin, ...]`, as `[n, length, ...]`."""
        return x.view(-1, self.length or 1, *x.shape[1:])

    def take(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Of `[B, ...]` what belongs to the rows, `[n, 1, ...]`. `out` is there for a copy, if one is made."""
        if self.length:
            return x[self.owners].unsqueeze(1)
        return torch.index_select(x, 0, self.sequence, out=out).unsqueeze(1)

    def dot(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """Rows of `[end - begin, C]` times those taken as y, `[n, 1, C]`: `[n, length]`. Overwrites `out`."""
        if self.length:
            return torch.bmm(self.split(x), y.mT).squeeze(2)
        return torch.mul(self.split(x), y, out=self.split(out)).sum(2)

    def sum(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums of the rows of `[end - begin, C]` over each sequence, `[last - first, C]`, weighted if asked."""
        if not self.length:
            return segment_sum(x, self.offsets, weights, self.positions)
        if weights is None:
            return self.split(x).sum(1)
        return torch.bmm(self.split(weights).unsqueeze(1), self.split(x)).squeeze(1)

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """`"max"` or `"sum"` of `[end - begin]` over each sequence, `[last - first]`."""
        if not self.length:
            return torch.segment_reduce(x, how, offsets=self.offsets, unsafe=True)
        return self.split(x).amax(1) if how == "max" else self.split(x).sum(1)

    def pieces(self, size: int) -> Iterator[Block]:
        """Blocks of at most `size` rows."""
        if not self.length:
            for begin in range(self.begin, self.end, size):
                yield self._ragged_piece(begin, min(begin + size, self.end))
        elif self.length <= size:
            step = size // self.length
            for first in range(self.first, self.last, step):
                last = min(first + step, self.last)
                begin = self.begin + (first - self.first) * self.length
                yield Block(self.histories, begin, begin + (last - first) * self.length, first, last, self.length)
        else:
            for first in range(self.first, self.last):
                stop = self.begin + (first - self.first + 1) * self.length
                for begin in range(stop - self.length, stop, size):
                    end = min(begin + size, stop)
                    yield Block(self.histories, begin, end, first, first + 1, end - begin)

    def _ragged_piece(self, begin: int, end: int) -> Block:
        bounds = self.histories.bounds
        if bounds is None:
            return Block(self.histories, begin, end, self.first, self.last)
        first, last = bisect_right(bounds, begin) - 1, bisect_left(bounds, end)
        return Block(self.histories, begin, end, first, last)


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
    """Neighbouring sequences of one length that are worth it: the first, the one behind the last, the length."""
    lengths = np.diff(offsets.numpy())
    edges = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    firsts, ends = edges[:-1], edges[1:]
    length = lengths[firsts]
    worth = (length >= LONG) & (length * (ends - firsts) >= RUN)
    return list(zip(*(x[worth].tolist() for x in (firsts, ends, length)), strict=True))


def segment_sum(
    x: Tensor, offsets: Tensor, weights: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """`[n, C]` rows to `[B, C]` sums over the segments, weighted if asked. `positions` are 0 to n - 1, if at hand."""
    if x.shape[0] == 0:
        return x.new_zeros(offsets.numel() - 1, x.shape[1])
    if positions is None:
        positions = torch.arange(x.shape[0], device=x.device)
    # The rows behind the last offset make a bag of their own, which is dropped.
    return F.embedding_bag(
        positions, x, offsets.to(torch.int64), mode="sum", per_sample_weights=weights
    )[:-1]
