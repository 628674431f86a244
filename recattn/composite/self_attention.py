"""self_attention in PyTorch: sequences of one length go together, so that nothing is padded.

A block of scores `[n·H, rows, L]` is as large as a core's second cache and is gone with the block; backward makes it
again from the log-sum-exp. The lengths are read on the host, which waits for the device where it is not the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.dropout import kept

# Bytes of a block of scores, by device.
BLOCK_BYTES = {"cpu": 1 << 18, "cuda": 1 << 28}


class Attention(NamedTuple):
    """One call."""

    q: Tensor  # [T, H·d]
    k: Tensor  # [T, H·d]
    v: Tensor  # [T, H·dv]
    offsets: Tensor  # [B + 1]
    table: Tensor | None  # [R, H]
    positions: Tensor | None  # [T], what the bias is looked up by; the places themselves without it
    seed: Tensor | None  # [1], of dropout
    heads: int
    scale: float
    causal: bool
    hide_self: bool
    dropout: float

    @property
    def dtype(self) -> torch.dtype:
        """To compute in."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def exact_dtype(self) -> torch.dtype:
        """What backward needs the output in."""
        return self.v.dtype if self.table is None else self.dtype

    @property
    def dim(self) -> int:
        return self.q.shape[1] // self.heads

    @property
    def value_dim(self) -> int:
        return self.v.shape[1] // self.heads


@dataclass(frozen=True)
class Group:
    """n sequences of one length."""

    starts: Tensor  # [n], of each its first row
    first: int  # of them
    length: int
    together: bool  # whether they lie end to end

    def __len__(self) -> int:
        return len(self.starts)

    def pieces(self, size: int) -> Iterator[Group]:
        for at in range(0, len(self), size):
            starts = self.starts[at : at + size]
            yield Group(starts, self.first + at * self.length, self.length, self.together)

    def rows(self) -> Tensor | slice:
        if self.together:
            return slice(self.first, self.first + len(self) * self.length)
        return (self.starts[:, None] + torch.arange(self.length, device=self.starts.device)).flatten()

    def take(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """`[T, H·d]` to `[n·H, L, d]`, in `dtype`."""
        rows = self.rows()
        x = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
        return x.to(dtype).reshape(len(self), self.length, heads, -1).transpose(1, 2).flatten(0, 1)

    def put(self, x: Tensor, out: Tensor) -> None:
        """The inverse of `take`, into rows of `out`."""
        heads = x.shape[0] // len(self)
        x = x.unflatten(0, (len(self), heads)).transpose(1, 2).reshape(len(self) * self.length, -1)
        out[self.rows()] = x.to(out.dtype)


def groups(offsets: Tensor) -> Iterator[Group]:
    """Sequences by length, without the empty ones."""
    offsets = offsets.to(torch.int64)
    lengths, order = offsets.diff().sort(stable=True)
    starts = offsets[:-1][order]
    sizes, counts = lengths.unique_consecutive(return_counts=True)
    begin = 0
    for length, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        chosen = starts[begin : begin + count]
        begin += count
        if length:
            first = int(chosen[0])
            together = int(chosen[-1]) == first + (count - 1) * length  # as each is length long at least
            yield Group(chosen, first, length, together)


class Scores:
    """Attention among the sequences of a group, the queries from `begin` to before `end` of each: `[n·H, rows, L]`."""

    def __init__(self, call: Attention, group: Group, begin: int, end: int) -> None:
        self.call, self.group, self.begin, self.end = call, group, begin, end
        place = torch.arange(group.length, device=call.q.device)
        self.query, self.key = place[begin:end, None], place[None, :]
        hidden = None
        if call.causal:
            hidden = self.key > self.query
        if call.hide_self:
            hidden = self.key == self.query if hidden is None else self.key >= self.query
        self.hidden = hidden

    def of(self, q: Tensor, k: Tensor, table: Tensor | None) -> Tensor:
        """The scores, minus infinity where a key is hidden."""
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(self.call.scale)
        if table is not None:
            bias = table.t()[:, self.bucket()]  # [H, rows, L], or [H, n, rows, L]
            bias = bias.transpose(0, 1) if bias.dim() == 4 else bias
            scores.view(len(self.group), self.call.heads, *scores.shape[1:]).add_(bias)
        if self.hidden is not None:
            scores.masked_fill_(self.hidden, -torch.inf)
        return scores

    def bucket(self) -> Tensor:
        """The row of the table: `[rows, L]`, or by positions `[n, rows, L]`."""
        assert self.call.table is not None
        buckets = self.call.table.shape[0]
        if self.call.positions is None:
            difference = self.query - self.key
        else:
            index = self.call.positions[self.group.rows()].to(torch.int64).view(len(self.group), -1)
            difference = index[:, self.begin : self.end, None] - index[:, None, :]
        return difference.add_(buckets // 2).clamp_(0, buckets - 1)

    def drop_(self, attention: Tensor) -> Tensor:
        """Zero where an element is dropped, larger where it is kept."""
        call = self.call
        if not call.dropout:
            return attention
        assert call.seed is not None
        row = self.group.starts[:, None, None, None] + self.query
        head = torch.arange(call.heads, device=row.device)[:, None, None]
        keep = kept(call.seed, row * call.heads + head, self.key, call.dropout).flatten(0, 1)
        return attention.mul_(keep).mul_(1 / (1 - call.dropout))


def _blocks(call: Attention) -> Iterator[tuple[Group, list[tuple[int, int]]]]:
    """Groups whose scores make a block, or more where a sequence alone is too long: ranges of its queries."""
    limit = BLOCK_BYTES.get(call.q.device.type, BLOCK_BYTES["cuda"]) // call.dtype.itemsize
    for group in groups(call.offsets):
        row = call.heads * group.length  # scores of a query
        rows = max(min(limit // row, group.length), 1)
        for piece in group.pieces(max(limit // (row * group.length), 1)):
            yield piece, [(at, min(at + rows, group.length)) for at in range(0, group.length, rows)]


def forward(call: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """`out [T, H·dv]` in the dtype of v, the log-sum-exp `[H, T]` of the scores in `call.dtype`, and `out` before it was
    rounded, if it was and there is a table, whose gradients may cancel."""
    out = call.v.new_zeros(call.v.shape, dtype=call.exact_dtype)
    lse = call.q.new_zeros(call.q.shape[0], call.heads, dtype=call.dtype)
    table = None if call.table is None else call.table.to(call.dtype)
    for group, ranges in _blocks(call):
        q, k, v = (group.take(x, call.heads, call.dtype) for x in (call.q, call.k, call.v))
        pooled = v.new_empty(q.shape[0], group.length, call.value_dim)
        mass = q.new_empty(q.shape[0], group.length, 1)
        for begin, end in ranges:
            block = Scores(call, group, begin, end)
            attention = block.of(q[:, begin:end], k, table)
            peak = attention.amax(2, keepdim=True).clamp_min_(torch.finfo(call.dtype).min)
            total = attention.sub_(peak).exp_().sum(2, keepdim=True)
            some = total > 0
            mass[:, begin:end] = torch.where(some, peak + total.log(), 0)
            rows = torch.bmm(block.drop_(attention), v)
            pooled[:, begin:end] = rows.div_(torch.where(some, total, 1))
        group.put(pooled, out)
        group.put(mass, lse)
    lse = lse.t().contiguous()
    rounded = out.to(call.v.dtype)
    return rounded, lse, lse.new_empty(0) if out.dtype == rounded.dtype else out


def backward(call: Attention, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """dL/dq, dL/dk, dL/dv in their dtypes, and dL/dtable `[R, H]` in `call.dtype`, empty without a table."""
    grads = tuple(x.new_zeros(x.shape) for x in (call.q, call.k, call.v))
    table, grad_table = None, lse.new_zeros(0)
    if call.table is not None:
        table = call.table.to(call.dtype)
        grad_table = lse.new_zeros(call.table.shape)
    lse = lse.t()
    for group, ranges in _blocks(call):
        q, k, v = (group.take(x, call.heads, call.dtype) for x in (call.q, call.k, call.v))
        g = group.take(grad_out, call.heads, call.dtype)
        mass = group.take(lse, call.heads, call.dtype)
        delta = None
        if out.dtype == call.dtype:  # else it was rounded
            delta = torch.linalg.vecdot(g, group.take(out, call.heads, call.dtype)).unsqueeze(2)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for begin, end in ranges:
            block, rows = Scores(call, group, begin, end), slice(begin, end)
            attention = block.of(q[:, rows], k, table).sub_(mass[:, rows]).exp_()
            grad = block.drop_(torch.bmm(g[:, rows], v.transpose(1, 2)))
            if delta is None:
                grad = grad.sub_((grad * attention).sum(2, keepdim=True)).mul_(attention)
            else:
                grad = grad.sub_(delta[:, rows]).mul_(attention)
            grad_v.baddbmm_(block.drop_(attention).transpose(1, 2), g[:, rows])
            if table is not None:
                _add_to_table(grad_table, grad, block)
            grad_q[:, rows].baddbmm_(grad, k, alpha=call.scale)
            grad_k.baddbmm_(grad.transpose(1, 2), q[:, rows], alpha=call.scale)
        for gradient, x in zip(grads, (grad_q, grad_k, grad_v), strict=True):
            group.put(x, gradient)
    return *grads, grad_table


def _add_to_table(grad_table: Tensor, grad: Tensor, block: Scores) -> None:
    """The gradient of the scores `[n·H, rows, L]`, each to its bucket, in a fixed order."""
    heads = block.call.heads
    grad = grad.unflatten(0, (-1, heads))
    bucket = block.bucket()
    if bucket.dim() == 2:
        grad = grad.sum(0)
        bucket = bucket.expand(heads, *bucket.shape)
    else:
        bucket = bucket.unsqueeze(1).expand(grad.shape)
    place = bucket * heads + torch.arange(heads, device=grad.device)[:, None, None]
    grad_table.view(-1).index_add_(0, place.flatten(), grad.flatten())
