"""Calls of activation_unit_statistics, and the budget for their error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from activation_unit_cases import Case, activation_params, group
from torch import Tensor

from recattn import reference


def statistics(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], layer: int
) -> dict[str, Tensor]:
    """Mean and variance of hidden layer `layer`, counted from 1, and gradients of what they depend on."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    params = activation_params(case, tensors)
    options = case.options()
    mean, variance, count = function(
        tensors["query"],
        tensors["keys"],
        case.offsets(),
        group(tensors, "weight")[:layer],
        group(tensors, "bias")[:layer],
        activation_params=params[: layer - 1] if isinstance(params, list) else params,
        **case.data(),
        **{name: options[name] for name in ("features", "activation", "dropout", "seed")},
    )
    total = sum(case.lengths)
    if case.candidates is not None:
        total = sum(n * length for n, length in zip(case.candidates, case.lengths, strict=True))
    assert count.dtype == torch.int64
    assert count.shape == ()
    assert int(count) == total
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = [torch.randn(mean.shape, generator=generator).to(mean.dtype) for _ in range(2)]
    if mean.requires_grad:
        torch.autograd.backward([mean, variance], upstream)
    results = {"mean": mean.detach(), "variance": variance.detach()}
    for name, tensor in tensors.items():
        depends = not name[-1].isdigit() or int(name[-1]) < (
            layer if name.startswith(("weight", "bias")) else layer - 1
        )
        if depends and name != "values":
            grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            results[f"grad {name}"] = grad
    return results


def assert_statistics_within_budget(
    case: Case, layer: int, got: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Each result's error against float64 is at most twice that of the formula in the case's precision; on top come
    one rounding and what adding up costs, as the formula is now and then exact."""
    formula = reference.activation_unit_statistics
    exact = statistics(
        formula, replace(case, dtype=torch.float64), {n: t.double() for n, t in tensors.items()}, layer
    )
    eager = statistics(formula, case, tensors, layer)
    assert got.keys() == exact.keys()
    noise = (
        8 * torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps * max(sum(case.lengths), 1) ** 0.5
    )
    noise += torch.finfo(case.dtype).eps
    for name, result in got.items():
        wide = torch.promote_types(case.dtype, torch.float32)
        assert result.dtype == (case.dtype if name.startswith("grad") else wide), name
        assert not result.isnan().any(), name
        if result.numel():
            error, eager_error = (_rms(x.double() - exact[name]) for x in (result, eager[name]))
            budget = 2 * eager_error + noise * _rms(exact[name])
            assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}, eager {eager_error:.2e}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
