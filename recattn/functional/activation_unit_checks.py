"""Checks of what activation_unit and activation_unit_statistics take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn.functional import checks
from recattn.functional.checks import (
    autocast,
    check_choice,
    check_dropout,
    check_tensor,
    expect_sequence,
    expect_tensor,
)
from recattn.jagged import Jagged, check_offsets
from recattn.ops.activation_unit import ACTIVATIONS, FEATURES


def check_histories(
    query: Tensor,
    keys: Tensor,
    offsets: Tensor,
    values: Tensor | None,
    query_offsets: Tensor | None,
    rows: Tensor | None,
    sparse_grad: bool,
) -> None:
    check_tensor("keys", keys, ("T", "D"), like=keys)
    if keys.dtype not in checks.DTYPES:
        raise TypeError(f"keys: expected one of {', '.join(map(str, checks.DTYPES))}, got {keys.dtype}")
    if keys.shape[1] == 0:
        raise ValueError(f"keys: expected a width of at least 1, got {list(keys.shape)}")
    expect_tensor("offsets", offsets)
    check_offsets("offsets", offsets, keys.device)
    queries: int | str = offsets.numel() - 1
    if query_offsets is not None:
        expect_tensor("query_offsets", query_offsets)
        check_offsets("query_offsets", query_offsets, keys.device)
        if query_offsets.numel() != offsets.numel():
            raise ValueError(
                f"query_offsets: expected {offsets.numel()} elements, as offsets, got {query_offsets.numel()}"
            )
        queries = "N"
    check_tensor("query", query, (queries, keys.shape[1]), like=keys)
    if values is not None:
        check_tensor("values", values, (keys.shape[0], "Dv"), like=keys)
    if rows is not None:
        checks.check_rows(rows, keys, "keys")
    elif sparse_grad:
        raise ValueError("sparse_grad: expected False, since no rows are given")
    if checks.VALIDATE:
        _validate(keys, offsets, query, query_offsets, rows)


def _validate(
    keys: Tensor, offsets: Tensor, query: Tensor, query_offsets: Tensor | None, rows: Tensor | None
) -> None:
    """Checks what only the device knows."""
    Jagged(keys if rows is None else rows, offsets).validate()
    if query_offsets is not None:
        Jagged(query, query_offsets).validate()
    if rows is not None:
        checks.validate_rows(rows[: int(offsets[-1])], keys.shape[0])


def check_features(features: Sequence[str]) -> None:
    names = () if isinstance(features, str) or not hasattr(features, "__len__") else features
    if not names or len(set(names)) != len(names):
        raise ValueError(f"features: expected distinct names out of {', '.join(FEATURES)}, got {features!r}")
    for feature in features:
        check_choice("features", feature, FEATURES)


def check_layers(
    query: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    params: Sequence[Tensor],
    features: Sequence[str],
    scores: bool,
) -> None:
    """`scores` says whether the last layer has one unit, which is no hidden one."""
    check_features(features)
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)} tensors, one per weight, got {len(biases)}")
    width: int = len(features) * query.shape[1]
    each = len(params) // max(len(weights) - 1, 1)  # params of a hidden layer
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        height: int | str = 1 if scores and layer == len(weights) - 1 else "H"
        check_tensor(f"weights[{layer}]", weight, (height, width), like=query, or_float32=True)
        check_tensor(f"biases[{layer}]", bias, (weight.shape[0],), like=query, or_float32=True)
        for index, param in enumerate(params[layer * each : (layer + 1) * each]):
            name = f"activation_params[{layer}]" + (f"[{index}]" if each > 1 else "")
            expect_tensor(name, param)
            size = 1 if param.numel() == 1 else weight.shape[0]
            check_tensor(name, param, (size,), like=query, or_float32=True)
        width = weight.shape[0]


def activation_tensors(activation: str, params: Any, layers: int) -> tuple[list[Tensor], float]:
    """The tensors of all hidden layers for prelu, 1 each, and dice, 3 each; and the slope of leaky_relu."""
    check_choice("activation", activation, ACTIVATIONS)
    if activation in ("prelu", "dice"):
        what = "slopes for prelu" if activation == "prelu" else "(alpha, scale, shift) for dice"
        if not isinstance(params, Sequence) or len(params) != layers:
            got = len(params) if isinstance(params, Sequence) else params
            raise ValueError(f"activation_params: expected {layers} {what}, one per hidden layer, got {got}")
        if activation == "prelu":
            return list(params), 0.0
        for layer, group in enumerate(params):
            if not isinstance(group, Sequence) or len(group) != 3:
                got = len(group) if isinstance(group, Sequence) else type(group).__name__
                raise ValueError(f"activation_params[{layer}]: expected (alpha, scale, shift), got {got}")
        return [param for group in params for param in group], 0.0
    if activation == "leaky_relu":
        if params is not None and not isinstance(params, float | int):
            raise TypeError(
                f"activation_params: expected a float for leaky_relu, got {type(params).__name__}"
            )
        return [], 0.01 if params is None else float(params)
    if params is not None:
        raise ValueError(f"activation_params: expected None for {activation}, got {type(params).__name__}")
    return [], 0.0


def check_noise(dropout: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed, drawn if it is needed and was not given."""
    check_dropout(dropout)
    if seed is None:
        return torch.empty(1, dtype=torch.int64, device=device).random_() if dropout else None
    expect_tensor("seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed: expected torch.int64, got {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"seed: expected one element, got {list(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed: expected device {device}, as the keys, got {seed.device}")
    return seed


def autocast_all(
    query: Tensor, keys: Tensor, values: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    expect_sequence("biases", biases, "tensors")
    query, keys, values, *layers = autocast(keys.device, query, keys, values, *weights, *biases)
    return query, keys, values, layers[: len(weights)], layers[len(weights) :]
