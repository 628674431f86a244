"""target_attention in PyTorch: only valid positions, blocks that stay in cache.

One query per history: passes over the history in blocks of rows. Candidates that share a history: one history
after the other on the CPU; elsewhere, where lengths are not at hand, blocks of candidates against all keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.blocks import Block, Histories, Workspace

# Bytes of a block's rows, or of the scores of some candidates, by device: on the CPU they stay in its cache.
BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}


class Call(NamedTuple):
    """One call. Tensors are as the user gave them but for the bias, which has two dimensions."""

    query: Tensor  # [N, H·d]
    keys: Tensor  # [T, H·d], or [R, H·d] with rows
    values: Tensor  # as many rows, H·dv wide
    offsets: Tensor  # [B + 1]
    query_offsets: Tensor | None  # [B + 1]
    rows: Tensor | None  # [T]
    bias: Tensor | None  # [T, 1] or [T, H]
    heads: int
    scale: float
    normalize: str
    return_lse: bool

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.promote_types(self.keys.dtype, torch.float32)

    @property
    def total(self) -> int:
        return self.keys.shape[0] if self.rows is None else self.rows.shape[0]


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """`out [N, H·dv]`, the log-sum-exp `[N, H]` of the scores if wanted, and what backward needs of the softmax:
    maximum and sum `[N, H, 2]` where histories have one query. All in `call.dtype`."""
    out = call.values.new_zeros(call.query.shape[0], call.values.shape[1], dtype=call.dtype)
    peak_mass = out.new_zeros(call.query.shape[0], call.heads, 2)
    lse = out.new_full(peak_mass.shape[:2] if call.return_lse else (0,), -math.inf)
    if call.total and out.shape[0]:
        if call.query_offsets is None:
            _forward_rows(call, out, lse, peak_mass)
        else:
            _forward_groups(call, out, lse)
    return out, lse, peak_mass


def backward(
    call: Call, grad_out: Tensor, delta: Tensor, peak_mass: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, keys, values and bias. `delta [N, H]` is Σ_t a_t dL/da_t - dL/dlse, for softmax."""
    grads = Gradients.of(call)
    if call.total and call.query.shape[0]:
        if call.query_offsets is None:
            _backward_rows(call, grad_out, delta, peak_mass, grads)
        else:
            _backward_groups(call, grad_out, delta, grads)
    if call.rows is None:
        _zero_slack_(grads.keys, call.offsets)
        _zero_slack_(grads.values, call.offsets)
    if grads.bias is not None:
        _zero_slack_(grads.bias, call.offsets)
    return grads.query, grads.keys, grads.values, grads.bias


class Gradients(NamedTuple):
    query: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, call: Call) -> Gradients:
        """Zeros, in the dtype to compute in; where each row is written once, keys' and values' are empty, in theirs."""
        exact = call.dtype if call.rows is not None else call.keys.dtype
        once = call.rows is None and call.query_offsets is None
        new = call.keys.new_empty if once and call.query.shape[0] else call.keys.new_zeros
        return cls(
            torch.zeros_like(call.query, dtype=call.dtype, memory_format=torch.contiguous_format),
            new(call.keys.shape, dtype=exact),
            new(call.values.shape, dtype=exact),
            None if call.bias is None else torch.zeros_like(call.bias, dtype=call.dtype),
        )


# ---------------------------------------------------------------------------------------------- attention


def _attention_(scores: Tensor, normalize: str, peak_mass: Tensor | None = None) -> Tensor:
    """The attention from scores, in place; for softmax from its maximum and sum too, `[..., 2]`, which broadcast.

    A log-sum-exp in their place would cost all of a history some bits, in one direction."""
    if peak_mass is not None:
        peak, mass = peak_mass.unbind(-1)
        return _powers_(scores, peak).div_(mass.masked_fill(mass == 0, 1))
    return scores if normalize == "none" else getattr(scores, f"{normalize}_")()


def _powers_(scores: Tensor, peak: Tensor) -> Tensor:
    return scores.sub_(peak.masked_fill(peak == -math.inf, 0)).exp_()


def _scores_backward_(grad: Tensor, attention: Tensor, delta: Tensor, normalize: str) -> Tensor:
    """dL/ds from dL/da, in place; `delta` broadcasts."""
    if normalize == "none":
        return grad
    if normalize == "softmax":
        grad.sub_(delta)
    grad.mul_(attention)
    return grad.mul_(1 - attention) if normalize == "sigmoid" else grad


# ------------------------------------------------------------------------------------- one query per history


class _Reader:
    """Rows of keys and values, gathered if they come by index."""

    def __init__(self, call: Call) -> None:
        self.call, self.rows = call, call.rows
        width = max(call.keys.shape[1], call.values.shape[1])
        block_bytes = BLOCK_BYTES.get(call.keys.device.type, BLOCK_BYTES["cuda"])
        self.size = min(max(block_bytes // (call.dtype.itemsize * width), 1), call.total)
        self.workspace = Workspace(call.keys.new_empty(0, dtype=call.dtype), self.size)
        self.spans = Histories.of(call.offsets, call.total).spans()
        if self.rows is not None and not self.rows.is_cpu:  # whatever slack holds must not be looked up
            valid = torch.arange(call.total, device=self.rows.device) < call.offsets[-1]
            self.rows = self.rows.where(valid, 0)

    def blocks(self) -> Iterator[Block]:
        return chain.from_iterable(span.pieces(self.size) for span in self.spans)

    def __call__(self, table: Tensor, block: Block) -> Tensor:
        rows = table[block.rows] if self.rows is None else table.index_select(0, self.rows[block.rows])
        return rows.to(self.call.dtype)

    def add(self, gradient: Tensor, block: Block, rows: Tensor) -> None:
        if self.rows is None:
            gradient[block.rows] = rows
        elif self.rows.is_cpu:
            gradient.index_add_(0, self.rows[block.rows], rows)
        else:  # which sorts, where index_add_ takes atomics
            slack = (
                torch.arange(block.rows.start, block.rows.stop, device=rows.device) >= self.call.offsets[-1]
            )
            rows = rows.masked_fill(slack.unsqueeze(1), 0)
            gradient.index_put_((self.rows[block.rows],), rows, accumulate=True)

    def dot(self, block: Block, x: Tensor, y: Tensor) -> Tensor:
        """Products of `x [rows, H·d]` with what was taken as `y [n, 1, H·d]`, head by head: `[rows, H]`."""
        scratch = self.workspace(f"dot {x.shape[1]}", *x.shape)
        if self.call.heads == 1:
            return block.dot(x, y, out=scratch).reshape(-1, 1)
        torch.mul(block.split(x), y, out=block.split(scratch))
        return scratch.unflatten(1, (self.call.heads, -1)).sum(2)

    def scores(self, block: Block, keys: Tensor, query: Tensor) -> Tensor:
        scores = self.dot(block, keys, query).mul_(self.call.scale)
        return scores if self.call.bias is None else scores.add_(self.call.bias[block.rows])

    def sum(self, block: Block, x: Tensor, weights: Tensor) -> Tensor:
        """`[rows, H·d]` summed over each sequence, weighted by `[rows, H]`."""
        if self.call.heads == 1:
            return block.sum(x, weights.squeeze(1))
        weighted = self.workspace(f"sum {x.shape[1]}", *x.shape)
        torch.mul(*_by_head(x, weights, self.call.heads), out=weighted.unflatten(1, (self.call.heads, -1)))
        return block.sum(weighted)


def _by_head(x: Tensor, weights: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    return x.unflatten(-1, (heads, -1)), weights.unsqueeze(-1)


def _forward_rows(call: Call, out: Tensor, lse: Tensor, peak_mass: Tensor) -> None:
    read = _Reader(call)
    query = call.query.to(call.dtype)
    scores = out.new_empty(call.total, call.heads)
    for block in read.blocks():
        scores[block.rows] = read.scores(block, read(call.keys, block), block.take(query))
    for span in read.spans:
        rows = scores[span.rows]
        if call.normalize == "softmax":
            _softmax_(rows, peak_mass, span)
        else:
            _attention_(rows, call.normalize)
    if call.return_lse:
        torch.add(peak_mass[..., 0], peak_mass[..., 1].log(), out=lse)
    # Where no copy of the values is made, all of a span are summed at once.
    in_place = call.rows is None and call.heads == 1 and call.values.dtype == call.dtype
    for block in read.spans if in_place else read.blocks():
        out[block.owners] += read.sum(block, read(call.values, block), scores[block.rows])


def _softmax_(scores: Tensor, peak_mass: Tensor, span: Block) -> None:
    """Softmax over each sequence of a span, in place; its maximum and sum go into `peak_mass [B, H, 2]`."""
    peak, mass = peak_mass.unbind(-1)
    peak[span.owners] = span.reduce(scores, "max")
    attention = _powers_(span.split(scores), span.take(peak))
    mass[span.owners] = span.reduce(scores, "sum")
    attention.div_(span.take(mass.masked_fill(mass == 0, 1)))


def _backward_rows(call: Call, grad_out: Tensor, delta: Tensor, peak_mass: Tensor, grads: Gradients) -> None:
    read = _Reader(call)
    query, grad_out = call.query.to(call.dtype), grad_out.to(call.dtype)
    for block in read.blocks():
        keys, values = read(call.keys, block), read(call.values, block)
        q, upstream = block.take(query), block.take(grad_out)
        scores = read.scores(block, keys, q)
        state = block.take(peak_mass) if call.normalize == "softmax" else None
        _attention_(block.split(scores), call.normalize, state)
        grad = read.dot(block, values, upstream)
        _scores_backward_(block.split(grad), block.split(scores), block.take(delta), call.normalize)
        if grads.bias is not None:
            grads.bias[block.rows] = grad if grads.bias.shape[1] > 1 else grad.sum(1, keepdim=True)
        grad.mul_(call.scale)
        grads.query[block.owners] += read.sum(block, keys, grad)
        for gradient, rows, weights in ((grads.keys, q, grad), (grads.values, upstream, scores)):
            direct = call.rows is None and gradient.dtype == call.dtype
            fresh = (
                gradient[block.rows]
                if direct
                else read.workspace(f"gradient {rows.shape[2]}", weights.shape[0], rows.shape[2])
            )
            torch.mul(
                *_by_head(rows, block.split(weights), call.heads),
                out=block.split(fresh).unflatten(-1, (call.heads, -1)),
            )
            if not direct:
                read.add(gradient, block, fresh)


# ------------------------------------------------------------------------------- candidates that share a history


class _Group(NamedTuple):
    """Some candidates and the tokens that each of them attends to; `hidden` are pairs of them that do not meet."""

    candidates: slice
    tokens: slice
    hidden: Tensor | None  # [n, l]


def _groups(call: Call) -> Iterator[_Group]:
    offsets, query_offsets = call.offsets, call.query_offsets
    assert query_offsets is not None
    room = BLOCK_BYTES.get(offsets.device.type, BLOCK_BYTES["cuda"]) // (call.dtype.itemsize * call.heads)
    if offsets.is_cpu:
        bounds, groups = offsets.tolist(), query_offsets.tolist()
        for b in range(len(bounds) - 1):
            tokens = slice(bounds[b], bounds[b + 1])
            if tokens.start < tokens.stop:
                step = max(room // (tokens.stop - tokens.start), 16)
                for begin in range(groups[b], groups[b + 1], step):
                    yield _Group(slice(begin, min(begin + step, groups[b + 1])), tokens, None)
        return
    count, step = call.query.shape[0], max(room // call.total, 1)
    owner, history = (
        torch.searchsorted(edges[1:].contiguous(), torch.arange(n, device=edges.device), right=True)
        for edges, n in ((query_offsets, count), (offsets, call.total))
    )
    owner = owner.where(owner < offsets.numel() - 1, -1)  # slack on one side does not meet slack on the other
    for begin in range(0, count, step):
        candidates = slice(begin, min(begin + step, count))
        yield _Group(candidates, slice(0, call.total), owner[candidates, None] != history)


class _GroupReader:
    """Operands of a group, `[H, n or l, d]`."""

    def __init__(self, call: Call) -> None:
        self.call, self.rows, self.slack = call, call.rows, None
        if not call.offsets.is_cpu:
            self.slack = torch.arange(call.total, device=call.offsets.device) >= call.offsets[-1]
            self.rows = None if self.rows is None else self.rows.masked_fill(self.slack, 0)
        self.query, self.keys, self.values = (self.heads(x) for x in (call.query, call.keys, call.values))
        self.bias = None if call.bias is None else call.bias.t().unsqueeze(1)  # [1 or H, 1, T]
        if self.bias is not None and self.slack is not None:
            self.bias = self.bias.masked_fill(self.slack, 0)

    def heads(self, x: Tensor) -> Tensor:
        """Of `[n, H·d]`."""
        return x.unflatten(1, (self.call.heads, -1)).transpose(0, 1)

    def candidates(self, x: Tensor, group: _Group) -> Tensor:
        return x[:, group.candidates].to(self.call.dtype)

    def tokens(self, x: Tensor, tokens: slice) -> Tensor:
        x = x[:, tokens] if self.rows is None else x.index_select(1, self.rows[tokens])
        if self.slack is not None:
            x = x.masked_fill(self.slack[tokens].unsqueeze(1), 0)
        return x.to(self.call.dtype)

    def scores(self, group: _Group, query: Tensor, keys: Tensor) -> Tensor:
        scores = torch.bmm(query, keys.mT).mul_(self.call.scale)
        if self.bias is not None:
            scores.add_(self.bias[:, :, group.tokens])
        if group.hidden is not None and self.call.normalize == "softmax":
            scores.masked_fill_(group.hidden, -math.inf)
        return scores

    def attention(self, group: _Group, scores: Tensor) -> Tensor:
        """May overwrite the scores."""
        if self.call.normalize != "softmax":
            return self.hide_(group, _attention_(scores, self.call.normalize))
        attention = torch.softmax(scores, 2)
        if self.bias is not None or group.hidden is not None:  # which may hide all
            attention.masked_fill_(scores.amax(2, keepdim=True) == -math.inf, 0)
        return attention

    def hide_(self, group: _Group, x: Tensor) -> Tensor:
        return x if group.hidden is None else x.masked_fill_(group.hidden, 0)

    def add(self, gradient: Tensor, tokens: slice, x: Tensor) -> None:
        if self.rows is None:
            gradient.unflatten(1, (self.call.heads, -1))[tokens] += x.transpose(0, 1)
        elif self.rows.is_cpu:
            gradient.index_add_(0, self.rows[tokens], x.transpose(0, 1).flatten(1))
        else:  # which sorts, where index_add_ takes atomics
            gradient.index_put_((self.rows[tokens],), x.transpose(0, 1).flatten(1), accumulate=True)


def _forward_groups(call: Call, out: Tensor, lse: Tensor) -> None:
    read = _GroupReader(call)
    out_by_head, lse_by_head = read.heads(out), lse.t()
    for group in _groups(call):
        keys, values = read.tokens(read.keys, group.tokens), read.tokens(read.values, group.tokens)
        scores = read.scores(group, read.candidates(read.query, group), keys)
        if call.return_lse:
            lse_by_head[:, group.candidates] = torch.logsumexp(scores, 2)
        out_by_head[:, group.candidates] = torch.bmm(read.attention(group, scores), values)


def _backward_groups(call: Call, grad_out: Tensor, delta: Tensor, grads: Gradients) -> None:
    read = _GroupReader(call)
    exact = [torch.zeros_like(g, dtype=call.dtype) for g in (grads.keys, grads.values)]
    grad_by_head, upstream_by_head = read.heads(grads.query), read.heads(grad_out)
    delta = delta.t().unsqueeze(2)
    for group in _groups(call):
        keys, values = read.tokens(read.keys, group.tokens), read.tokens(read.values, group.tokens)
        query, upstream = (read.candidates(x, group) for x in (read.query, upstream_by_head))
        attention = read.attention(group, read.scores(group, query, keys))
        read.add(exact[1], group.tokens, torch.bmm(attention.mT, upstream))
        grad = torch.bmm(upstream, values.mT)
        grad = _scores_backward_(grad, attention, delta[:, group.candidates], call.normalize)
        grad = read.hide_(group, grad)
        if grads.bias is not None:
            by_token = grad.sum(1).t()
            grads.bias[group.tokens] += by_token if grads.bias.shape[1] > 1 else by_token.sum(1, keepdim=True)
        grad.mul_(call.scale)
        grad_by_head[:, group.candidates] = torch.bmm(grad, keys)
        read.add(exact[0], group.tokens, torch.bmm(grad.mT, query))
    grads.keys.copy_(exact[0])
    grads.values.copy_(exact[1])


def _zero_slack_(x: Tensor, offsets: Tensor) -> None:
    """Zeroes the rows of slack in `[T, ...]`, in place."""
    if x.is_cpu:
        x[int(offsets[-1]) :].zero_()
    else:
        x.masked_fill_((torch.arange(x.shape[0], device=x.device) >= offsets[-1]).unsqueeze(1), 0)
