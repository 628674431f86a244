"""Sums over the segments of rows, accurate however long a segment is."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recattn.ops.candidates import pieces

# Rows that are added one by one; what they add up to is then added again. The sum of 30 000 rows one by one has about
# ten times the error, which attention's backward takes over.
PIECE = 32


class Segments(NamedTuple):
    """Segments of `total` rows; rows behind the last one are in no sum."""

    offsets: Tensor  # [n + 1], int64, from 0
    total: int
    pieces: tuple[Tensor, Tensor] | None  # the offsets of pieces, and those of the segments among these

    @classmethod
    def of(cls, offsets: Tensor, total: int) -> Segments:
        offsets = offsets.to(torch.int64)
        lengths = offsets.diff()
        if total <= PIECE or (offsets.is_cpu and int(lengths.max()) <= PIECE):
            return cls(offsets, total, None)
        _, begin, _ = pieces(offsets, PIECE, total)
        edges = torch.cat([begin.minimum(offsets[-1]), offsets[-1:]])
        among = F.pad((lengths + PIECE - 1).div_(PIECE, rounding_mode="floor").cumsum(0), (1, 0))
        return cls(offsets, total, (edges, among))

    def sum(self, x: Tensor, weights: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """`[total, C]` to `[n, C]`, weighted by `[total]` if asked; or of the rows `[total]`, int64, of x."""
        if self.total == 0:
            return x.new_zeros(self.offsets.numel() - 1, x.shape[1])
        if rows is None:
            rows = torch.arange(self.total, device=x.device)
        if self.pieces is None:
            return _bags(rows, x, self.offsets, weights)
        edges, among = self.pieces
        parts = _bags(rows, x, edges, weights)
        return _bags(torch.arange(parts.shape[0], device=x.device), parts, among, None)


def _bags(rows: Tensor, x: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    # The rows behind the last offset make a bag of their own, which is dropped.
    return F.embedding_bag(rows, x, offsets, mode="sum", per_sample_weights=weights)[:-1]
