"""Calls of attentional_gru over histories that hurt, and the budget for their error."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recattn.jagged import Jagged, offsets_of
from recattn.reference import attentional_gru, attentional_gru_padded

HISTORIES = {
    "ragged with empty ones": [0, 1, 9, 0, 0, 17, 5, 2, 7, 0, 3, 1],
    "no history": [],
    "only empty ones": [0, 0, 0],
    "a single item": [1],
    "one huge among short ones": [1, 2, 1, 3, 50, 2, 0, 1, 1, 2],
    "all equal": [7] * 8,
}
# kind and update
CELLS = [("gru", "paper"), ("agru", "paper"), ("aigru", "paper"), ("augru", "paper"), ("augru", "official")]


@dataclass(frozen=True)
class Case:
    lengths: Sequence[int] = tuple(HISTORIES["ragged with empty ones"])
    width: int = 20
    size: int = 18
    kind: str = "augru"
    update: str = "paper"
    reset_after: bool = True
    initial: bool = True
    dtype: torch.dtype = torch.float32
    slack: int = 3
    offsets_dtype: torch.dtype = torch.int64
    seed: int = 0
    table: int | None = None  # rows of a table that inputs are read from
    unique_rows: bool = False
    row_scores: bool = False  # whether it holds the attention too
    rows_dtype: torch.dtype = torch.int64

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"kind": self.kind, "update": self.update, "reset_after": self.reset_after}
        if self.table is None:
            return options
        generator = torch.Generator().manual_seed(self.seed + 2)
        total = sum(self.lengths)
        if self.unique_rows:
            rows = torch.randperm(self.table, generator=generator)[:total]
        else:
            rows = torch.randint(self.table, (total,), generator=generator)
        unread = torch.full((self.slack,), torch.iinfo(self.rows_dtype).max)
        options["rows"] = torch.cat([rows, unread]).to(self.rows_dtype)
        return options | {"row_scores": self.row_scores}

    def offsets(self) -> Tensor:
        return offsets_of(torch.tensor(self.lengths, dtype=torch.int64)).to(self.offsets_dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Every differentiable argument, by name, at natural scale; rows that no history has hold NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*shape, generator=generator)).to(self.dtype)

        total = sum(self.lengths)
        count = total + self.slack if self.table is None else self.table
        tensors = {"inputs": normal(count, self.width)}
        if self.kind != "gru":
            if not self.row_scores:
                count = total + self.slack
            tensors["scores"] = torch.rand(count, generator=generator).to(self.dtype)
        for name, tensor in tensors.items():
            read = torch.arange(total)
            if self.table is not None and (name == "inputs" or self.row_scores):
                read = self.options()["rows"][:total]
            unread = torch.ones(len(tensor), dtype=torch.bool).index_fill(0, read.to(torch.int64), False)
            tensor[unread] = torch.nan
        tensors["weight_ih"] = normal(3 * self.size, self.width, std=self.width**-0.5)
        tensors["weight_hh"] = normal(3 * self.size, self.size, std=self.size**-0.5)
        tensors["bias_ih"] = normal(3 * self.size, std=0.3)
        tensors["bias_hh"] = normal(3 * self.size, std=0.3)
        if self.initial:
            tensors["h0"] = normal(len(self.lengths), self.size, std=0.5)
        return tensors


def call(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], **changes: Any
) -> dict[str, Tensor]:
    """Outputs and gradients by name, for upstream gradients that depend on the case only.

    Args:
        changes: of the options.
    """
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    if case.unique_rows and "unique_rows" in inspect.signature(function).parameters:
        changes.setdefault("unique_rows", True)
    parameters = [tensors[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    result = function(
        tensors["inputs"],
        changes.pop("offsets", case.offsets()),
        tensors.get("scores"),
        *parameters,
        h0=tensors.get("h0"),
        **case.options() | changes,
    )
    outputs = dict(zip(("states", "last"), result, strict=True))
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = [
        torch.randn(o.shape, generator=generator).to(case.dtype).to(o.dtype) for o in outputs.values()
    ]
    attached = [(o, g) for o, g in zip(outputs.values(), upstream, strict=True) if o.requires_grad]
    if attached:  # the formula's are not where there is nothing to do
        torch.autograd.backward(*zip(*attached, strict=True))
    results = {name: o.detach() for name, o in outputs.items()}
    for name, tensor in tensors.items():
        results[f"grad {name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return results


def exact(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formula in float64."""
    return call(attentional_gru, case, {name: tensor.double() for name, tensor in tensors.items()})


def eager(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded code in the precision of the case, as libraries write it."""

    def padded(
        inputs: Tensor, offsets: Tensor, scores: Tensor | None, *parameters: Tensor, **options: Any
    ) -> Any:
        longest = max(case.lengths, default=0)
        rows, row_scores = options.pop("rows", None), options.pop("row_scores", False)
        if rows is not None:
            rows = torch.where(torch.arange(len(rows)) < offsets[-1], rows, 0).to(torch.int64)
            inputs = torch.nn.functional.embedding(rows, inputs)
            scores = scores[rows] if scores is not None and row_scores else scores
        mask = torch.arange(longest) < offsets.diff()[:, None]
        attention = None if scores is None else Jagged(scores, offsets).to_padded(longest)
        histories = Jagged(inputs, offsets).to_padded(longest)
        states, last = attentional_gru_padded(histories, mask, attention, *parameters, **options)
        return torch.cat([states[mask], states.new_zeros(case.slack, case.size)]), last

    return call(padded, case, tensors)


def assert_within_budget(case: Case, got: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Each result's error against float64 is at most twice that of eager code in the same precision, and a rounding.

    Eager code is now and then exact where a result has few elements: there its error relative to its size counts as
    what it is elsewhere.
    """
    truth, reference = exact(case, tensors), eager(case, tensors)
    assert got.keys() == truth.keys()
    epsilon = torch.finfo(case.dtype).eps
    noise = 100 * epsilon if case.dtype == torch.float64 else 0.0  # where eager code is the formula itself
    errors = {name: _rms(reference[name].double() - t) for name, t in truth.items() if t.numel()}
    relative = max((errors[name] / max(_rms(truth[name]), 1e-30) for name in errors), default=0.0)
    for name, value in got.items():
        assert value.dtype == case.dtype, name
        assert value.shape == truth[name].shape, name
        assert not value.isnan().any(), name
        if value.numel():
            error, eager_error = _rms(value.double() - truth[name]), errors[name]
            if value.numel() < 8 or sum(case.lengths) < 8:
                eager_error = max(eager_error, relative * _rms(truth[name]))
            budget = 2 * eager_error + epsilon * _rms(truth[name]) + noise
            assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}, eager {eager_error:.2e}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def variant(**changes: Any) -> Case:
    return replace(Case(), **changes)
