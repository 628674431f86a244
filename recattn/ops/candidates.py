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
        """All histories that a query reads, cut into tiles of at most `size` positions. There are at most as many
        as `positions`, the number of positions, allows; those that there are not are empty."""
        lengths, queries = self.histories.diff(), self.queries.diff()
        count = torch.where(queries > 0, (lengths + size - 1) // size, 0)
        last = count.cumsum(0)
        tile = torch.arange(positions // size + lengths.numel(), device=lengths.device)
        history = torch.searchsorted(last, tile, right=True)  # B where there is none
        queries, first = F.pad(queries, (0, 1)), F.pad(last - count, (0, 1))
        begin = self.histories[history] + (tile - first[history]) * size
        end = F.pad(self.histories[1:], (0, 1))[history]
        return Tiles(
            offsets=F.pad(queries[history].cumsum(0), (1, 0)),
            batch=tile.numel(),
            begin=begin,
            end=end,
            query=self.queries[history],
        )


class Tiles(NamedTuple):
    """Tiles of positions, and the queries that read them."""

    offsets: Tensor  # [tiles + 1], the queries of all tiles counted along
    batch: int  # how many tiles
    begin: Tensor  # [tiles], the first position
    end: Tensor  # [tiles], the end of the history, or 0 where there is no tile
    query: Tensor  # [tiles], the first query
