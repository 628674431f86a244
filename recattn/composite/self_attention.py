"""self_attention in PyTorch: sequences of one length go together, so that nothing is padded.

A block of scores `[n·H, rows, L]` is as large as a core's second cache and is gone with the block; backward makes it
again from the log-sum-exp. The lengths are read on the host, which waits for the device where it is not the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.dropout import kept

# Bytes of a block of scores, by device.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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


class Group(NamedTuple):
    """n sequences of one length."""

    starts: Tensor  # [n], of each its first row
    first: int  # of all their rows in the layout, where they lie end to end
    length: int

    @property
    def size(self) -> int:
        return self.starts.shape[0]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.size * self.length)

    def heads(self, x: Tensor, count: int) -> Tensor:
        """Their rows of `x [T, H·d]` as `[n, H, L, d]`."""
        return x[self.rows].unflatten(0, (self.size, self.length)).unflatten(2, (count, -1)).transpose(1, 2)

    def pieces(self, size: int) -> Iterator[Group]:
        for at in range(0, self.size, size):
            yield Group(self.starts[at : at + size], self.first + at * self.length, self.length)


class Layout:
    """The rows of a call with its sequences in the order of their lengths, and without slack.

    Attributes:
        groups: the sequences of each length but 0.
        total: how many rows there are.
    """

    def __init__(self, offsets: Tensor) -> None:
        offsets = offsets.to(torch.int64)
        lengths, order = offsets.diff().sort(stable=True)
        starts = offsets[:-1][order]
        self.total = int(lengths.sum())
        self.groups: list[Group] = []
        sizes, counts = lengths.unique_consecutive(return_counts=True)
        begin = first = 0
        for length, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            if length:
                self.groups.append(Group(starts[begin : begin + count], first, length))
            begin, first = begin + count, first + count * length
        self._rows: Tensor | None = None
        if bool((starts.diff() < 0).any()):  # else they lie so already
            ends = lengths.cumsum(0)
            shift = torch.repeat_interleave(starts - ends + lengths, lengths, output_size=self.total)
            self._rows = shift + torch.arange(self.total, device=offsets.device)

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x[: self.total] if self._rows is None else x.index_select(0, self._rows)
        return x.to(dtype)

    def scatter(self, x: Tensor, out: Tensor) -> Tensor:
        """The inverse of `gather`, into rows of `out`, which are zero."""
        if self._rows is None:
            out[: self.total] = x
            return out
        return out.index_copy_(0, self._rows, x.to(out.dtype))


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
            scores.unflatten(0, (-1, self.call.heads)).add_(bias)
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
            rows = self.group.starts[:, None] + self.key  # [n, L]
            index = self.call.positions[rows].to(torch.int64)
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


def _blocks(call: Attention, layout: Layout) -> Iterator[tuple[Group, list[tuple[int, int]]]]:
    """Groups whose scores make a block, or more where a sequence alone is too long: ranges of its queries."""
    limit = BLOCK_BYTES.get(call.q.device.type, BLOCK_BYTES["cuda"]) // call.dtype.itemsize
    for group in layout.groups:
        row = call.heads * group.length  # scores of a query
        rows = max(min(limit // row, group.length), 1)
        for piece in group.pieces(max(limit // (row * group.length), 1)):
            yield piece, [(at, min(at + rows, group.length)) for at in range(0, group.length, rows)]


def _plain(call: Attention) -> bool:
    """Whether PyTorch has an operator for sequences of one length."""
    usual = call.table is None and not call.hide_self and not call.dropout
    return usual and call.q.device.type == "cpu" and call.dim == call.value_dim


def forward(call: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """`out [T, H·dv]` in the dtype of v, the log-sum-exp `[H, T]` of the scores in `call.dtype`, and `out` as it was before
    rounding, if it was rounded and there is a table, whose gradients may cancel."""
    layout = Layout(call.offsets)
    q, k, v = (layout.gather(x, call.dtype) for x in (call.q, call.k, call.v))
    pooled, mass = v.new_empty(v.shape), q.new_empty(layout.total, call.heads)
    if _plain(call):
        for group in layout.groups:
            out, lse = _flash_attention(
                *(group.heads(x, call.heads) for x in (q, k, v)), 0.0, call.causal, scale=call.scale
            )
            group.heads(pooled, call.heads).copy_(out)
            group.heads(mass, call.heads).copy_(lse.unsqueeze(3))
    else:
        _forward_blocks(call, layout, q, k, v, pooled, mass)
    exact_out = layout.scatter(pooled, call.v.new_zeros(call.v.shape, dtype=call.exact_dtype))
    lse = layout.scatter(mass, q.new_zeros(call.q.shape[0], call.heads)).t().contiguous()
    out = exact_out.to(call.v.dtype)
    return out, lse, lse.new_empty(0) if out.dtype == exact_out.dtype else exact_out


def _forward_blocks(
    call: Attention, layout: Layout, q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, mass: Tensor
) -> None:
    table = None if call.table is None else call.table.to(call.dtype)
    for group, ranges in _blocks(call, layout):
        queries, keys, values = (group.heads(x, call.heads).flatten(0, 1) for x in (q, k, v))
        for begin, end in ranges:
            block = Scores(call, group, begin, end)
            attention = block.of(queries[:, begin:end], keys, table)
            peak = attention.amax(2, keepdim=True).clamp_min_(torch.finfo(call.dtype).min)
            total = attention.sub_(peak).exp_().sum(2, keepdim=True)
            some = total > 0
            lse = torch.where(some, peak + total.log(), 0)
            rows = torch.bmm(block.drop_(attention), values).div_(torch.where(some, total, 1))
            for x, out in ((rows, pooled), (lse, mass)):
                group.heads(out, call.heads)[:, :, begin:end] = x.unflatten(0, (-1, call.heads))


def backward(call: Attention, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """dL/dq, dL/dk, dL/dv in their dtypes, and dL/dtable `[R, H]` in `call.dtype`, empty without a table."""
    layout = Layout(call.offsets)
    q, k, v, g = (layout.gather(x, call.dtype) for x in (call.q, call.k, call.v, grad_out))
    mass = layout.gather(lse.t(), call.dtype)
    exact_out = None if out.dtype != call.dtype else layout.gather(out, call.dtype)  # else it was rounded
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    grad_table = lse.new_zeros(0 if call.table is None else call.table.shape)
    if _plain(call) and exact_out is not None:
        for group in layout.groups:
            given = (group.heads(x, call.heads) for x in (g, q, k, v, exact_out))
            logarithm = group.heads(mass, call.heads).squeeze(3).contiguous()
            results = _flash_attention_backward(*given, logarithm, 0.0, call.causal, scale=call.scale)
            for result, gradient in zip(results, grads, strict=True):
                group.heads(gradient, call.heads).copy_(result)
    else:
        _backward_blocks(call, layout, (q, k, v, g), exact_out, mass, grads, grad_table)
    scattered = (
        layout.scatter(gradient, x.new_zeros(x.shape))
        for gradient, x in zip(grads, (call.q, call.k, call.v), strict=True)
    )
    return *scattered, grad_table


def _backward_blocks(
    call: Attention,
    layout: Layout,
    tensors: tuple[Tensor, ...],
    exact_out: Tensor | None,
    mass: Tensor,
    grads: tuple[Tensor, ...],
    grad_table: Tensor,
) -> None:
    table = None if call.table is None else call.table.to(call.dtype)
    for group, ranges in _blocks(call, layout):
        q, k, v, g = (group.heads(x, call.heads).flatten(0, 1) for x in tensors)
        lse = group.heads(mass, call.heads).flatten(0, 1)
        delta = None
        if exact_out is not None:
            delta = torch.linalg.vecdot(g, group.heads(exact_out, call.heads).flatten(0, 1)).unsqueeze(2)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for begin, end in ranges:
            block, rows = Scores(call, group, begin, end), slice(begin, end)
            attention = block.of(q[:, rows], k, table).sub_(lse[:, rows]).exp_()
            grad = block.drop_(torch.bmm(g[:, rows], v.transpose(1, 2)))
            means = (grad * attention).sum(2, keepdim=True) if delta is None else delta[:, rows]
            grad.sub_(means).mul_(attention)
            grad_v.baddbmm_(block.drop_(attention).transpose(1, 2), g[:, rows])
            if table is not None:
                _add_to_table(grad_table, grad, block)
            grad_q[:, rows].baddbmm_(grad, k, alpha=call.scale)
            grad_k.baddbmm_(grad.transpose(1, 2), q[:, rows], alpha=call.scale)
        for gradient, x in zip(grads, (grad_q, grad_k, grad_v), strict=True):
            group.heads(gradient, call.heads).copy_(x.unflatten(0, (-1, call.heads)))


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
