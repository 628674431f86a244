"""Calls of self_attention over sequences that hurt, and the budget for their error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recattn import functional
from recattn.composite.score_dropout import draw_seed
from recattn.jagged import offsets_of
from recattn.reference import self_attention

SEQUENCES = {
    "ragged with empty ones": [0, 1, 31, 0, 0, 70, 17, 33, 0],
    "none": [],
    "only empty ones": [0, 0, 0],
    "a single item": [1],
    "one huge among short ones": [1, 2, 1, 3, 150, 2, 0, 1, 1, 2],
    "all equal": [32, 32, 32],
}


@dataclass(frozen=True)
class Case:
    lengths: Sequence[int] = (0, 1, 31, 0, 0, 70, 17, 33, 0)
    heads: int = 2
    dim: int = 16
    value_dim: int | None = None
    scale: float | None = None
    causal: bool = False
    hide_self: bool = False
    buckets: int | None = None  # rows of a bias table
    by_time: bool = False  # whether it is looked up by times, not by places
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    slack: int = 3
    offsets_dtype: torch.dtype = torch.int64
    seed: int = 0

    def offsets(self) -> Tensor:
        return offsets_of(torch.tensor(self.lengths, dtype=torch.int64)).to(self.offsets_dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Every differentiable argument, by name, at natural scale; slack rows hold NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        total = sum(self.lengths)
        rows, width = total + self.slack, self.heads * self.dim
        value_width = self.heads * (self.value_dim or self.dim)
        tensors = {"q": normal(rows, width), "k": normal(rows, width), "v": normal(rows, value_width)}
        for tensor in tensors.values():
            tensor[total:] = torch.nan
        if self.buckets is not None:
            tensors["bias_table"] = normal(self.buckets, self.heads)
        return tensors

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_heads": self.heads,
            "scale": self.scale,
            "causal": self.causal,
            "hide_self": self.hide_self,
            "dropout": self.dropout,
        }
        if self.by_time:
            generator = torch.Generator().manual_seed(self.seed + 2)
            steps = torch.randint(0, 3, (sum(self.lengths) + self.slack,), generator=generator)
            options["bias_index"] = steps.cumsum(0) + (1 << 40)
        return options


def call(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], **changes: Any
) -> dict[str, Tensor]:
    """Output and gradients by name, for upstream gradients that depend on the case only; NaN in its slack."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    torch.manual_seed(case.seed)
    if function is not functional.self_attention and case.dropout:
        changes["seed"] = draw_seed(torch.device("cpu"))
    out = function(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        changes.pop("offsets", case.offsets()),
        bias_table=tensors.get("bias_table"),
        **case.options() | changes,
    )
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad = torch.randn(out.shape, generator=generator).to(case.dtype).to(out.dtype)
    grad[sum(case.lengths) :] = torch.nan
    if out.requires_grad:  # the formula's does not where there is nothing to sum
        out.backward(grad)
    results = {"out": out.detach()}
    for name, tensor in tensors.items():
        results[f"grad {name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return results


def exact(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formula in float64."""
    return call(self_attention, case, {name: tensor.double() for name, tensor in tensors.items()})


def eager(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formula in the precision of the case."""
    return call(self_attention, case, tensors)


def assert_within_budget(case: Case, got: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Each result's error against float64 is at most twice that of eager code in the same precision, and one rounding
    to the dtype more.

    On top comes what a sum of terms as large as dL/da = g·v costs in float32: eager code is exact where they cancel, as
    in a sequence of one item.
    """
    truth, reference = exact(case, tensors), eager(case, tensors)
    assert got.keys() == truth.keys()
    total = sum(case.lengths)
    term = float(tensors["v"][:total].double().norm(dim=1).max()) * case.dim**0.5 if total else 0.0
    noise = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps * term * abs(case.scale or 1)
    for name, value in got.items():
        assert value.dtype == case.dtype, name
        assert value.shape == truth[name].shape, name
        assert not value.isnan().any(), name
        if value.numel():
            error = _rms(value.double() - truth[name])
            eager_error = _rms(reference[name].double() - truth[name])
            budget = 2 * eager_error + torch.finfo(case.dtype).eps * _rms(truth[name]) + noise
            assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}, eager {eager_error:.2e}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def variant(**changes: Any) -> Case:
    return replace(Case(), **changes)
