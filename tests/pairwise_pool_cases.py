"""Calls of pairwise_pool, and the budget for their error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recattn.composite.score_dropout import draw_seed
from recattn.reference import pairwise_pool, pairwise_pool_gathered


@dataclass(frozen=True)
class Case:
    batch: int = 19
    count: int = 7  # of fields
    dim: int = 10
    hidden: int = 6
    dropout: float = 0.0
    return_weights: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every differentiable argument, by name, at natural scale."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*shape, generator=generator)).to(self.dtype)

        return {
            "fields": normal(self.batch, self.count, self.dim),
            "weight": normal(self.hidden, self.dim, std=self.dim**-0.5),
            "bias": normal(self.hidden, std=0.3),
            "projection": normal(self.hidden),
        }

    def options(self) -> dict[str, Any]:
        return {"dropout": self.dropout, "return_weights": self.return_weights}


def call(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], **changes: Any
) -> dict[str, Tensor]:
    """Outputs and gradients by name, for upstream gradients that depend on the case only."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    torch.manual_seed(case.seed)
    if function is pairwise_pool and case.dropout:
        changes["seed"] = draw_seed(torch.device("cpu"))
    result = function(*tensors.values(), **case.options() | changes)
    outputs = dict(zip(("out", "weights"), result if isinstance(result, tuple) else (result,), strict=False))
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = [
        torch.randn(o.shape, generator=generator).to(case.dtype).to(o.dtype) for o in outputs.values()
    ]
    if any(o.requires_grad for o in outputs.values()):  # the formula's do not where there is no pair
        torch.autograd.backward(list(outputs.values()), upstream)
    results = {name: o.detach() for name, o in outputs.items()}
    for name, tensor in tensors.items():
        results[f"grad {name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return results


def exact(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formula in float64."""
    return call(pairwise_pool, case, {name: tensor.double() for name, tensor in tensors.items()})


def eager(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What libraries run, in the precision of the case; with dropout, the formula."""
    return call(pairwise_pool if case.dropout else pairwise_pool_gathered, case, tensors)


def assert_within_budget(case: Case, got: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Each result's error against float64 is at most twice that of eager code in the same precision.

    On top comes one rounding to the dtype, and a rounding of terms as large as dL/da = g·v·v in float32: of one draw
    eager code's error is now and then next to nothing; pooled over draws this is not needed. Few numbers have no
    error of their own to speak of: what eager code errs by relative to the largest of its relative errors stands in.
    """
    truth, reference = exact(case, tensors), eager(case, tensors)
    assert got.keys() == truth.keys()
    size, head = (max(_rms(tensors[name].double()), 1.0) for name in ("fields", "projection"))
    term = case.dim**0.5 * size**4 * head
    noise = 2 * torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps * term * case.batch**0.5
    epsilon = torch.finfo(case.dtype).eps
    errors = {name: _rms(reference[name].double() - truth[name]) for name in truth}
    relative = max((errors[name] / _rms(t) for name, t in truth.items() if _rms(t) > 0), default=0.0)
    for name, value in got.items():
        assert value.dtype == case.dtype, name
        assert value.shape == truth[name].shape, name
        assert not value.isnan().any(), name
        error, eager_error = _rms(value.double() - truth[name]), errors[name]
        if value.numel() < 8:
            eager_error = max(eager_error, relative * _rms(truth[name]))
        budget = 2 * eager_error + epsilon * _rms(truth[name]) + noise
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}, eager {eager_error:.2e}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def variant(**changes: Any) -> Case:
    return replace(Case(), **changes)
