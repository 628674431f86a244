"""Sequences in groups of one length, or padded to one: what PyTorch has fast operators for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Scores that PyTorch's attention takes at once; what is left of a row of them goes one by one.
VECTOR = 16


class Cost(NamedTuple):
    """Microseconds on one core, roughly, by which sequences are padded."""

    group: float
    sequence: float
    row: float
    pair: float
    tail: float  # a score that is left of a row
    key: float  # to lay one out apart from the queries

    def times(self, heads: int, width: int) -> Cost:
        """For so many heads, that are so wide together."""
        each = (self.sequence * heads, self.row * heads, self.pair * heads, self.tail * heads)
        return Cost(self.group, *each, self.key * width)

    def best(self, length: int, alone: bool) -> tuple[float, int]:
        """Of a sequence, and how many keys it is to have, the padding included; queries too, but where all sequences
        are of one length, so that only for padding anything is copied."""
        width = -(-length // VECTOR) * VECTOR
        padded = self._of(length, width) + self.key * width if alone else self._of(width, width)
        return min((self._of(length, length), length), (padded, width))

    def _of(self, length: int, width: int) -> float:
        return self.sequence + (self.row + self.pair * width + self.tail * (width % VECTOR)) * length


class Group(NamedTuple):
    """n sequences, padded to L queries and W keys each."""

    starts: Tensor  # [n], of each its first row in the call
    length: int  # L
    width: int  # W
    lengths: Tensor  # [n]
    even: bool  # whether all lengths are L

    def pieces(self, size: int) -> Iterator[Group]:
        """Of at most so many sequences."""
        pieces = zip(self.starts.split(size), self.lengths.split(size), strict=True)
        return (self._replace(starts=starts, lengths=lengths) for starts, lengths in pieces)

    @property
    def size(self) -> int:
        return self.starts.shape[0]

    def heads(self, x: Tensor, count: int) -> Tensor:
        """`[n·L, H·d]` to `[n, H, L, d]`, and `[n·W, H·d]` to `[n, H, W, d]`."""
        return x.reshape(self.size, -1, count, x.shape[1] // count).transpose(1, 2)

    def rows(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x.transpose(1, 2).reshape(self.size * x.shape[2], -1)

    def padding(self) -> Tensor | None:
        """Which keys are none: `[n, 1, 1, W]`, or `[1, 1, 1, W]` where all lengths are L; None if all are some."""
        if self.even and self.width == self.length:
            return None
        lengths = self.lengths[: 1 if self.even else None]
        return torch.arange(self.width, device=lengths.device) >= lengths[:, None, None, None]


class Rows:
    """Where the rows of a call lie in a layout that has so many of them for each sequence of a group.

    Args:
        places: of each row of the call; None where all sequences have `length` rows and lie in order.
        total: how many rows of the call there are, without slack.
        sizes: rows of the groups.
    """

    def __init__(self, places: Tensor | None, length: int, total: int, sizes: list[int]) -> None:
        self._places, self._length, self._total = places, length, total
        self._sizes, self._all = sizes, sum(sizes)

    def gather(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """`fill`: of the padding."""
        x = x[: self._total].to(dtype)
        shape = (self._all, x.shape[1])
        if self._all == self._total:
            if self._places is not None:
                return x.new_empty(shape).index_copy_(0, self._places, x)
            # PyTorch's attention takes a row's elements to be adjacent, and says nothing where they are not.
            return x if x.stride(1) == 1 else x.contiguous()
        out = x.new_full(shape, fill)
        if self._places is not None:
            return out.index_copy_(0, self._places, x)
        self._without_padding(out).copy_(x.unflatten(0, (-1, self._length)))
        return out

    def scatter(self, x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `gather`, to as many rows as `like` has, zero for slack."""
        x = x.to(dtype)
        if self._places is not None:
            x = x.index_select(0, self._places)
        elif self._all > self._total:
            x = self._without_padding(x).flatten(0, 1)
        if self._total == like.shape[0]:
            return x
        out = x.new_zeros(like.shape[0], x.shape[1])
        out[: self._total] = x
        return out

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The rows of each group."""
        return x.split(self._sizes)

    def _without_padding(self, x: Tensor) -> Tensor:
        """`[n, L, ...]` of the rows of the only group."""
        return x.unflatten(0, (self._total // self._length, -1))[:, : self._length]


class Layout:
    """The rows of a call by groups of its sequences, without slack.

    Args:
        offsets: of the call.
        cost: by which sequences are padded; none are without it.

    Attributes:
        groups: all sequences but the empty ones, the shorter first.
        queries, keys: where rows lie, for tensors that are to have L rows for a sequence, and W.
    """

    def __init__(self, offsets: Tensor, cost: Cost | None = None) -> None:
        offsets = offsets.to(torch.int64)
        lengths = offsets.diff()
        ordered, order = lengths.sort(stable=True)
        sizes, counts = (x.tolist() for x in ordered.unique_consecutive(return_counts=True))
        if sizes and sizes[0] < 0:  # with which memory would be read that is not there
            raise ValueError(f"offsets: expected non-decreasing values, got {offsets.tolist()}")
        total = sum(n * count for n, count in zip(sizes, counts, strict=True))
        first = 1 if sizes and sizes[0] == 0 else 0
        alone = len(sizes) - first == 1
        if cost is None:
            ranges = [(at, at + 1, sizes[at]) for at in range(first, len(sizes))]
        else:
            ranges = _ranges(sizes, counts, cost, first)
        starts = offsets[:-1][order]
        self.groups: list[Group] = []
        empty = at = sum(counts[:first])
        for begin, end, width in ranges:
            some = slice(at, at + sum(counts[begin:end]))
            length = sizes[end - 1] if alone else width
            even = end - begin == 1 and length == sizes[begin]
            self.groups.append(Group(starts[some], length, width, ordered[some], even))
            at = some.stop

        def rows(each: list[int]) -> Rows:
            places = None
            if not alone:
                members = torch.tensor([empty, *(group.size for group in self.groups)], device=starts.device)
                padded = torch.tensor([0, *each], device=starts.device).repeat_interleave(
                    members, output_size=starts.shape[0]
                )
                shift = torch.empty_like(starts).index_copy_(0, order, padded.cumsum(0) - padded - starts)
                places = shift.repeat_interleave(lengths, output_size=total)
                places += torch.arange(total, device=starts.device)
            split = [n * group.size for n, group in zip(each, self.groups, strict=True)]
            return Rows(places, sizes[-1] if sizes else 0, total, split)

        longest, widths = [group.length for group in self.groups], [group.width for group in self.groups]
        self.queries = rows(longest)
        self.keys = self.queries if widths == longest else rows(widths)

    def parts(
        self, *tensors: Tensor, pieces: Callable[[Group], int] | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Each group, or pieces of at most so many sequences, with its rows of tensors that have L for each."""
        groups = self.groups
        if pieces is not None:
            groups = [piece for group in groups for piece in group.pieces(pieces(group))]
        sizes = [group.size * group.length for group in groups]
        return zip(groups, *(x.split(sizes) for x in tensors), strict=True)


def _ranges(
    lengths: Sequence[int], counts: Sequence[int], cost: Cost, first: int
) -> list[tuple[int, int, int]]:
    """Groups as ranges of ascending lengths, from the first on, and how many keys they are padded to. A range is cut
    where that saves most, as long as it saves a group's cost."""
    alone = len(lengths) - first == 1
    best = [cost.best(length, alone) for length in lengths]
    found = []
    ranges = [(first, len(lengths))] if first < len(lengths) else []
    while ranges:
        begin, end = ranges.pop()
        most, at, members = cost.group, end, 0
        for cut in range(begin + 1, end):
            members += counts[cut - 1]
            saved = members * (best[end - 1][0] - best[cut - 1][0])
            if saved > most:
                most, at = saved, cut
        if at < end:
            ranges += [(at, end), (begin, at)]
        else:
            found.append((begin, end, best[end - 1][1]))
    return found
