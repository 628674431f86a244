"""AFM's attention over the products of fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recattn import functional, reference
from recattn.bench.layers.pairwise_pool import LAYERS
from recattn.bench.task import Case, Prepared, Setting, Task, Work, comparing, leaves_of


@dataclass(frozen=True)
class PairwisePool(Case):
    """Args:
    batch, fields, dim: B, F, K.
    hidden: A, the width of the attention network.
    """

    op = "pairwise_pool"
    batch: int = 1024
    fields: int = 39
    dim: int = 16
    hidden: int = 16

    @property
    def providers(self) -> Mapping[str, Callable[[Any], Prepared]]:
        return PROVIDERS

    def task(self, setting: Setting) -> Task:
        inputs = make_inputs(self, setting)
        pairs = self.batch * self.fields * (self.fields - 1) / 2
        io = self.batch * (self.fields + 1.0) * self.dim * inputs.grad.itemsize
        return Task(
            self,
            setting,
            f"B={self.batch}, {self.fields} fields of {self.dim}, hidden {self.hidden}",
            {name: partial(provider, inputs) for name, provider in self.providers.items()},
            partial(formula, inputs),
            Work(io, pairs * (2.0 * self.dim * (self.hidden + 1.5) + 2.0 * self.hidden)),
            kinked=True,
        )


CASES = (
    PairwisePool("afm-39", True),  # the fields of Criteo
    PairwisePool("afm-24", False, 1024, 24),  # those of Avazu
    PairwisePool("afm-10", False, 4096, 10),
)
SWEPT = PairwisePool("sweep")


@dataclass(frozen=True, eq=False)
class Inputs:
    """`[fields [B, F, K], weight [A, K], bias [A], projection [A]]`, and dL/dout `[B, K]`."""

    case: PairwisePool
    tensors: list[Tensor]
    grad: Tensor


def make_inputs(case: PairwisePool, setting: Setting) -> Inputs:
    generator = torch.Generator().manual_seed(setting.seed)
    shapes = ((case.batch, case.fields, case.dim), (case.hidden, case.dim), (case.hidden,), (case.hidden,))
    scales = (1.0, case.dim**-0.5, 0.1, 1.0)
    tensors = [scale * torch.randn(s, generator=generator) for s, scale in zip(shapes, scales, strict=True)]
    grad = torch.randn(case.batch, case.dim, generator=generator)
    return Inputs(
        case,
        [t.to(setting.device, setting.dtype) for t in tensors],
        grad.to(setting.device, setting.dtype),
    )


def formula(inputs: Inputs) -> Prepared:
    """In float64."""
    return _prepared(inputs, reference.pairwise_pool_gathered, torch.float64)


def recattn(inputs: Inputs) -> Prepared:
    return _prepared(inputs, functional.pairwise_pool)


def eager(inputs: Inputs) -> Prepared:
    """PyTorch code with the products of all pairs in memory."""
    return _prepared(inputs, reference.pairwise_pool_gathered)


def compiled(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly these shapes."""
    function = torch.compile(reference.pairwise_pool_gathered, dynamic=False, fullgraph=True)
    return _prepared(inputs, function)


def _prepared(inputs: Inputs, function: Callable[..., Any], dtype: torch.dtype | None = None) -> Prepared:
    dtype = dtype or inputs.grad.dtype
    leaves = leaves_of(*(t.to(dtype) for t in inputs.tensors))
    return Prepared(partial(function, *leaves), leaves, inputs.grad.to(dtype), comparing(1))


PROVIDERS: dict[str, Callable[[Inputs], Prepared]] = {
    "recattn": recattn,
    "eager": eager,
    "compile": compiled,
    **LAYERS,
}
