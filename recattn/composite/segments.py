"""Sums over the segments of rows, accurate however long a segment is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# At most as many rows are added one by one; what they add up to is then added again. The sum of 30 000 rows one by one
# has about ten times the error, which attention's backward takes over.
PIECE = 32


class Segments(NamedTuple):
    """Segments of `total` rows; rows behind the last one are in no sum."""

    offsets: Tensor  # [n + 1], int64, from 0
    total: int
    pieces: tuple[Tensor, Segments] | None  # the offsets of pieces, and the segments that pieces make

    @classmethod
    def of(cls, offsets: Tensor, total: int, lengths: Tensor | None = None) -> Segments:
        """`lengths` are those of the segments, where they are at hand."""
        offsets = offsets.to(torch.int64)
        longest = total
        if total > PIECE and offsets.is_cpu:
            longest = int((offsets[1:] - offsets[:-1] if lengths is None else lengths).max())
        if longest <= PIECE:
            return cls(offsets, total, None)
        steps = torch.arange(0, total, PIECE, device=offsets.device)
        edges = torch.cat((offsets, steps)).sort().values
        among, count = torch.searchsorted(edges, offsets), edges.numel() - 1
        many = longest > PIECE * PIECE
        return cls(offsets, total, (edges, cls.of(among, count) if many else cls(among, count, None)))

    def sum(self, x: Tensor, weights: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """`[total, C]` to `[n, C]`, weighted by `[total]` if asked; or of the rows `[total]`, int64, of x."""
        if self.total == 0:
            return x.new_zeros(self.offsets.numel() - 1, x.shape[1])
        if rows is None:
            rows = torch.arange(self.total, device=x.device)
        if self.pieces is None:
            return _bags(rows, x, self.offsets, weights)
        edges, among = self.pieces
        return among.sum(_bags(rows, x, edges, weights))

    def sum_numbers(self, x: Tensor) -> Tensor:
        """`[total]` to `[n]`; cheaper than as `[total, 1]`."""
        edges = self.offsets if self.pieces is None else self.pieces[0]
        parts = torch.segment_reduce(x, "sum", offsets=edges, unsafe=True)
        return parts if self.pieces is None else self.pieces[1].sum_numbers(parts)


def _bags(rows: Tensor, x: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    # The rows behind the last offset make a bag of their own, which is dropped.
    return torch.embedding_bag(x, rows, offsets, mode=0, per_sample_weights=weights)[0][:-1]
