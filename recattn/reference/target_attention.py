"""target_attention by its formula: once per history, once padded as other libraries compute it."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(scores: Tensor, normalize: str) -> Tensor:
    """The attention, from scores `[..., keys]`."""
    match normalize:
        case "softmax":
            return torch.softmax(scores, dim=-1)
        case "exp" | "sigmoid":
            return getattr(torch, normalize)(scores)
        case "none":
            return scores
    raise NotImplementedError(f"normalize {normalize!r}")


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, heads: int, scale: float, normalize: str
) -> tuple[Tensor, Tensor]:
    """`[..., n, H·d]` queries over `[..., L, H·d]` keys: `[..., n, H·dv]`, and the log-sum-exp `[..., n, H]`."""
    q, k, v = (x.unflatten(-1, (heads, -1)).movedim(-2, -3) for x in (query, keys, values))  # [..., H, n, d]
    scores = scale * (q @ k.mT)
    if bias is not None:
        scores = scores + bias.unflatten(-1, (-1, 1)).movedim(-2, -3).mT
    out = normalized(scores, normalize) @ v
    return out.movedim(-3, -2).flatten(-2), torch.logsumexp(scores, -1).movedim(-2, -1)


def target_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    query_offsets: Tensor | None = None,
    rows: Tensor | None = None,
    normalize: str = "softmax",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One history at a time: look up its rows, then score, normalise and sum for each of its queries."""
    scale = (query.shape[1] // num_heads) ** -0.5 if scale is None else scale
    if bias is not None and bias.dim() == 1:
        bias = bias.unsqueeze(1)
    bounds = offsets.tolist()
    groups = list(range(len(bounds))) if query_offsets is None else query_offsets.tolist()
    outs, lses = [], []
    for b, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        history = slice(begin, end) if rows is None else rows[begin:end].long()
        out, lse = attend(
            query[groups[b] : groups[b + 1]],
            keys[history],
            values[history],
            None if bias is None else bias[begin:end],
            num_heads,
            scale,
            normalize,
        )
        outs.append(out)
        lses.append(lse)
    spare = query.shape[0] - groups[-1]
    out = torch.cat([*outs, values.new_zeros(spare, values.shape[1])])
    lse = torch.cat([*lses, query.new_full((spare, num_heads), -torch.inf)])
    return (out, lse) if return_lse else out


def target_attention_padded(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    normalize: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """The same over `query [B, n, H·d]`, `keys` and `values [B, L, *]`, `mask [B, L]` and `bias [B, L, 1 or H]`, and
    the log-sum-exp `[B, n, H]`, as eager libraries do it.

    Padding must be finite: it is computed with and weighted 0.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, keys, values))
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, n, L]
    if bias is not None:
        scores = scores + bias.movedim(-1, 1).unsqueeze(2)
    valid = mask[:, None, None]
    # A finite fill keeps an empty row free of NaN; its uniform weights are then zeroed as all padding is.
    scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    attention = normalized(scores, normalize).masked_fill(~valid, 0)
    out = (attention @ v).transpose(1, 2).flatten(-2)
    return out, torch.logsumexp(scores.masked_fill(~valid, -torch.inf), -1).transpose(1, 2)
