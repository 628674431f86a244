"""self_attention in PyTorch: sequences of one length go together, on a CPU of like lengths where little is padded.

A block of scores `[n·H, rows, L]` is as large as a core's second cache and is gone with the block; backward makes it
again from the log-sum-exp. The lengths are read on the host, which waits for the device where it is not the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.groups import Cost, Group, Layout
from recattn.composite.score_dropout import kept

# Bytes of a block of scores, by device.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}

# Of a group, of each head of a sequence, and of each element of a key. Backward hardly minds what is left of a row.
FUSED = Cost(group=40, sequence=0.25, row=0.03, pair=0.001, tail=0.009, key=0.0016)
FUSED_BACKWARD = Cost(group=70, sequence=0.5, row=0.05, pair=0.0022, tail=0, key=0)
BLOCKS = Cost(group=150, sequence=0.5, row=0.1, pair=0.004, tail=0, key=0)

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
        padding = None if call.causal else group.padding()  # the padding lies behind every query
        if padding is not None:
            hidden = padding if hidden is None else padding | hidden
        self.hidden = hidden  # [rows, L], or [n, 1, rows or 1, L]

    def of(self, q: Tensor, k: Tensor, table: Tensor | None) -> Tensor:
        """The scores, minus infinity where a key is hidden."""
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(self.call.scale)
        if table is not None:
            bias = table.t()[:, self.bucket()]  # [H, rows, L], or [H, n, rows, L]
            bias = bias.transpose(0, 1) if bias.dim() == 4 else bias
            scores.unflatten(0, (-1, self.call.heads)).add_(bias)
        if self.hidden is not None:
            scores.unflatten(0, (-1, self.call.heads)).masked_fill_(self.hidden, -torch.inf)
        return scores

    def bucket(self) -> Tensor:
        """The row of the table: `[rows, L]`, or by positions `[n, rows, L]`."""
        assert self.call.table is not None
        buckets = self.call.table.shape[0]
        if self.call.positions is None:
            difference = self.query - self.key
        else:
            place = self.group.starts[:, None] + self.key  # [n, L]
            if not self.group.even:
                place.clamp_max_(self.call.positions.shape[0] - 1)
            index = self.call.positions[place].to(torch.int64)
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


def _layout(call: Attention, cost: Cost) -> Layout:
    if not call.q.is_cpu:
        return Layout(call.offsets)
    return Layout(call.offsets, cost.times(call.heads, call.q.shape[1]))


def _forward_layout(call: Attention) -> Layout:
    return _layout(call, FUSED if _plain(call) else BLOCKS)


def pads(call: Attention) -> bool:
    """Whether forward pads any sequence."""
    return not all(group.padding() is None for group in _forward_layout(call).groups)


def forward(call: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """`out [T, H·dv]` in the dtype of v, the log-sum-exp `[H, T]` of the scores in `call.dtype`, and `out` as it was
    before rounding, if it was rounded and there is a table, whose gradients may cancel."""
    layout = _forward_layout(call)
    q = layout.queries.gather(call.q, call.dtype)
    k, v = (layout.keys.gather(x, call.dtype) for x in (call.k, call.v))
    if _plain(call):
        pooled, mass = _forward_plain(call, layout, q, k, v)
    else:
        pooled, mass = _forward_blocks(call, layout, q, k, v)
    exact_out = layout.queries.scatter(pooled, call.v, call.exact_dtype)
    lse = layout.queries.scatter(mass.t(), call.q, call.dtype).t().contiguous()
    out = exact_out.to(call.v.dtype)
    return out, lse, lse.new_empty(0) if out.dtype == exact_out.dtype else exact_out


def _mask(call: Attention, group: Group) -> Tensor | None:
    """Added to the scores `[n, H, L, L]`; none where causal, as padding lies behind every query."""
    padding = None if call.causal else group.padding()
    if padding is None:
        return None
    return torch.zeros_like(padding, dtype=call.dtype).masked_fill_(padding, -torch.inf)


def _forward_plain(call: Attention, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    pooled, mass = [v[:0]], [v.new_empty(call.heads, 0)]
    split = [layout.queries.split(q), layout.keys.split(k), layout.keys.split(v)]
    for group, *parts in zip(layout.groups, *split, strict=True):
        queries, keys, values = (group.heads(part, call.heads) for part in parts)
        mask = _mask(call, group)
        out, lse = _flash_attention(queries, keys, values, 0.0, call.causal, attn_mask=mask, scale=call.scale)
        pooled.append(group.rows(out))
        mass.append(lse.transpose(0, 1).flatten(1))
    return _joined(pooled), _joined(mass, 1)


def _forward_blocks(call: Attention, layout: Layout, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    table = None if call.table is None else call.table.to(call.dtype)
    pooled, mass = [tensors[2][:0]], [tensors[2].new_empty(call.heads, 0)]
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
        mass.append(torch.cat(logarithms, 1).view(-1, call.heads, group.length).transpose(0, 1).flatten(1))
    return _joined(pooled), _joined(mass, 1)


def backward(call: Attention, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """dL/dq, dL/dk, dL/dv in their dtypes, and dL/dtable `[R, H]` in `call.dtype`, empty without a table."""
    exact = out.dtype == call.dtype
    plain = _plain(call) and exact
    layout = _layout(call, FUSED_BACKWARD if plain else BLOCKS)
    rows = layout.queries  # and keys
    tensors = [rows.gather(x, call.dtype) for x in (grad_out, call.q, call.k, call.v, out)]
    # What is the padding's attention, which no gradient meets, must be finite, whatever its bias.
    tensors.append(rows.gather(lse.t(), call.dtype, 0 if call.table is None else torch.finfo(call.dtype).max))
    # In float64: a bucket's sum is over all sequences, one by one, of terms that cancel.
    grad_table = lse.new_zeros(0 if call.table is None else call.table.shape, dtype=torch.float64)
    if plain:
        grads = _backward_plain(call, layout, tensors)
    else:
        grads = _backward_blocks(call, layout, tensors, exact, grad_table)
    inputs = (call.q, call.k, call.v)
    return *(rows.scatter(g, x, x.dtype) for g, x in zip(grads, inputs, strict=True)), grad_table.to(
        call.dtype
    )


def _backward_plain(call: Attention, layout: Layout, tensors: list[Tensor]) -> list[Tensor]:
    grads = [[x[:0]] for x in tensors[1:4]]
    for group, *parts in layout.parts(*tensors):
        *given, lse = (group.heads(part, call.heads) for part in parts)
        lse = lse.squeeze(3).contiguous()
        mask = _mask(call, group)
        results = _flash_attention_backward(*given, lse, 0.0, call.causal, attn_mask=mask, scale=call.scale)
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


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Of groups, behind an empty one: without a copy if it is one."""
    return parts[1] if len(parts) == 2 else torch.cat(parts, dim)


def _add_to_table(grad_table: Tensor, grad: Tensor, block: Scores) -> None:
    """The gradient of the scores `[n·H, rows, L]`, each to its bucket, in a fixed order."""
    heads = block.call.heads
    grad = grad.unflatten(0, (-1, heads))
    bucket = block.bucket()
    if bucket.dim() == 2:
        grad = grad.sum(0, dtype=torch.float64)
        bucket = bucket.expand(heads, *bucket.shape)
    else:
        bucket = bucket.unsqueeze(1).expand(grad.shape)
    place = bucket * heads + torch.arange(heads, device=grad.device)[:, None, None]
    grad_table.view(-1).index_add_(0, place.flatten(), grad.flatten().to(torch.float64))
