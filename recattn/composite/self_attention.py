"""self_attention in PyTorch: sequences of one length go together, so that nothing is padded.

A block of scores `[n·H, rows, L]` is as large as a core's second cache and is gone with the block; backward makes it
again from the log-sum-exp. The lengths are read on the host, which waits for the device where it is not the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn.composite.score_dropout import kept

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
    length: int

    @property
    def size(self) -> int:
        return self.starts.shape[0]

    def heads(self, x: Tensor, count: int) -> Tensor:
        """`[n·L, H·d]` to `[n, H, L, d]`."""
        return x.reshape(self.size, self.length, count, -1).transpose(1, 2)

    def rows(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x.transpose(1, 2).reshape(self.size * self.length, -1)


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
        sizes, counts = lengths.unique_consecutive(return_counts=True)
        chosen = starts.split(counts.tolist())
        self.groups = [Group(rows, n) for rows, n in zip(chosen, sizes.tolist(), strict=True) if n]
        if self.groups and self.groups[0].length < 0:  # with which memory would be read that is not there
            raise ValueError(f"offsets: expected non-decreasing values, got {offsets.tolist()}")
        self._rows: Tensor | None = None
        if bool((starts.diff() < 0).any()):  # else they lie so already
            shift = torch.repeat_interleave(
                starts - lengths.cumsum(0) + lengths, lengths, output_size=self.total
            )
            self._rows = shift + torch.arange(self.total, device=offsets.device)

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x[: self.total] if self._rows is None else x.index_select(0, self._rows)
        # PyTorch's attention takes a row's elements to be adjacent, and says nothing where they are not.
        return x.to(dtype) if x.stride(1) == 1 else x.to(dtype).contiguous()

    def scatter(self, x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `gather`, to as many rows as `like` has, zero for slack."""
        x = x.to(dtype)
        if self._rows is None and self.total == like.shape[0]:
            return x
        out = x.new_zeros(like.shape[0], x.shape[1])
        if self._rows is None:
            out[: self.total] = x
            return out
        return out.index_copy_(0, self._rows, x)

    def parts(
        self, *tensors: Tensor, pieces: Callable[[Group], int] | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Each group, or pieces of at most so many sequences, with its rows of tensors in this layout."""
        groups = self.groups
        if pieces is not None:
            groups = [Group(some, g.length) for g in groups for some in g.starts.split(pieces(g))]
        sizes = [group.size * group.length for group in groups]
        return zip(groups, *(x.split(sizes) for x in tensors), strict=True)


class Scores:
    """Attention among the sequences of a group, by a range of each one's queries: `[n·H, rows, L]`."""

    def __init__(self, call: Attention, group: Group, rows: slice) -> None:
        self.call, self.group, self.rows = call, group, rows
        place = torch.arange(group.length, device=call.q.device)
        self.query, self.key = place[rows, None], place[None, :]
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
            index = self.call.positions[self.group.starts[:, None] + self.key].to(torch.int64)  # [n, L]
            difference = index[:, self.rows, None] - index[:, None, :]
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


def _limit(call: Attention) -> int:
    """Scores of a block."""
    return BLOCK_BYTES.get(call.q.device.type, BLOCK_BYTES["cuda"]) // call.dtype.itemsize


def _pieces(call: Attention) -> Callable[[Group], int]:
    """How many sequences of a group make a block of scores."""
    return lambda group: max(_limit(call) // (call.heads * group.length**2), 1)


def _ranges(call: Attention, group: Group) -> Iterator[slice]:
    """The queries of each block: all of them, but where a sequence alone is too long."""
    step = max(min(_limit(call) // (call.heads * group.length), group.length), 1)
    return (slice(at, min(at + step, group.length)) for at in range(0, group.length, step))


def _plain(call: Attention) -> bool:
    """Whether PyTorch has an operator for sequences of one length."""
    usual = call.table is None and not call.hide_self and not call.dropout
    # What is hidden it scales too: minus infinity times a scale that is not positive.
    usual = usual and (call.scale > 0 or not call.causal)
    return usual and call.q.device.type == "cpu" and call.dim == call.value_dim


def forward(call: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """`out [T, H·dv]` in the dtype of v, the log-sum-exp `[H, T]` of the scores in `call.dtype`, and `out` as it was
    before rounding, if it was rounded and there is a table, whose gradients may cancel."""
    layout = Layout(call.offsets)
    tensors = [layout.gather(x, call.dtype) for x in (call.q, call.k, call.v)]
    if _plain(call):
        pooled, mass = _forward_plain(call, layout, tensors)
    else:
        pooled, mass = _forward_blocks(call, layout, tensors)
    exact_out = layout.scatter(pooled, call.v, call.exact_dtype)
    lse = layout.scatter(mass, call.q, call.dtype).t().contiguous()
    out = exact_out.to(call.v.dtype)
    return out, lse, lse.new_empty(0) if out.dtype == exact_out.dtype else exact_out


def _forward_plain(call: Attention, layout: Layout, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    pooled, mass = [tensors[2][:0]], [tensors[2].new_empty(0, call.heads)]
    for group, *parts in layout.parts(*tensors):
        q, k, v = (group.heads(part, call.heads) for part in parts)
        out, lse = _flash_attention(q, k, v, 0.0, call.causal, scale=call.scale)
        pooled.append(group.rows(out))
        mass.append(group.rows(lse.unsqueeze(3)))
    return _joined(pooled), _joined(mass)


def _forward_blocks(call: Attention, layout: Layout, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    table = None if call.table is None else call.table.to(call.dtype)
    pooled, mass = [tensors[2][:0]], [tensors[2].new_empty(0, call.heads)]
    for group, *parts in layout.parts(*tensors, pieces=_pieces(call)):
        q, k, v = (group.heads(part, call.heads).flatten(0, 1) for part in parts)
        outs, logarithms = [], []
        for rows in _ranges(call, group):
            block = Scores(call, group, rows)
            attention = block.of(q[:, rows], k, table)
            peak = attention.amax(2, keepdim=True).clamp_min_(torch.finfo(call.dtype).min)
            total = attention.sub_(peak).exp_().sum(2, keepdim=True)
            some = total > 0
            logarithms.append(torch.where(some, peak + total.log(), 0))
            outs.append(torch.bmm(block.drop_(attention), v).div_(torch.where(some, total, 1)))
        pooled.append(group.rows(torch.cat(outs, 1).unflatten(0, (-1, call.heads))))
        mass.append(group.rows(torch.cat(logarithms, 1).unflatten(0, (-1, call.heads))))
    return _joined(pooled), _joined(mass)


def backward(call: Attention, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """dL/dq, dL/dk, dL/dv in their dtypes, and dL/dtable `[R, H]` in `call.dtype`, empty without a table."""
    layout = Layout(call.offsets)
    tensors = [layout.gather(x, call.dtype) for x in (grad_out, call.q, call.k, call.v, out, lse.t())]
    exact = out.dtype == call.dtype
    grad_table = lse.new_zeros(0 if call.table is None else call.table.shape)
    if _plain(call) and exact:
        grads = _backward_plain(call, layout, tensors)
    else:
        grads = _backward_blocks(call, layout, tensors, exact, grad_table)
    inputs = (call.q, call.k, call.v)
    return *(layout.scatter(g, x, x.dtype) for g, x in zip(grads, inputs, strict=True)), grad_table


def _backward_plain(call: Attention, layout: Layout, tensors: list[Tensor]) -> list[Tensor]:
    grads = [[x[:0]] for x in tensors[1:4]]
    for group, *parts in layout.parts(*tensors):
        *given, lse = (group.heads(part, call.heads) for part in parts)
        lse = lse.squeeze(3).contiguous()
        results = _flash_attention_backward(*given, lse, 0.0, call.causal, scale=call.scale)
        for result, gradient in zip(results, grads, strict=True):
            gradient.append(group.rows(result))
    return [_joined(gradient) for gradient in grads]


def _backward_blocks(
    call: Attention, layout: Layout, tensors: list[Tensor], exact: bool, grad_table: Tensor
) -> list[Tensor]:
    """`exact`: whether the output was not rounded."""
    table = None if call.table is None else call.table.to(call.dtype)
    grads = [[x[:0]] for x in tensors[1:4]]
    for group, *parts in layout.parts(*tensors, pieces=_pieces(call)):
        g, q, k, v, out, lse = (group.heads(part, call.heads).flatten(0, 1) for part in parts)
        delta = torch.linalg.vecdot(g, out).unsqueeze(2) if exact else None
        results = [torch.zeros_like(x) for x in (q, k, v)]
        grad_q, grad_k, grad_v = results
        for rows in _ranges(call, group):
            block = Scores(call, group, rows)
            attention = block.of(q[:, rows], k, table).sub_(lse[:, rows]).exp_()
            grad = block.drop_(torch.bmm(g[:, rows], v.transpose(1, 2)))
            means = (grad * attention).sum(2, keepdim=True) if delta is None else delta[:, rows]
            grad.sub_(means).mul_(attention)
            grad_v.baddbmm_(block.drop_(attention).transpose(1, 2), g[:, rows])
            if table is not None:
                _add_to_table(grad_table, grad, block)
            grad_q[:, rows].baddbmm_(grad, k, alpha=call.scale)
            grad_k.baddbmm_(grad.transpose(1, 2), q[:, rows], alpha=call.scale)
        for result, gradient in zip(results, grads, strict=True):
            gradient.append(group.rows(result.unflatten(0, (-1, call.heads))))
    return [_joined(gradient) for gradient in grads]


def _joined(parts: list[Tensor]) -> Tensor:
    """Of groups, behind an empty one: without a copy if it is one."""
    return parts[1] if len(parts) == 2 else torch.cat(parts)


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
