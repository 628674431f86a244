"""Candidates that share a history, as sequences over the same positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Candidates(NamedTuple):
    """Query n is of history b if `queries[b] <= n < queries[b + 1]`; those behind the last are slack."""

    queries: Tensor  # [B + 1], int64
    histories: Tensor  # [B + 1], int64, where the histories lie
    starts: Tensor  # [N], int64, the first position of each query's history

    @classmethod
    def of(cls, query_offsets: Tensor, offsets: Tensor, count: int) -> tuple[Candidates, Tensor]:
        """With the offsets `[N + 1]` of the sequences, one per query, which slack makes empty."""
        queries, histories = query_offsets.to(torch.int64), offsets.to(torch.int64)
        history = torch.searchsorted(queries[1:], torch.arange(count, device=queries.device), right=True)
        lengths = F.pad(histories.diff(), (0, 1))  # the last for slack
        sequences = F.pad(lengths[history].cumsum(0), (1, 0))
        return cls(queries, histories, histories[history]), sequences

    def tiles(self, size: int, positions: int) -> Tiles:
        """All histories cut into tiles of at most `size` positions; `positions` is the number of positions."""
        history, begin, end = pieces(self.histories, size, positions)
        readers = F.pad(self.queries.diff(), (0, 1))[history]
        offsets = F.pad(readers.cumsum(0), (1, 0))
        return Tiles(offsets, begin, end, self.queries[history])

    def groups(self, size: int, count: int) -> Groups:
        """All queries in groups of at most `size` of one history; `count` is the number of queries."""
        history, query, last_query = pieces(self.queries, size, count)
        lengths = F.pad(self.histories.diff(), (0, 1))[history]
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        return Groups(offsets, self.histories[history], query, last_query)


def pieces(offsets: Tensor, size: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segments cut into pieces of at most `size`: of each the segment, the begin and the end. There are as many as
    `total` elements in all allow; what there is not is empty, of the segment behind the last."""
    lengths = offsets.diff()
    count = (lengths + size - 1) // size
    last = count.cumsum(0)
    piece = torch.arange(total // size + lengths.numel(), device=offsets.device)
    segment = torch.searchsorted(last, piece, right=True)
    first = F.pad(last - count, (0, 1))[segment]
    begin = offsets[segment] + (piece - first) * size
    end = F.pad(offsets[1:], (0, 1))[segment].minimum(begin + size)
    return segment, begin, torch.maximum(begin, end)


class Groups(NamedTuple):
    """Groups of queries that share a history."""

    offsets: Tensor  # [groups + 1], the positions that all groups read counted along
    begin: Tensor  # [groups], the first position
    query: Tensor  # [groups], the first query
    last_query: Tensor  # [groups], the one behind the last


class Tiles(NamedTuple):
    """Tiles of positions, and the queries that read them."""

    offsets: Tensor  # [tiles + 1], the queries of all tiles counted along
    begin: Tensor  # [tiles], the first position
    end: Tensor  # [tiles], the position behind the last
    query: Tensor  # [tiles], the first query
