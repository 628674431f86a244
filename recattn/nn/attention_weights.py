"""The attention of a dot product without what it would pool: for layers that use it in another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recattn.composite.segments import Segments
from recattn.jagged import Jagged


def attention_weights(query: Tensor, keys: Jagged) -> Tensor:
    r"""`[T]`, how much each history attends to its items: :math:`a_t = softmax_t(q \cdot k_t)`.

    Args:
        query: `[B, D]`, one for each history.
        keys: the histories, `[T, D]`. Slack is never read, and gets 0.

    Nothing waits for the device, gradients are bitwise repeatable, and no product is stored. Differentiable, once.

    Raises:
        ValueError: if the shapes disagree.
    """
    if query.dim() != 2 or keys.values.dim() != 2:
        raise ValueError(
            f"query, keys: expected [B, D] and [T, D], got {list(query.shape)} and {list(keys.values.shape)}"
        )
    expected = [keys.batch_size, keys.values.shape[1]]
    if list(query.shape) != expected:
        raise ValueError(f"query: expected {expected}, got {list(query.shape)}")
    weights: Tensor = _AttentionWeights.apply(query, keys.values, keys.offsets)
    return weights


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, offsets: Tensor) -> Tensor:
        dtype = torch.promote_types(keys.dtype, torch.float32)
        owner = Jagged(keys, offsets).segment_ids()
        slack = owner == offsets.numel() - 1
        owner = owner.clamp_max(max(offsets.numel() - 2, 0))
        weights = keys.new_zeros(keys.shape[0], dtype=dtype)
        if keys.shape[0] and query.shape[0]:
            scores = torch.linalg.vecdot(query.to(dtype).index_select(0, owner), keys.to(dtype))
            peak = torch.segment_reduce(scores, "max", offsets=offsets, unsafe=True, initial=-torch.inf)
            weights = (scores - peak.index_select(0, owner)).exp_().masked_fill_(slack, 0)
            weights /= _sums(weights, offsets).index_select(0, owner)
            weights.masked_fill_(slack, 0)
        ctx.save_for_backward(query, keys, offsets, owner, weights)
        return weights.to(keys.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, keys, offsets, owner, weights = ctx.saved_tensors
        if not (keys.shape[0] and query.shape[0]):
            return torch.zeros_like(query), torch.zeros_like(keys), None
        through = grad.to(weights.dtype) * weights
        through -= weights * _sums(through, offsets).index_select(0, owner)
        grad_query = Segments.of(offsets, keys.shape[0]).sum(keys.to(weights.dtype), through)
        grad_keys = through.unsqueeze(1) * query.to(weights.dtype).index_select(0, owner)
        return grad_query.to(query.dtype), grad_keys.to(keys.dtype), None


def _sums(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", offsets=offsets, unsafe=True, initial=0)
