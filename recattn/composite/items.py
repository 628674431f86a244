"""The keys and values of a call, block by block, and where their gradients go."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn.composite.blocks import Block, Histories


class Items:
    """What lies at the rows of a block, read through the histories that sequences share and through an index.

    Args:
        offsets: `[B + 1]`, of the sequences.
        starts: `[B]`, the first position of each sequence, if they share histories. Then the rows of all sequences
            are counted, which waits for an accelerator.
        index: `[T]`, the row of the keys and values at each position, if it is not the position.
        positions: T.
        scatter: whether gradients go to these rows, which are all different, else to positions.
        dtype: to compute in.
    """

    def __init__(
        self,
        offsets: Tensor,
        starts: Tensor | None,
        index: Tensor | None,
        positions: int,
        scatter: bool,
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self.positions, self.scatter = dtype, positions, scatter
        total = positions if starts is None else int(offsets[-1])
        self.histories = Histories.of(offsets, total)
        self.shift = None if starts is None else starts - self.histories.offsets[:-1]
        self.index = index
        self.slack: Tensor | None = None
        if index is not None and not index.is_cpu:
            self.slack = torch.arange(positions, device=index.device) >= offsets[-1]
            self.index = index.masked_fill(self.slack, 0)

    def __call__(self, x: Tensor, block: Block) -> Tensor:
        """Rows of keys or values, `[R, C]`, to `[rows, C]`."""
        place = self._place(block)
        if self.index is not None:
            place = self.index[place]
        return (x[place] if isinstance(place, slice) else x.index_select(0, place)).to(self.dtype)

    def pool(self, x: Tensor, span: Block, weights: Tensor) -> Tensor:
        """`Σ weights·x` over each sequence of a span, `[sequences, C]`."""
        if self.index is not None and x.dtype == self.dtype:  # read in place
            index = self.index[self._place(span)]
            return span.segments.sum(x, weights, index.to(torch.int64))
        return span.sum(self(x, span), weights)

    def gradient_of(self, x: Tensor) -> Tensor:
        """Room for the gradient of keys or values."""
        if self.scatter:
            return x.new_zeros(x.shape[0] + (self.slack is not None), x.shape[1])  # the last for slack
        if self.shift is not None:
            return x.new_zeros(self.positions, x.shape[1], dtype=self.dtype)
        return x.new_empty(self.positions, x.shape[1])

    def rows_of(self, gradient: Tensor, block: Block) -> Tensor:
        """Room for the rows of a block, to be filled and then given to `put`."""
        if self.scatter or self.shift is not None or gradient.dtype != self.dtype:
            rows = block.rows.stop - block.rows.start
            return gradient.new_empty(rows, gradient.shape[1], dtype=self.dtype)
        return gradient[block.rows]

    def put(self, gradient: Tensor, block: Block, rows: Tensor) -> None:
        place = self._place(block)
        if self.shift is not None:
            assert isinstance(place, Tensor)
            # In a fixed order on every device, which index_add_ is not on a GPU.
            gradient.index_put_((place,), rows, accumulate=True)
        elif self.scatter:
            assert self.index is not None
            index = self.index[place]
            if self.slack is not None:
                index = index.masked_fill(self.slack[place], gradient.shape[0] - 1)
            gradient.index_copy_(0, index.to(torch.int64), rows.to(gradient.dtype))
        elif rows.data_ptr() != gradient[place].data_ptr():
            gradient[place] = rows

    def finished(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient, zero where nothing was put."""
        if self.scatter:
            return gradient if self.slack is None else gradient[:-1]
        if self.shift is None:
            zero_slack_(gradient, self.histories.offsets)
        return gradient.to(dtype)

    def _place(self, block: Block) -> slice | Tensor:
        if self.shift is None:
            return block.rows
        row = torch.arange(block.rows.start, block.rows.stop, device=self.shift.device)
        return self.shift[self.histories.sequence[block.rows]] + row


def zero_slack_(x: Tensor, offsets: Tensor) -> Tensor:
    """Zeroes the rows of slack in `[T, ...]`, in place."""
    if x.is_cpu:
        x[int(offsets[-1]) :].zero_()
        return x
    valid = torch.arange(x.shape[0], device=x.device) < offsets[-1]
    return x.masked_fill_(~valid.reshape(-1, *(1,) * (x.dim() - 1)), 0)
