"""DIEN's recurrences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from recattn import functional, reference
from recattn.bench.histories import FROM_LOG, HistoryCase, draw_histories, longest_of, unpadding, valid
from recattn.bench.layers.attentional_gru import KINDS, LAYERS
from recattn.bench.packing import Packing
from recattn.bench.task import Prepared, Setting, Task, Work, comparing, leaves_of
from recattn.jagged import Jagged
from recattn.reference.attentional_gru import step

UNROLLED = 16  # steps that torch.compile makes code of in bearable time


@dataclass(frozen=True)
class AttentionalGRU(HistoryCase):
    """Args:
    dim: of items and states.
    kind: as in `recattn.functional.attentional_gru`.
    """

    op = "attentional_gru"
    dim: int = 36
    kind: str = "augru"

    @property
    def providers(self) -> Mapping[str, Callable[[Any], Prepared]]:
        others = LAYERS if self.kind in KINDS else {"torch_gru": torch_gru} if self.kind == "gru" else {}
        return {**PROVIDERS, **others}

    def task(self, setting: Setting) -> Task:
        inputs = make_inputs(self, setting)
        rows = inputs.items.values.shape[0]
        return Task(
            self,
            setting,
            f"{self.describe(inputs.items)}, D={self.dim}, {self.kind}",
            {name: partial(provider, inputs) for name, provider in self.providers.items()},
            partial(formula, inputs),
            Work(2.0 * rows * self.dim * inputs.grad.itemsize, 12.0 * rows * self.dim**2),
        )


CASES = (
    AttentionalGRU("dien", True, 256, 100),
    AttentionalGRU("dien-extractor", False, 256, 100, kind="gru"),
    AttentionalGRU("dien-narrow", False, 1024, 50, dim=32),
    AttentionalGRU("dien-long", False, 64, 300, dim=64),
    AttentionalGRU("dien-log", True, 256, 50, FROM_LOG),
)
SWEPT = AttentionalGRU("sweep")


@dataclass(frozen=True, eq=False)
class Inputs:
    """`items [T, D]`, `scores [T]`, the parameters as in `torch.nn.GRU`, and the gradient of the states, `[T, D]`."""

    case: AttentionalGRU
    items: Jagged
    scores: Tensor
    parameters: list[Tensor]
    max_length: int
    grad: Tensor

    @cached_property
    def mask(self) -> Tensor:
        return valid(self.items, self.max_length)

    @property
    def attended(self) -> bool:
        return self.case.kind != "gru"

    @property
    def inputs(self) -> int:
        """How many leaves are no parameters."""
        return 1 + self.attended

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        scores = [self.scores] if self.attended else []
        return leaves_of(*(x.to(dtype) for x in (self.items.values, *scores, *self.parameters)))

    def padded(self, x: Tensor) -> Tensor:
        return self.items.with_values(x).to_padded(self.max_length)

    def padded_leaves(self) -> list[Tensor]:
        """`[B, L, D]` and, if there is attention, `[B, L]`."""
        return leaves_of(*map(self.padded, [self.items.values, self.scores][: self.inputs]))


def make_inputs(case: AttentionalGRU, setting: Setting) -> Inputs:
    functional.check_choice("kind", case.kind, functional.KINDS)
    generator = torch.Generator().manual_seed(setting.seed)
    to = (setting.device, setting.dtype)
    _, items = draw_histories(case, case.dim, setting, generator)
    rows, bound = items.values.shape[0], case.dim**-0.5
    shapes = [(3 * case.dim, case.dim)] * 2 + [(3 * case.dim,)] * 2
    parameters = [torch.empty(s).uniform_(-bound, bound, generator=generator).to(*to) for s in shapes]
    scores = torch.rand(rows, generator=generator).to(*to)
    grad = torch.randn(rows, case.dim, generator=generator).to(*to)
    return Inputs(case, items.to(*to), scores, parameters, longest_of(case, items), grad)


def formula(inputs: Inputs) -> Prepared:
    """In float64, one step for all sequences after the other: one sequence at a time would take minutes."""
    leaves = inputs.leaves(torch.float64)
    x, parameters, mask = leaves[0], leaves[inputs.inputs :], inputs.mask
    a = leaves[1] if inputs.attended else None

    def forward() -> Tensor:
        attention = None if a is None else inputs.padded(a)
        states, _ = reference.attentional_gru_padded(
            inputs.padded(x), mask, attention, *parameters, kind=inputs.case.kind
        )
        return states[mask]

    return Prepared(forward, leaves, inputs.grad.double(), comparing(inputs.inputs))


def recattn(inputs: Inputs) -> Prepared:
    leaves = inputs.leaves(inputs.grad.dtype)
    x, parameters = leaves[0], leaves[inputs.inputs :]
    a = leaves[1] if inputs.attended else None
    call = partial(functional.attentional_gru, kind=inputs.case.kind)
    forward = partial(call, x, inputs.items.offsets, a, *parameters)
    return Prepared(lambda: forward()[0], leaves, inputs.grad, comparing(inputs.inputs))


def eager(inputs: Inputs, function: Callable[..., Any] = reference.attentional_gru_padded) -> Prepared:
    """Padded PyTorch code, one step for all sequences after the other."""
    padded, parameters = inputs.padded_leaves(), leaves_of(*inputs.parameters)
    x, a, mask = padded[0], padded[1] if inputs.attended else None, inputs.mask
    comparable = comparing(inputs.inputs, unpadding(mask), range(1 + inputs.inputs))
    forward = partial(function, x, mask, a, *parameters, kind=inputs.case.kind)
    return Prepared(lambda: forward()[0], [*padded, *parameters], inputs.padded(inputs.grad), comparable)


def compiled(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly these shapes."""
    _check_steps(inputs)
    return eager(inputs, torch.compile(reference.attentional_gru_padded, dynamic=False, fullgraph=True))


def torch_gru(inputs: Inputs) -> Prepared:
    """`torch.nn.GRU`, which knows no attention, on a packed sequence."""
    dim = inputs.case.dim
    gru = nn.GRU(dim, dim, batch_first=True, device=inputs.grad.device, dtype=inputs.grad.dtype)
    with torch.no_grad():
        for parameter, value in zip(gru.parameters(), inputs.parameters, strict=True):
            parameter.copy_(value)
    packing = Packing(inputs)
    return packing.prepared(lambda x: gru(x)[0].data, list(gru.parameters()))


def by_step(
    x: Tensor,
    a: Tensor | None,
    sizes: Sequence[int],
    parameters: Sequence[Tensor],
    kind: str,
) -> Tensor:
    """States of packed sequences, the longest first: at each step a row for each that is not over."""
    weight_ih, weight_hh, bias_ih, bias_hh = parameters
    h = x.new_zeros(sizes[0] if sizes else 0, weight_hh.shape[1])
    states = []
    scores = [None] * len(sizes) if a is None else a.split(list(sizes))
    for item, score, size in zip(x.split(list(sizes)), scores, sizes, strict=True):
        h = step(item, h[:size], score, weight_ih, weight_hh, bias_ih, bias_hh, kind, "paper", True)
        states.append(h)
    return torch.cat(states) if states else h


def eager_jagged(inputs: Inputs, function: Callable[..., Any] = by_step) -> Prepared:
    """PyTorch code over the valid positions only, one step for all sequences that are not over after the other. Packed
    beforehand, as the rows of each step."""
    packing, parameters = Packing(inputs), leaves_of(*inputs.parameters)
    sizes, rows = packing.sizes, packing.rows
    x, *scores = leaves = leaves_of(inputs.items.values, *([inputs.scores] if inputs.attended else []))

    def forward() -> Tensor:
        a = scores[0][rows].unsqueeze(1) if scores else None
        states = function(x[rows], a, sizes, parameters, inputs.case.kind)
        return torch.zeros_like(x).index_copy(0, rows, states)

    return Prepared(forward, [*leaves, *parameters], inputs.grad, comparing(inputs.inputs))


def compiled_jagged(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly these lengths."""
    _check_steps(inputs)
    return eager_jagged(inputs, torch.compile(by_step, dynamic=False, fullgraph=True))


def _check_steps(inputs: Inputs) -> None:
    if inputs.max_length > UNROLLED:
        raise NotImplementedError(f"torch.compile unrolls {inputs.max_length} steps, which takes it minutes")


PROVIDERS: dict[str, Callable[[Inputs], Prepared]] = {
    "recattn": recattn,
    "eager": eager,
    "eager_jagged": eager_jagged,
    "compile": compiled,
    "compile_jagged": compiled_jagged,
}
