"""DIEN's recurrences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from recattn import functional, reference
from recattn.bench.histories import FROM_LOG, HistoryCase, draw_histories, longest_of, unpadding, valid
from recattn.bench.peers import import_peer
from recattn.bench.task import Prepared, Setting, Task, Work, comparing, leaves_of
from recattn.jagged import Jagged

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
        return PROVIDERS

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
    if inputs.max_length > UNROLLED:
        raise NotImplementedError(f"torch.compile unrolls {inputs.max_length} steps, which takes it minutes")
    return eager(inputs, torch.compile(reference.attentional_gru_padded, dynamic=False, fullgraph=True))


def torch_gru(inputs: Inputs) -> Prepared:
    """`torch.nn.GRU` on a packed sequence, which knows no attention."""
    if inputs.attended:
        raise NotImplementedError("torch.nn.GRU has no attention")
    dim = inputs.case.dim
    gru = nn.GRU(dim, dim, batch_first=True, device=inputs.grad.device, dtype=inputs.grad.dtype)
    with torch.no_grad():
        for parameter, value in zip(gru.parameters(), inputs.parameters, strict=True):
            parameter.copy_(value)
    packing = Packing(inputs)
    return packing.prepared(lambda x: gru(x)[0].data, list(gru.parameters()))


def deepctr_torch(inputs: Inputs) -> Prepared:
    """DeepCTR-Torch's `DynamicGRU`, which takes packed sequences. Its update gate is 1 less what is kept here, and its
    two biases are one, by mistake; here they are two.

    Raises:
        ModuleNotFoundError: where it is not installed.
        NotImplementedError: for kinds that it leaves to others.
    """
    kind, dim = inputs.case.kind, inputs.case.dim
    if kind not in ("agru", "augru"):
        raise NotImplementedError(f"DynamicGRU has no {kind}")
    layers = import_peer("deepctr_torch.layers.sequence")
    cells = layers.DynamicGRU(dim, dim, gru_type=kind.upper()).to(inputs.grad.device, inputs.grad.dtype)
    rnn = cells.rnn
    rnn.bias_ih = nn.Parameter(torch.empty_like(rnn.bias_hh))
    parameters = [rnn.weight_ih, rnn.weight_hh, rnn.bias_ih, rnn.bias_hh]
    with torch.no_grad():
        for parameter, value in zip(parameters, inputs.parameters, strict=True):
            parameter.copy_(_flipped(value, dim))
    packing = Packing(inputs)
    prepared = packing.prepared(lambda x, a: cells(x, a).data, parameters)

    def comparable(result: Sequence[Tensor]) -> list[Tensor]:
        first = 1 + inputs.inputs
        return prepared.comparable([*result[:first], *(_flipped(g, dim) for g in result[first:])])

    return prepared._replace(comparable=comparable)


def _flipped(x: Tensor, dim: int) -> Tensor:
    """The block of the update gate with the other sign."""
    r, z, n = x.split(dim)
    return torch.cat([r, -z, n])


class Packing:
    """A padded batch, as an embedding gives it, packed in the call for what takes `PackedSequence`s; and the way back
    from its order, time by time. Sequences without items, which cannot be packed, are left out."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.some = inputs.items.lengths > 0
        self.lengths = inputs.items.lengths[self.some].cpu()
        rows = inputs.padded(torch.arange(inputs.grad.shape[0], device=inputs.grad.device)[:, None].double())
        self.rows = self._pack(rows).data.squeeze(1).long()  # which row each place is

    def _pack(self, padded: Tensor) -> PackedSequence:
        kept = padded if bool(self.some.all()) else padded[self.some]
        return pack_padded_sequence(kept, self.lengths, batch_first=True, enforce_sorted=False)

    def prepared(self, call: Callable[..., Tensor], parameters: list[Tensor]) -> Prepared:
        """`call` of the packed inputs gives the packed states."""
        inputs = self.inputs
        leaves = inputs.padded_leaves()
        unpad = comparing(inputs.inputs, unpadding(inputs.mask), range(1, 1 + inputs.inputs))

        def forward() -> Tensor:
            return call(*(self._pack(x if x.dim() == 3 else x.unsqueeze(2)) for x in leaves))

        def comparable(result: Sequence[Tensor]) -> list[Tensor]:
            states = torch.zeros_like(inputs.grad).index_copy(0, self.rows, result[0])
            return unpad([states, *result[1:]])

        return Prepared(forward, [*leaves, *parameters], inputs.grad[self.rows], comparable)


PROVIDERS: dict[str, Callable[[Inputs], Prepared]] = {
    "recattn": recattn,
    "eager": eager,
    "compile": compiled,
    "torch_gru": torch_gru,
    "deepctr_torch": deepctr_torch,
}
