"""activation_unit_statistics, with every argument checked before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recattn.backend import requested_backend
from recattn.functional.activation_unit_checks import (
    activation_tensors,
    autocast_all,
    check_histories,
    check_layers,
    check_noise,
)
from recattn.functional.checks import check_flags, expect_sequence, expect_tensor
from recattn.ops import activation_unit_statistics as _op
from recattn.ops.activation_unit import FEATURES


def activation_unit_statistics(
    query: Tensor,
    keys: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    query_offsets: Tensor | None = None,
    rows: Tensor | None = None,
    unique_rows: bool = False,
    sparse_grad: bool = False,
    features: Sequence[str] = FEATURES,
    activation: str = "sigmoid",
    activation_params: Sequence[Tensor] | Sequence[Sequence[Tensor]] | float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean and variance of a hidden layer's pre-activations in `activation_unit`, over the items of all histories,
    for batch normalisation and Dice in training.

    .. math::
        mean = \frac{1}{n} \sum_t z_{l,t},\qquad variance = \frac{1}{n} \sum_t (z_{l,t} - mean)^2

    The pre-activations are computed, not stored, and again by backward.

    Args:
        query, keys, offsets, query_offsets, rows, unique_rows, sparse_grad, features, activation: as in
            `activation_unit`.
        weights: of the hidden layers up to that one: `[H1, F·D]`, ..., `[Hl, Hl-1]`.
        biases: `[H1]`, ..., `[Hl]`.
        activation_params: of the hidden layers before that one, as in `activation_unit`.
        dropout, seed: as in `activation_unit`; of the hidden layers before that one. To give the statistics of what
            `activation_unit` computes, both need the same seed.

    dtypes as in `activation_unit`. Every floating argument is differentiable, once. Nothing waits for the device, but
    for candidates that no kernel covers.

    Returns:
        mean and variance (of n, not of n - 1), `[Hl]` in float32, or float64 for keys of it; and n, a tensor of
        int64 without dimension. Both are 0 where n is.

    Raises:
        TypeError, ValueError, NotImplementedError: as `activation_unit`.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, section 5.3.
    """
    expect_sequence("weights", weights, "tensors")
    params, negative_slope = activation_tensors(activation, activation_params, len(weights) - 1)
    expect_tensor("keys", keys)
    query, keys, _, weights, biases = autocast_all(query, keys, None, weights, biases)
    check_flags(unique_rows=unique_rows, sparse_grad=sparse_grad)
    check_histories(query, keys, offsets, None, query_offsets, rows, sparse_grad)
    if not weights:
        raise ValueError("weights: expected at least one hidden layer, got 0 tensors")
    check_layers(query, weights, biases, params, features, scores=False)
    seed = check_noise(dropout, seed, keys.device)
    last_bias = biases[-1]  # moves the mean and nothing else: a large one would cost the variance its digits
    mean, variance, count = _op.forward_op(
        query,
        keys,
        offsets,
        None,
        query_offsets,
        rows,
        seed,
        weights,
        [*biases[:-1], torch.zeros_like(last_bias)],
        params,
        unique_rows,
        sparse_grad,
        list(features),
        activation,
        negative_slope,
        float(dropout),
        requested_backend(),
    )
    return mean + last_bias * count.clamp_max(1), variance, count
