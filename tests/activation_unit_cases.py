"""Calls of activation_unit over histories that hurt, and the budget for their error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recattn.jagged import Jagged, offsets_of
from recattn.ops.dropout import Dropout
from recattn.reference import activation_unit, activation_unit_padded
from recattn.reference.activation_unit import FEATURES, activate, drop

HISTORIES = {
    "ragged with empty ones": [0, 1, 31, 0, 0, 70, 17, 33, 0],
    "no history": [],
    "only empty ones": [0, 0, 0],
    "a single item": [1],
    "one huge among short ones": [1, 2, 1, 3, 150, 2, 0, 1, 1, 2],
    "all equal": [32, 32, 32],
}


@dataclass(frozen=True)
class Case:
    lengths: Sequence[int] = (0, 1, 31, 0, 0, 70, 17, 33, 0)
    dim: int = 18
    value_dim: int | None = None
    hidden: Sequence[int] = (20, 12)
    features: Sequence[str] = ("q", "k", "q-k", "q*k")
    activation: str = "sigmoid"
    dropout: float = 0.0
    normalize: str = "softmax"
    scale: float = 0.7
    return_scores: bool = False
    dtype: torch.dtype = torch.float32
    slack: int = 3
    offsets_dtype: torch.dtype = torch.int64
    candidates: Sequence[int] | None = None  # how many queries each history has; one without it
    table: int | None = None  # rows of a table that keys and values are read from
    unique_rows: bool = False
    sparse_grad: bool = False
    seed: int = 0

    def options(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "activation": self.activation,
            "dropout": self.dropout,
            "seed": torch.tensor([self.seed + 3]) if self.dropout else None,
            "normalize": self.normalize,
            "scale": self.scale,
            "return_scores": self.return_scores,
        }

    def data(self) -> dict[str, Any]:
        """Where the items lie, and who reads them."""
        given: dict[str, Any] = {}
        if self.candidates is not None:
            given["query_offsets"] = offsets_of(torch.tensor(self.candidates, dtype=torch.int64))
        if self.table is not None:
            generator = torch.Generator().manual_seed(self.seed + 2)
            total = sum(self.lengths)
            if self.unique_rows:
                rows = torch.randperm(self.table, generator=generator)[:total]
            else:
                rows = torch.randint(self.table, (total,), generator=generator)
            given["rows"] = torch.cat([rows, torch.full((self.slack,), 1 << 40)])  # which nobody may read
        return given

    def offsets(self) -> Tensor:
        return offsets_of(torch.tensor(self.lengths, dtype=torch.int64)).to(self.offsets_dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Every differentiable argument, by name, at natural scale; slack rows hold NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*shape, generator=generator)).to(self.dtype)

        total = sum(self.lengths) if self.table is None else self.table
        queries = len(self.lengths) if self.candidates is None else sum(self.candidates) + self.slack
        tensors = {"query": normal(queries, self.dim), "keys": normal(total + self.slack, self.dim)}
        if self.value_dim is not None:
            tensors["values"] = normal(total + self.slack, self.value_dim)
        for name in ("keys", "values"):
            if name in tensors:
                tensors[name][total:] = torch.nan
        sizes = [len(self.features) * self.dim, *self.hidden, 1]
        for layer, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            tensors[f"weight {layer}"] = normal(m, n, std=n**-0.5)
            tensors[f"bias {layer}"] = normal(m, std=0.3)
        if self.activation == "prelu":  # one slope for the first layer, then one per unit
            for layer, width in enumerate(self.hidden):
                tensors[f"slope {layer}"] = normal(width if layer else 1, std=0.2)
        if self.activation == "dice":  # one number for the first layer, then one per unit
            for layer, width in enumerate(self.hidden):
                size = width if layer else 1
                for name, mean in (("alpha", 0.0), ("gate scale", 1.0), ("gate shift", 0.0)):
                    tensors[f"{name} {layer}"] = normal(size, std=0.3) + mean
        if self.activation in ("relu", "leaky_relu", "prelu") and total:
            self._keep_off_kinks(tensors, normal)
        return tensors

    def _keep_off_kinks(self, tensors: dict[str, Tensor], normal: Callable[..., Tensor]) -> None:
        """Draws keys anew until no pre-activation is so near zero that rounding may turn its sign: there any two
        ways to compute the gradient differ by a jump, eager code and the formula too."""
        margin = 8 * torch.finfo(self.dtype).eps
        rows, noise = torch.arange(sum(self.lengths)), Dropout.of(self.dropout, self.options()["seed"])
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        for _ in range(1000):
            key, query = tensors["keys"][rows].double(), tensors["query"][owner[rows]].double()
            hidden = torch.cat(
                [FEATURES[name](query.unsqueeze(1), key.unsqueeze(1)) for name in self.features], -1
            )
            nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64)
            for layer in range(len(self.hidden)):
                weight, bias = tensors[f"weight {layer}"].double(), tensors[f"bias {layer}"].double()
                z = torch.nn.functional.linear(hidden, weight, bias)
                nearest = torch.minimum(nearest, z.abs().amin((1, 2)))
                slope = tensors[f"slope {layer}"].double() if self.activation == "prelu" else 0.1
                hidden = drop(activate(z, self.activation, slope), layer, noise, rows.unsqueeze(1))
            rows = rows[nearest < margin]
            if not len(rows):
                return
            tensors["keys"][rows] = normal(len(rows), self.dim)
        raise AssertionError("no keys off the kinks were found")


def group(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """Of all layers."""
    return [tensor for key, tensor in tensors.items() if key.rpartition(" ")[0] == name]


def activation_params(case: Case, tensors: dict[str, Tensor]) -> Any:
    if case.activation == "dice":
        return list(
            zip(*(group(tensors, name) for name in ("alpha", "gate scale", "gate shift")), strict=True)
        )
    return group(tensors, "slope") or (0.1 if case.activation == "leaky_relu" else None)


def call(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], **changes: Any
) -> dict[str, Tensor]:
    """Output and gradients by name, for upstream gradients that depend on the case only."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}

    result = function(
        tensors["query"],
        tensors["keys"],
        changes.pop("offsets", case.offsets()),
        group(tensors, "weight"),
        group(tensors, "bias"),
        values=tensors.get("values"),
        activation_params=activation_params(case, tensors),
        **case.data(),
        **case.options(),
        **changes,
    )
    outputs = dict(zip(("out", "scores"), result if isinstance(result, tuple) else (result,), strict=False))
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = [
        torch.randn(o.shape, generator=generator).to(case.dtype).to(o.dtype) for o in outputs.values()
    ]
    if any(o.requires_grad for o in outputs.values()):  # the formula's do not where there is nothing to sum
        torch.autograd.backward(list(outputs.values()), upstream)
    results = {name: o.detach() for name, o in outputs.items()}
    for name, tensor in tensors.items():
        results[f"grad {name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return results


def exact(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formula in float64."""
    return call(activation_unit, case, {name: tensor.double() for name, tensor in tensors.items()})


def eager(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded code in the precision of the case, as libraries write it."""

    def padded(
        query: Tensor,
        keys: Tensor,
        offsets: Tensor,
        weights: Any,
        biases: Any,
        *,
        values: Tensor | None,
        query_offsets: Tensor | None = None,
        rows: Tensor | None = None,
        **options: Any,
    ) -> Any:
        longest = max(case.lengths, default=0)
        mask = torch.arange(longest) < offsets.diff()[:, None]
        owner = torch.arange(len(query))
        if query_offsets is not None:
            owner = Jagged(query, query_offsets).segment_ids()
            mask = torch.nn.functional.pad(mask, (0, 0, 0, 1))[owner]
            owner = owner.clamp_max(len(case.lengths) - 1)

        def pad(x: Tensor) -> Tensor:
            x = x if rows is None else x[rows[: offsets[-1]]]
            return Jagged(x, offsets).to_padded(longest)[owner]

        result = activation_unit_padded(
            query, pad(keys), mask, weights, biases, values=None if values is None else pad(values), **options
        )
        if not case.return_scores:
            return result
        out, scores = result
        return out, torch.cat([scores[mask], scores.new_zeros(case.slack)])

    return call(padded, case, tensors)


def assert_within_budget(case: Case, got: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Each result's error against float64 is at most twice that of eager code in the same precision.

    On top comes one rounding to the dtype, and what adding up terms as large as dL/da = g·v costs in float32, as
    many as there are: eager code is now and then exact where they cancel, as in a history of one item.
    """
    truth, reference = exact(case, tensors), eager(case, tensors)
    assert got.keys() == truth.keys()
    total = sum(case.lengths)
    values = tensors.get("values", tensors["keys"])[: -case.slack or None].double()
    term = float(values.norm(dim=1).max()) * values.shape[1] ** 0.5 if total else 0.0
    noise = (
        torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps * term * total**0.5 * abs(case.scale)
    )
    epsilon = torch.finfo(case.dtype).eps
    errors = {name: _rms(reference[name].double() - truth[name]) for name in truth}
    relative = max(
        (errors[name] / _rms(t) for name, t in truth.items() if t.numel() and _rms(t) > 0), default=0.0
    )
    for name, value in got.items():
        assert value.dtype == case.dtype, name
        assert value.shape == truth[name].shape, name
        assert not value.isnan().any(), name
        if value.numel():
            error = _rms(value.double() - truth[name])
            eager_error = errors[name]
            if value.numel() < 8:  # too few for an error of their own to mean much
                eager_error = max(eager_error, relative * _rms(truth[name]))
            budget = 2 * eager_error + epsilon * _rms(truth[name]) + noise
            assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}, eager {eager_error:.2e}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def variant(**changes: Any) -> Case:
    return replace(Case(), **changes)
