"""Calls of target_attention over histories that hurt, and the budget for their error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recattn.jagged import Jagged, offsets_of
from recattn.reference import target_attention, target_attention_padded

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
    dim: int = 18  # of a head
    value_dim: int | None = None
    heads: int = 1
    candidates: Sequence[int] | None = None  # of each history; repeated as often as needed
    table: int | None = None  # rows by index into a table so long
    bias: str | None = None  # "shared" by the heads or "by head"
    scale: float | None = None
    normalize: str = "softmax"
    return_lse: bool = False
    dtype: torch.dtype = torch.float32
    slack: int = 3
    offsets_dtype: torch.dtype = torch.int64
    seed: int = 0

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def counts(self) -> list[int]:
        """Candidates of each history."""
        if self.candidates is None:
            return [1] * len(self.lengths)
        return [self.candidates[b % len(self.candidates)] for b in range(len(self.lengths))]

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_heads": self.heads,
            "scale": self.scale,
            "normalize": self.normalize,
            "return_lse": self.return_lse,
        }
        if self.candidates is not None:
            options["query_offsets"] = offsets_of(torch.tensor(self.counts(), dtype=torch.int64))
        if self.table is not None:
            generator = torch.Generator().manual_seed(self.seed + 2)
            options["rows"] = torch.randint(self.table, (self.total + self.slack,), generator=generator)
            options["rows"][self.total :] = -1
        return options

    def offsets(self) -> Tensor:
        return offsets_of(torch.tensor(self.lengths, dtype=torch.int64)).to(self.offsets_dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Every differentiable argument, by name, at natural scale; slack rows hold NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        rows = self.total + self.slack if self.table is None else self.table
        spare = 0 if self.candidates is None else self.slack
        value_dim = self.dim if self.value_dim is None else self.value_dim
        tensors = {
            "query": normal(sum(self.counts()) + spare, self.heads * self.dim),
            "keys": normal(rows, self.heads * self.dim),
            "values": normal(rows, self.heads * value_dim),
        }
        if self.table is None:
            tensors["keys"][self.total :] = torch.nan
            tensors["values"][self.total :] = torch.nan
        if self.bias is not None:
            shape = (self.total + self.slack, self.heads)
            tensors["bias"] = normal(*(shape[:1] if self.bias == "shared" else shape))
            tensors["bias"][self.total :] = torch.nan
        return tensors


def call(
    function: Callable[..., Any], case: Case, tensors: dict[str, Tensor], **changes: Any
) -> dict[str, Tensor]:
    """Output and gradients by name, for upstream gradients that depend on the case only."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    result = function(
        tensors["query"],
        tensors["keys"],
        tensors["values"],
        case.offsets(),
        bias=tensors.get("bias"),
        **case.options() | changes,
    )
    outputs = dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,), strict=False))
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = [
        torch.randn(o.shape, generator=generator).to(case.dtype).to(o.dtype) for o in outputs.values()
    ]
    if "lse" in outputs:  # that of an empty history is a constant
        upstream[1] = upstream[1].masked_fill(outputs["lse"] == -torch.inf, 0)
    if any(o.requires_grad for o in outputs.values()):  # the formula's do not where there is nothing to sum
        torch.autograd.backward(list(outputs.values()), upstream)
    results = {name: o.detach() for name, o in outputs.items()}
    for name, tensor in tensors.items():
        results[f"grad {name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return results


def exact(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formula in float64."""
    return call(target_attention, case, {name: tensor.double() for name, tensor in tensors.items()})


def eager(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded code in the precision of the case, as libraries write it."""

    def padded(query: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, **options: Any) -> Any:
        options.pop("return_lse")
        rows, query_offsets = options.pop("rows", None), options.pop("query_offsets", None)
        if rows is not None:
            keys, values = (
                torch.nn.functional.embedding(rows.clamp(min=0), table) for table in (keys, values)
            )
        longest = max(case.lengths, default=0)
        mask = torch.arange(longest) < Jagged(keys, offsets).lengths[:, None]
        bias = options.pop("bias")
        if bias is not None:
            bias = Jagged(bias.unflatten(0, (-1, 1)).flatten(1), offsets).to_padded(longest)
        groups = Jagged(query, torch.arange(len(query) + 1) if query_offsets is None else query_offsets)
        most = max(case.counts(), default=0)
        out, lse = target_attention_padded(
            groups.to_padded(most),
            Jagged(keys, offsets).to_padded(longest),
            Jagged(values, offsets).to_padded(longest),
            mask,
            bias=bias,
            **options,
        )
        chosen = torch.arange(most) < groups.lengths[:, None]
        spare = len(query) - int(groups.offsets[-1])
        out = torch.cat([out[chosen], out.new_zeros(spare, out.shape[-1])])
        lse = torch.cat([lse[chosen], lse.new_full((spare, case.heads), -torch.inf)])
        return (out, lse) if case.return_lse else out

    return call(padded, case, tensors)


def assert_within_budget(case: Case, got: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Each result's error against float64 is at most twice that of eager code in the same precision.

    On top comes one rounding to the dtype, and what adding up terms as large as dL/da = g·v costs in float32, as
    many as there are: eager code is now and then exact where they cancel, as in a history of one item.
    """
    truth, reference = exact(case, tensors), eager(case, tensors)
    assert got.keys() == truth.keys()
    wide = torch.promote_types(case.dtype, torch.float32)
    values = tensors["values"][: case.total].double()
    term = float(values.norm(dim=1).max()) * values.shape[1] ** 0.5 if values.numel() else 0.0
    noise = torch.finfo(wide).eps * term * case.total**0.5 * max(abs(case.scale or 1.0), 1.0)
    epsilon = torch.finfo(case.dtype).eps
    errors = {name: _rms(reference[name].double() - truth[name]) for name in truth}
    relative = max((errors[name] / _rms(t) for name, t in truth.items() if _rms(t) > 0), default=0.0)
    for name, value in got.items():
        assert value.dtype == (wide if name == "lse" else case.dtype), name
        assert value.shape == truth[name].shape, name
        assert not value.isnan().any(), name
        assert torch.equal(value.isinf(), truth[name].isinf()), name
        error, eager_error = _rms(value.double() - truth[name]), errors[name]
        if value.numel() < 8:  # too few for an error of their own to mean much
            eager_error = max(eager_error, relative * _rms(truth[name]))
        budget = 2 * eager_error + epsilon * _rms(truth[name]) + noise
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}, eager {eager_error:.2e}"


def _rms(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def variant(**changes: Any) -> Case:
    return replace(Case(), **changes)
