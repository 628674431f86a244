"""activation_unit in PyTorch: only valid positions, the folded first layer, blocks that stay in cache.

Passes over the history in blocks of tokens. A block runs the layers of the MLP one after the other, so
what is alive at any time is a block's hidden units, never `[T, H]`. Backward recomputes them block by block.
On an accelerator nothing is copied to the host.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recattn.composite.activations import FROM_OUTPUT, activate, activation_backward
from recattn.ops.fold import Folded

BLOCK = {"cpu": 2048, "cuda": 1 << 18}


class Unit(NamedTuple):
    """One call, its first layer folded; everything in the dtype to compute in but query, keys and values."""

    query: Tensor  # [B, D]
    keys: Tensor  # [T, D]
    values: Tensor  # [T, Dv]
    offsets: Tensor  # [B + 1]
    first: Folded
    weights: Sequence[Tensor]  # [H2, H1], ..., [1, Hn]
    biases: Sequence[Tensor]
    slopes: Sequence[Tensor | float]  # per hidden layer
    activation: str
    normalize: str
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.first.bias.dtype


class Block(NamedTuple):
    """Rows `begin` to `end`, of the sequences `first` to `last`."""

    begin: int
    end: int
    first: int
    last: int
    sequence: Tensor  # [end - begin], from 0 = `first`
    offsets: Tensor  # [last - first + 1], from 0 = `begin`


def forward(unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, Dv]`, the attention `a [T]` and the log-sum-exp `[B]` (of the scaled scores), in `unit.dtype`."""
    total, batch = unit.keys.shape[0], unit.offsets.numel() - 1
    scores = unit.keys.new_zeros(total, dtype=unit.dtype)
    out = unit.values.new_zeros(batch, unit.values.shape[1], dtype=unit.dtype)
    lse = scores.new_zeros(batch)
    if batch == 0 or total == 0:
        return out, scores, lse
    blocks = list(_blocks(unit))
    for block in blocks:
        hidden = _hidden(unit, block, unit.keys[block.begin : block.end].to(unit.dtype))
        last = F.linear(hidden[-1], unit.weights[-1], unit.biases[-1])
        scores[block.begin : block.end] = last.squeeze(1)
    scores *= unit.scale
    if unit.normalize == "softmax":
        lse = _softmax_(scores, unit.offsets)
    for block in blocks:
        rows = slice(block.begin, block.end)
        out[block.first : block.last] += segment_sum(
            unit.values[rows].to(unit.dtype), block.offsets, scores[rows]
        )
    return out, _without_slack(scores, unit.offsets), lse


def backward(
    unit: Unit, grad_out: Tensor, grad_scores: Tensor | None, delta: Tensor | None, lse: Tensor
) -> tuple[Any, ...]:
    """Gradients of query (but for its way through c), keys, values, key, product and bias of the folded layer,
    weights, biases, slopes; the last three as lists. `delta [B]` is Σ_t a_t dL/da_t, for softmax."""
    dtype = unit.dtype
    separate = unit.values is not unit.keys
    grad_query = unit.query.new_zeros(unit.query.shape, dtype=dtype)
    grad_keys, grad_first = unit.keys.new_zeros(unit.keys.shape), torch.zeros_like(unit.first.bias)
    grad_values = unit.values.new_zeros(unit.values.shape) if separate else None
    grad_key, grad_product = torch.zeros_like(unit.first.key), torch.zeros_like(unit.first.product)
    grad_weights = [torch.zeros_like(w) for w in unit.weights]
    grad_biases = [torch.zeros_like(b) for b in unit.biases]
    grad_slopes = [torch.zeros_like(s) for s in unit.slopes if isinstance(s, Tensor)]
    grad_out = grad_out.to(dtype)
    for block in _blocks(unit) if unit.offsets.numel() > 1 else ():
        rows, owners = slice(block.begin, block.end), slice(block.first, block.last)
        keys = unit.keys[rows].to(dtype)
        values = unit.values[rows].to(dtype) if separate else keys
        slack = None
        if not keys.is_cpu:  # as rows of zeros without a gradient it leaves the sums over all rows alone
            slack = torch.arange(block.begin, block.end, device=keys.device) >= unit.offsets[-1]
            keys = keys.masked_fill(slack.unsqueeze(1), 0)
        pre: list[Tensor] = []
        hidden = _hidden(unit, block, keys, pre)
        scores = F.linear(hidden[-1], unit.weights[-1], unit.biases[-1]).squeeze(1).mul_(unit.scale)
        upstream = grad_out[owners].index_select(0, block.sequence)
        grad_attention = torch.linalg.vecdot(upstream, values)
        if grad_scores is not None:
            grad_attention += grad_scores[rows]
        if unit.normalize == "softmax":
            assert delta is not None
            attention = scores.sub_(lse[owners].index_select(0, block.sequence)).exp_()
            grad = attention * (grad_attention - delta[owners].index_select(0, block.sequence))
        else:
            attention, grad = scores, grad_attention
        grad = grad.mul_(unit.scale).unsqueeze(1)
        if slack is not None:
            grad.masked_fill_(slack.unsqueeze(1), 0)
        for layer in reversed(range(len(hidden))):
            grad_weights[layer].addmm_(grad.t(), hidden[layer])
            grad_biases[layer] += grad.sum(0)
            z = hidden[layer] if unit.activation in FROM_OUTPUT else pre[layer]
            grad, slope = activation_backward(
                grad @ unit.weights[layer], z, unit.activation, unit.slopes[layer]
            )
            if slope is not None:
                grad_slopes[layer] += slope
        query = unit.query[owners].to(dtype).index_select(0, block.sequence)
        through_product = grad @ unit.first.product
        grad_key.addmm_(grad.t(), keys)
        grad_product.addmm_(grad.t(), query * keys)
        grad_first[owners] += segment_sum(grad, block.offsets)
        grad_query[owners] += segment_sum(through_product * keys, block.offsets)
        grad_rows = torch.addcmul(grad @ unit.first.key, through_product, query)
        pooled = upstream.mul_(attention.unsqueeze(1))
        if grad_values is not None:
            grad_values[rows] = pooled
        else:
            grad_rows += pooled
        grad_keys[rows] = grad_rows
    if not unit.keys.is_cpu:
        grad_keys = _without_slack(grad_keys, unit.offsets)
        grad_values = None if grad_values is None else _without_slack(grad_values, unit.offsets)
    return (
        grad_query,
        grad_keys,
        grad_values,
        grad_key,
        grad_product,
        grad_first,
        grad_weights,
        grad_biases,
        grad_slopes,
    )


def _hidden(unit: Unit, block: Block, keys: Tensor, pre: list[Tensor] | None = None) -> list[Tensor]:
    """The hidden units of each layer, `[rows, H]`; with `pre`, what went into each activation is put there."""
    owners = slice(block.first, block.last)
    query = unit.query[owners].to(unit.dtype).index_select(0, block.sequence)
    z = unit.first.bias[owners].index_select(0, block.sequence)
    z.addmm_(keys, unit.first.key.t()).addmm_(query.mul_(keys), unit.first.product.t())
    hidden: list[Tensor] = []
    for layer, slope in enumerate(unit.slopes):
        if layer:
            z = F.linear(hidden[-1], unit.weights[layer - 1], unit.biases[layer - 1])
        if pre is not None:
            pre.append(z)
        hidden.append(activate(z, unit.activation, slope))
    return hidden


def _blocks(unit: Unit) -> Iterator[Block]:
    """Cuts the rows into blocks. On the CPU slack is left out; elsewhere it belongs to no sequence's sum."""
    batch = unit.offsets.numel() - 1
    size = BLOCK.get(unit.keys.device.type, BLOCK["cuda"])
    bounds = unit.offsets.tolist() if unit.offsets.is_cpu else None
    total = unit.keys.shape[0] if bounds is None else bounds[-1]
    for begin in range(0, total, size):
        end = min(begin + size, total)
        if bounds is None:
            first, last = 0, batch
        else:
            first, last = bisect_right(bounds, begin) - 1, bisect_left(bounds, end)
        offsets = unit.offsets[first : last + 1].sub(begin).clamp_(0, end - begin).to(torch.int64)
        rows = torch.arange(end - begin, device=offsets.device)
        sequence = torch.searchsorted(offsets[1:], rows, right=True).clamp_(max=last - first - 1)
        yield Block(begin, end, first, last, sequence, offsets)


def segment_sum(x: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """`[n, D]` rows to `[B, D]` sums over the segments, weighted if asked."""
    if x.shape[0] == 0:
        return x.new_zeros(offsets.numel() - 1, x.shape[1])
    rows = torch.arange(x.shape[0], device=x.device)
    # The rows behind the last offset make a bag of their own, which is dropped.
    return F.embedding_bag(rows, x, offsets.to(torch.int64), mode="sum", per_sample_weights=weights)[:-1]


def _softmax_(scores: Tensor, offsets: Tensor) -> Tensor:
    """Softmax over each segment of `[T]`, in place; returns the log-sum-exp, `[B]`, -inf for empty segments."""
    batch = offsets.numel() - 1
    rows = torch.arange(scores.shape[0], device=scores.device, dtype=offsets.dtype)
    sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)  # B for slack
    top = scores.new_full((batch + 1,), -torch.inf).scatter_reduce_(0, sequence, scores, "amax")
    scores.sub_(top.index_select(0, sequence)).exp_()
    total = segment_sum(scores.unsqueeze(1), offsets).squeeze(1)
    scores.div_(F.pad(total, (0, 1), value=1.0).index_select(0, sequence))
    return top[:-1] + total.log()


def _without_slack(x: Tensor, offsets: Tensor) -> Tensor:
    valid = torch.arange(x.shape[0], device=x.device) < offsets[-1]
    return x.masked_fill_(~valid.reshape(-1, *(1,) * (x.dim() - 1)), 0)
