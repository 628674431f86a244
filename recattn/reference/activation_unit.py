"""activation_unit by its formula: once per sequence, once padded as other libraries compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "q": lambda q, k: q.expand_as(k),
    "k": lambda q, k: k,
    "q-k": lambda q, k: q - k,
    "q*k": lambda q, k: q * k,
}

NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: torch.softmax(s, dim=-1),
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "none": lambda s: s,
}


def activate(z: Tensor, activation: str, slope: Tensor | float) -> Tensor:
    """The activation of a hidden layer; `slope` is that of prelu (1 or H elements) or leaky_relu."""
    match activation:
        case "sigmoid" | "relu" | "tanh":
            return getattr(torch, activation)(z)
        case "silu" | "gelu":
            return getattr(F, activation)(z)
        case "leaky_relu" | "prelu":
            return torch.where(z > 0, z, slope * z)
        case "identity":
            return z
    raise NotImplementedError(f"activation {activation!r}")


def scores(
    query: Tensor,
    keys: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    features: Sequence[str],
    activation: str,
    activation_params: Sequence[Tensor] | float | None,
) -> Tensor:
    """`[..., D]` queries and `[..., L, D]` keys to `[..., L]` scores, before scale and normalisation."""
    hidden = torch.cat([FEATURES[name](query.unsqueeze(-2), keys) for name in features], dim=-1)
    for layer, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        slope = (
            activation_params[layer] if isinstance(activation_params, Sequence) else activation_params or 0.0
        )
        hidden = activate(F.linear(hidden, weight, bias), activation, slope)
    return F.linear(hidden, weights[-1], biases[-1]).squeeze(-1)


def activation_unit(
    query: Tensor,
    keys: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    values: Tensor | None = None,
    query_offsets: Tensor | None = None,
    rows: Tensor | None = None,
    features: Sequence[str] = ("q", "k", "q-k", "q*k"),
    activation: str = "sigmoid",
    activation_params: Sequence[Tensor] | float | None = None,
    normalize: str = "softmax",
    scale: float = 1.0,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One query at a time: score each key, normalise over the sequence, sum the values."""
    values = keys if values is None else values
    positions = len(keys) if rows is None else len(rows)
    if rows is not None:  # of which only those that are in a history may be read
        rows = rows[: offsets[-1]]
        keys, values = keys[rows], values[rows]
    bounds = offsets.tolist()
    queries = [1] * (len(bounds) - 1) if query_offsets is None else query_offsets.diff().tolist()
    owner = [b for b, count in enumerate(queries) for _ in range(count)]
    pooled, attention = [], []
    for q, b in zip(query, owner, strict=False):  # queries behind the last history's are slack
        begin, end = bounds[b], bounds[b + 1]
        s = scale * scores(q, keys[begin:end], weights, biases, features, activation, activation_params)
        a = NORMALIZATIONS[normalize](s)
        attention.append(a)
        pooled.append(a @ values[begin:end])
    pooled += [values.new_zeros(values.shape[1])] * (len(query) - len(owner))
    out = torch.stack(pooled) if pooled else values.new_zeros(0, values.shape[1])
    if not return_scores:
        return out
    slack = values.new_zeros(positions - bounds[-1])
    return out, torch.cat([*attention, slack])


def activation_unit_padded(
    query: Tensor,
    keys: Tensor,
    mask: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    values: Tensor | None = None,
    features: Sequence[str] = ("q", "k", "q-k", "q*k"),
    activation: str = "sigmoid",
    activation_params: Sequence[Tensor] | float | None = None,
    normalize: str = "softmax",
    scale: float = 1.0,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same over `keys [B, L, D]` and a boolean `mask [B, L]`, as eager libraries do it.

    Padding must be finite: it is computed with and weighted 0.
    """
    values = keys if values is None else values
    s = scale * scores(query, keys, weights, biases, features, activation, activation_params)
    # A finite fill keeps an empty row free of NaN; its uniform weights are then zeroed as all padding is.
    fill = torch.finfo(s.dtype).min if normalize == "softmax" else 0.0
    a = NORMALIZATIONS[normalize](s.masked_fill(~mask, fill)).masked_fill(~mask, 0)
    out = torch.bmm(a.unsqueeze(1), values).squeeze(1)
    return (out, a) if return_scores else out
