"""attentional_gru by its formula: once per sequence, once padded as eager code computes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def step(
    x: Tensor,
    h: Tensor,
    a: Any,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    kind: str,
    update: str,
    reset_after: bool,
) -> Tensor:
    """The state after `x [..., I]`, from the one before, `[..., H]`, and the attention `a [..., 1]` if there is any."""
    if kind == "aigru":
        x = a * x
    size = h.shape[-1]
    ir, iz, i_n = F.linear(x, weight_ih, bias_ih).split(size, -1)
    hr, hz = F.linear(h, weight_hh[: 2 * size], bias_hh[: 2 * size]).split(size, -1)
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    weight_n, bias_n = weight_hh[2 * size :], bias_hh[2 * size :]
    if reset_after:
        n = torch.tanh(i_n + r * F.linear(h, weight_n, bias_n))
    else:
        n = torch.tanh(i_n + F.linear(r * h, weight_n, bias_n))
    match kind, update:
        case "agru", _:
            return (1 - a) * h + a * n
        case "augru", "paper":
            u = a * (1 - z)
            return (1 - u) * h + u * n
        case "augru", "official":
            z = (1 - a) * z
    return z * h + (1 - z) * n


def attentional_gru(
    inputs: Tensor,
    offsets: Tensor,
    scores: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    kind: str = "gru",
    update: str = "paper",
    reset_after: bool = True,
    h0: Tensor | None = None,
    rows: Tensor | None = None,
    row_scores: bool = False,
) -> tuple[Tensor, Tensor]:
    """One sequence at a time, one item at a time."""
    bounds = offsets.tolist()
    positions = len(inputs) if rows is None else len(rows)
    if rows is not None:
        rows = rows[: bounds[-1]].to(torch.int64)
        inputs = inputs[rows]
        scores = scores[rows] if scores is not None and row_scores else scores
    parameters = weight_ih, weight_hh, bias_ih, bias_hh
    initial = inputs.new_zeros(len(bounds) - 1, weight_hh.shape[1]) if h0 is None else h0
    states, last = [], []
    for h, begin, end in zip(initial, bounds, bounds[1:], strict=False):
        for t in range(begin, end):
            a = None if scores is None else scores[t : t + 1]
            h = step(inputs[t], h, a, *parameters, kind, update, reset_after)
            states.append(h)
        last.append(h)
    slack = inputs.new_zeros(positions - bounds[-1], initial.shape[1])
    all_states = torch.cat([torch.stack(states), slack]) if states else slack
    return all_states, torch.stack(last) if last else initial


def attentional_gru_padded(
    inputs: Tensor,
    mask: Tensor,
    scores: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    kind: str = "gru",
    update: str = "paper",
    reset_after: bool = True,
    h0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same over `inputs [B, L, I]`, a boolean `mask [B, L]` and `scores [B, L]`, a step for all sequences at once.

    A sequence keeps its state where the mask is False. Returns `states [B, L, H]` and `last [B, H]`.
    """
    batch, length, _ = inputs.shape
    parameters = weight_ih, weight_hh, bias_ih, bias_hh
    h = inputs.new_zeros(batch, weight_hh.shape[1]) if h0 is None else h0
    states = [h.new_empty(batch, 0, h.shape[1])]
    for t in range(length):
        a = None if scores is None else scores[:, t, None]
        after = step(inputs[:, t], h, a, *parameters, kind, update, reset_after)
        h = torch.where(mask[:, t, None], after, h)
        states.append(h.unsqueeze(1))
    return torch.cat(states, 1), h
