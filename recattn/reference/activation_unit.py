"""activation_unit by its formula: once per sequence, once padded as other libraries compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recattn.ops.dropout import Dropout

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


# The activation of a hidden layer: of its number and its pre-activations, `[..., L, H]`.
Activation = Callable[[int, Tensor], Tensor]


def activate(z: Tensor, activation: str, params: Any) -> Tensor:
    """`params` is the slope of prelu (1 or H elements) or leaky_relu; (alpha, scale, shift) of dice."""
    match activation:
        case "sigmoid" | "relu" | "tanh":
            return getattr(torch, activation)(z)
        case "silu" | "gelu":
            return getattr(F, activation)(z)
        case "leaky_relu" | "prelu":
            return torch.where(z > 0, z, params * z)
        case "dice":
            alpha, scale, shift = params
            p = torch.sigmoid(scale * z + shift)
            return p * z + (1 - p) * alpha * z
        case "identity":
            return z
    raise NotImplementedError(f"activation {activation!r}")


def drop(units: Tensor, layer: int, dropout: Dropout | None, rows: Tensor | None) -> Tensor:
    """Hidden units `[..., L, H]` after dropout; `rows [..., L]` are counted along the histories of all queries."""
    if dropout is None:
        return units
    assert rows is not None
    kept = dropout.kept(rows.flatten(), layer, units.shape[-1]).view(units.shape)
    return torch.where(kept, units * dropout.gain, 0)


def hidden_activation(
    activation: str, params: Any, dropout: float = 0.0, seed: Tensor | None = None, rows: Tensor | None = None
) -> Activation:
    """The activation by its name, and dropout."""
    noise = Dropout.of(dropout, seed)

    def act(layer: int, z: Tensor) -> Tensor:
        units = activate(z, activation, params[layer] if isinstance(params, Sequence) else params)
        return drop(units, layer, noise, rows)

    return act


def mlp(
    query: Tensor,
    keys: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    features: Sequence[str],
    act: Activation,
) -> Tensor:
    """`[..., D]` queries and `[..., L, D]` keys to what the last of the layers makes of them, `[..., L, H]`."""
    x = torch.cat([FEATURES[name](query.unsqueeze(-2), keys) for name in features], dim=-1)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(act(layer - 1, x) if layer else x, weight, bias)
    return x


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
    activation_params: Any = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    normalize: str = "softmax",
    scale: float = 1.0,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One query at a time: score each key, normalise over the sequence, sum the values."""
    values = keys if values is None else values
    attention, pooled = [], []
    for q, items, row in sequences(query, len(keys), offsets, query_offsets, rows):
        act = hidden_activation(activation, activation_params, dropout, seed, row)
        a = NORMALIZATIONS[normalize](scale * mlp(q, keys[items], weights, biases, features, act).squeeze(-1))
        attention.append(a)
        pooled.append(a @ values[items])
    pooled += [values.new_zeros(values.shape[1])] * (len(query) - len(pooled))  # of no history
    out = torch.stack(pooled) if pooled else values.new_zeros(0, values.shape[1])
    if not return_scores:
        return out
    slack = values.new_zeros((len(keys) if rows is None else len(rows)) - int(offsets[-1]))
    return out, torch.cat([*attention, slack])


def sequences(
    query: Tensor, count: int, offsets: Tensor, query_offsets: Tensor | None, rows: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each query that has a history, which of `count` items are in it, and its rows counted over all queries."""
    items = torch.arange(count, device=query.device) if rows is None else rows.to(torch.int64)
    bounds = offsets.tolist()
    queries = [1] * (len(bounds) - 1) if query_offsets is None else query_offsets.diff().tolist()
    owner = [b for b, n in enumerate(queries) for _ in range(n)]
    row = 0
    for q, b in zip(query, owner, strict=False):  # queries behind the last history's are slack
        length = bounds[b + 1] - bounds[b]
        yield q, items[bounds[b] : bounds[b + 1]], torch.arange(row, row + length, device=query.device)
        row += length


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
    activation_params: Any = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    act: Activation | None = None,
    normalize: str = "softmax",
    scale: float = 1.0,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same over `keys [B, L, D]` and a boolean `mask [B, L]`, as eager libraries do it.

    Padding must be finite: it is computed with and weighted 0. `act` takes the place of the activation by name.
    """
    values = keys if values is None else values
    if act is None:
        act = hidden_activation(
            activation, activation_params, dropout, seed, rows_of(mask) if dropout else None
        )
    s = scale * mlp(query, keys, weights, biases, features, act).squeeze(-1)
    # A finite fill keeps an empty row free of NaN; its uniform weights are then zeroed as all padding is.
    fill = torch.finfo(s.dtype).min if normalize == "softmax" else 0.0
    a = NORMALIZATIONS[normalize](s.masked_fill(~mask, fill)).masked_fill(~mask, 0)
    out = torch.bmm(a.unsqueeze(1), values).squeeze(1)
    return (out, a) if return_scores else out


def rows_of(mask: Tensor) -> Tensor:
    """The number of each position among the valid ones, `[B, L]`; of padding any."""
    return mask.flatten().cumsum(0).sub(1).view(mask.shape)
