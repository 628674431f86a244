"""self_attention as its formula, one head of one sequence after the other, in plain PyTorch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn.composite.score_dropout import kept


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    causal: bool = False,
    hide_self: bool = False,
    bias_table: Tensor | None = None,
    bias_index: str | Tensor = "position",
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The oracle for `recattn.functional.self_attention`: same arguments, same result, any floating dtype.

    `seed` is what decides the dropped scores, as the operator draws it.
    """
    scale = (q.shape[1] // num_heads) ** -0.5 if scale is None else scale
    width = v.shape[1] // num_heads
    out = torch.zeros(v.shape[0], num_heads, width, dtype=v.dtype, device=v.device)
    heads = [x.unflatten(1, (num_heads, -1)) for x in (q, k, v)]
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        place = torch.arange(begin, end, device=q.device)
        query_place, key_place = place[:, None], place[None, :]
        admitted = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device)
        if causal:
            admitted &= key_place <= query_place
        if hide_self:
            admitted &= key_place != query_place
        some = admitted.any(1, keepdim=True)
        for head in range(num_heads):
            query, key, value = (x[begin:end, head] for x in heads)
            scores = scale * query @ key.T
            if bias_table is not None:
                index = place if isinstance(bias_index, str) else bias_index[begin:end].to(torch.int64)
                buckets = len(bias_table)
                bucket = (index[:, None] - index[None, :] + buckets // 2).clamp(0, buckets - 1)
                scores = scores + bias_table[bucket, head]
            scores = scores.masked_fill(~admitted, -torch.inf).masked_fill(~some, 0)
            attention = torch.softmax(scores, 1).masked_fill(~some, 0)
            if dropout:
                assert seed is not None
                keep = kept(seed, query_place * num_heads + head, key_place - begin, dropout)
                attention = attention * keep / (1 - dropout)
            out[begin:end, head] = attention @ value
    return out.flatten(1)


def self_attention_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    causal: bool = False,
    hide_self: bool = False,
    bias_table: Tensor | None = None,
    bias_index: str | Tensor = "position",
    dropout: float = 0.0,
) -> Tensor:
    """The same on a padded batch, with all scores in memory, as ranking libraries write it.

    `q`, `k` and `v` are `[B, L, H·d]`, `mask` is `[B, L]` bool, and `bias_index` may be `[B, L]` integers. What dropout
    drops differs from what the operator does.
    """
    place = torch.arange(q.shape[1], device=q.device)
    heads = [x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v)]  # [B, H, L, d]
    scores = heads[0] @ heads[1].transpose(2, 3)
    scores = scores * (heads[0].shape[3] ** -0.5 if scale is None else scale)
    if bias_table is not None:
        index = place[None] if isinstance(bias_index, str) else bias_index.to(torch.int64)
        buckets = len(bias_table)
        bucket = (index[:, :, None] - index[:, None, :] + buckets // 2).clamp(0, buckets - 1)
        scores = scores + bias_table[bucket].movedim(3, 1)
    admitted = mask[:, None, None, :].expand_as(scores)
    if causal:
        admitted = admitted & (place[None, :] <= place[:, None])
    if hide_self:
        admitted = admitted & (place[None, :] != place[:, None])
    some = admitted.any(3, keepdim=True)
    scores = scores.masked_fill(~admitted, -torch.inf).masked_fill(~some, 0)
    attention = torch.softmax(scores, 3).masked_fill(~some, 0)
    attention = torch.nn.functional.dropout(attention, dropout)
    return (attention @ heads[2]).transpose(1, 2).flatten(2).masked_fill(~mask[:, :, None], 0)
