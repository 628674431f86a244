"""activation_unit in PyTorch: only valid positions, the folded first layer, blocks that stay in cache.

Passes over the history in blocks of rows. A block runs the layers of the MLP one after the other, so what is
alive at any time is a block's hidden units, never `[T, H]`. Backward recomputes them block by block.
On an accelerator nothing is copied to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.activations import FROM_OUTPUT, activate, activation_backward_
from recattn.composite.blocks import Block, Histories, Workspace, segment_sum
from recattn.composite.first_layer import FirstLayer, FirstLayerGradients
from recattn.ops.fold import Folded

__all__ = ["Unit", "backward", "forward", "segment_sum"]

# Bytes of a block's buffers: half of what a core has as its second cache.
CACHE = 1 << 21
ROWS_ON_ACCELERATOR = 1 << 18


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


def forward(unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, Dv]`, the attention `a [T]` and the log-sum-exp `[B]` (of the scaled scores), in `unit.dtype`."""
    total, batch = unit.keys.shape[0], unit.offsets.numel() - 1
    scores = unit.keys.new_zeros(total, dtype=unit.dtype)
    out = unit.values.new_zeros(batch, unit.values.shape[1], dtype=unit.dtype)
    lse = scores.new_full((batch,), -torch.inf if unit.normalize == "softmax" else 0)
    size = _block_size(unit, copies=1)
    workspace = Workspace(out, size)
    first = FirstLayer(unit.first, unit.query.to(unit.dtype), workspace)
    last = unit.weights[-1][0] * unit.scale, unit.biases[-1] * unit.scale
    for span in Histories.of(unit.offsets, total).spans():
        for block in span.pieces(size):
            hidden = _hidden(unit, first, block, unit.keys[block.rows].to(unit.dtype), workspace)
            torch.addmv(last[1], hidden[-1], last[0], out=scores[block.rows])
        attention = scores[span.rows]
        if unit.normalize == "softmax":
            lse[span.owners] = _softmax_(attention, span)
        out[span.owners] = span.sum(unit.values[span.rows].to(unit.dtype), attention)
    return out, _without_slack(scores, unit.offsets), lse


def _softmax_(scores: Tensor, span: Block) -> Tensor:
    """Softmax over each sequence, in place; returns the log-sum-exp, -inf for empty ones."""
    of_rows = slice(None) if span.length else span.sequence - span.first
    top = span.reduce(scores, "max")
    scores = span.split(scores)
    scores.sub_(top[of_rows].unsqueeze(1)).exp_()
    mass = span.reduce(scores.view(-1), "sum")
    scores.div_(mass[of_rows].unsqueeze(1))
    return top.add_(mass.log_())


def backward(
    unit: Unit, grad_out: Tensor, grad_scores: Tensor | None, delta: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of query (but for its way through c), keys, values, key, product and bias of the folded layer,
    weights, biases, slopes; the last three as lists. `delta [B]` is Σ_t a_t dL/da_t, for softmax."""
    dtype = unit.dtype
    separate = unit.values is not unit.keys
    grad_keys = torch.zeros_like(unit.keys) if separate else torch.empty_like(unit.keys)
    grad_values = torch.empty_like(unit.values) if separate else None
    grad_weights = [torch.zeros_like(w) for w in unit.weights]
    grad_biases = [torch.zeros_like(b) for b in unit.biases]
    grad_slopes = [torch.zeros_like(s) for s in unit.slopes if isinstance(s, Tensor)]
    grad_out = grad_out.to(dtype)
    size = _block_size(unit, copies=2)
    workspace = Workspace(grad_out, size)
    first = FirstLayer(unit.first, unit.query.to(dtype), workspace)
    grad_first = FirstLayerGradients(first)
    weights = [*unit.weights[:-1], unit.weights[-1] * unit.scale]
    bias = unit.biases[-1] * unit.scale
    spans = Histories.of(unit.offsets, unit.keys.shape[0]).spans()
    for block in chain.from_iterable(span.pieces(size) for span in spans):
        rows = block.rows
        keys = unit.keys[rows].to(dtype)
        values = unit.values[rows].to(dtype) if separate else keys
        slack = None
        if not keys.is_cpu:  # as rows of zeros without a gradient it leaves the sums over all rows alone
            slack = torch.arange(block.begin, block.end, device=keys.device) >= unit.offsets[-1]
            keys = keys.masked_fill(slack.unsqueeze(1), 0)
        pre: list[Tensor] = []
        hidden = _hidden(unit, first, block, keys, workspace, pre)
        attention = block.split(torch.addmv(bias, hidden[-1], weights[-1][0]))
        grad_rows = grad_keys[rows].to(dtype)
        grad_pooled = grad_rows if grad_values is None else grad_values[rows]

        upstream = block.take(grad_out, out=workspace("upstream", *values.shape))
        grad = block.dot(values, upstream, out=grad_pooled)  # dL/da, [n, length]
        if grad_scores is not None:
            grad += block.split(grad_scores[rows])
        if unit.normalize == "softmax":
            assert delta is not None
            attention.sub_(block.take(lse)).exp_()
            grad.sub_(block.take(delta)).mul_(attention)
        grad = grad.view(-1, 1)
        if slack is not None:
            grad.masked_fill_(slack.unsqueeze(1), 0)
        torch.mul(upstream, attention.unsqueeze(-1), out=block.split(grad_pooled))

        for layer in reversed(range(len(hidden))):
            grad_weights[layer].addmm_(grad.t(), hidden[layer])
            grad_biases[layer] += grad.sum(0)
            z = hidden[layer] if unit.activation in FROM_OUTPUT else pre[layer]
            grad = torch.mm(grad, weights[layer], out=workspace(f"gradient {layer}", *z.shape))
            slope = activation_backward_(grad, z, unit.activation, unit.slopes[layer])
            if slope is not None:
                grad_slopes[layer] += slope
        grad_first.add(block, keys, grad, grad_rows)
        if grad_rows.dtype != grad_keys.dtype:
            grad_keys[rows] = grad_rows
    for gradient in (grad_weights[-1], grad_biases[-1]):
        gradient.mul_(unit.scale)
    for gradient in (grad_keys, *([] if grad_values is None else [grad_values])):
        _without_slack(gradient, unit.offsets)
    grad_key, grad_product = grad_first.folded.permute(1, 2, 0)
    return (
        grad_first.query,
        grad_keys,
        grad_values,
        grad_key,
        grad_product,
        grad_first.bias,
        grad_weights,
        grad_biases,
        grad_slopes,
    )


def _hidden(
    unit: Unit,
    first: FirstLayer,
    block: Block,
    keys: Tensor,
    workspace: Workspace,
    pre: list[Tensor] | None = None,
) -> list[Tensor]:
    """The hidden units of each layer, `[rows, H]`; with `pre`, what went into each activation is put there."""
    z = first(block, keys)
    hidden: list[Tensor] = []
    for layer, slope in enumerate(unit.slopes):
        if layer:
            weight = unit.weights[layer - 1]
            z = workspace(f"hidden {layer}", keys.shape[0], weight.shape[0])
            torch.mm(hidden[-1], weight.t(), out=z).add_(unit.biases[layer - 1])
        if pre is not None:
            pre.append(z)
        hidden.append(activate(z, unit.activation, slope))
    return hidden


def _block_size(unit: Unit, copies: int) -> int:
    """As many rows as fit in cache, where a row takes `copies` times its hidden units."""
    if not unit.keys.is_cpu:
        return ROWS_ON_ACCELERATOR
    width = unit.keys.shape[1] + sum(weight.shape[1] for weight in unit.weights)
    return max(CACHE // (unit.dtype.itemsize * copies * width), 128)


def _without_slack(x: Tensor, offsets: Tensor) -> Tensor:
    """Zeroes the rows of slack in `[T, ...]`."""
    if x.is_cpu:
        x[int(offsets[-1]) if offsets.numel() else 0 :].zero_()
        return x
    valid = torch.arange(x.shape[0], device=x.device) < offsets[-1]
    return x.masked_fill_(~valid.reshape(-1, *(1,) * (x.dim() - 1)), 0)
