"""DIN's activation unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recattn import functional, reference
from recattn.bench.histories import FROM_LOG, HistoryCase, draw_histories, longest_of, unpadding, valid
from recattn.bench.layers.activation_unit import LAYERS
from recattn.bench.peers import import_peer
from recattn.bench.task import Prepared, Setting, Task, Work, comparing, leaves_of
from recattn.jagged import Jagged, offsets_of, pack
from recattn.reference.activation_unit import activation_unit_padded, hidden_activation, mlp

KINKED = ("relu", "leaky_relu", "prelu")


@dataclass(frozen=True)
class ActivationUnit(HistoryCase):
    """Args:
    dim: D.
    hidden: widths of the hidden layers.
    activation, normalize: as in `recattn.functional.activation_unit`.
    candidates: C, targets per history.
    """

    op = "activation_unit"
    dim: int = 64
    hidden: tuple[int, ...] = (80, 40)
    activation: str = "sigmoid"
    normalize: str = "softmax"
    candidates: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """What the operator and its reference take by keyword."""
        return {"activation": self.activation, "normalize": self.normalize}

    @property
    def providers(self) -> Mapping[str, Callable[[Any], Prepared]]:
        return PROVIDERS

    def task(self, setting: Setting) -> Task:
        inputs = make_inputs(self, setting)
        rows, queries = inputs.keys.values.shape[0], inputs.query.shape[0]
        layers = 2.0 * sum(n * m for n, m in pairwise((self.dim, *self.hidden, 1)))
        io = (rows + 2.0 * queries) * self.dim * inputs.query.itemsize
        hidden = ", ".join(map(str, self.hidden))
        shared = f", {self.candidates} candidates each" if self.candidates > 1 else ""
        return Task(
            self,
            setting,
            f"{self.describe(inputs.keys)}{shared}, D={self.dim}, hidden ({hidden}), {self.activation},"
            f" {self.normalize}",
            {name: partial(provider, inputs) for name, provider in self.providers.items()},
            partial(formula, inputs),
            Work(io, rows * self.candidates * (layers + 2.0 * self.dim)),
            kinked=self.activation in KINKED,
        )


CASES = (
    ActivationUnit("classic", True, 512, 100),
    ActivationUnit("classic-full", False, 512, 100, "equal"),
    ActivationUnit("narrow", False, 1024, 50, dim=32),
    ActivationUnit("long", True, 64, 1000),
    ActivationUnit("small", True, 256, 20, dim=16),
    ActivationUnit("small-full", True, 256, 20, "equal", dim=16),
    # The attention of the public leaderboards' best DINs.
    ActivationUnit("wide", False, 1024, 100, dim=128, hidden=(512, 256), activation="relu"),
    ActivationUnit("candidates", False, 8, 200, candidates=100),
    ActivationUnit("log-last-100", True, 512, 100, FROM_LOG),
    ActivationUnit("log-last-50", True, 1024, 50, FROM_LOG, dim=32),
    ActivationUnit("log-whole", True, 256, None, FROM_LOG),
)
SWEPT = ActivationUnit("sweep")


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a case, leaves without gradients.

    Args:
        query: `[B·C, D]`.
        keys: the histories, `[T, D]`.
        max_length: L, what `padded` is padded to.
        weights, biases: as in `nn.Linear`, `[H1, 4·D]`, ..., `[1, Hn]` and `[H1]`, ..., `[1]`.
        grad: dL/dout, `[B·C, D]`.
    """

    case: ActivationUnit
    query: Tensor
    keys: Jagged
    max_length: int
    weights: list[Tensor]
    biases: list[Tensor]
    grad: Tensor

    @cached_property
    def padded(self) -> Tensor:
        """`[B, L, D]`, zero behind the end of a history."""
        return self.keys.to_padded(self.max_length)

    @cached_property
    def mask(self) -> Tensor:
        """`[B, L]` bool."""
        return valid(self.keys, self.max_length)

    @cached_property
    def query_offsets(self) -> Tensor | None:
        if self.case.candidates == 1:
            return None
        return offsets_of(torch.full_like(self.keys.lengths, self.case.candidates))

    @cached_property
    def pairs(self) -> tuple[Jagged, Tensor | None]:
        """Of the history of each target its rows, `[P]`, and which row of the histories each is; None if each is its
        own."""
        if self.case.candidates == 1:
            return self.keys, None
        place = torch.arange(self.max_length, device=self.query.device)
        mask = self.mask.repeat_interleave(self.case.candidates, 0)
        rows, offsets = pack(mask)
        begin = self.keys.offsets[:-1].repeat_interleave(self.case.candidates, 0)
        rows = (begin[:, None] + place).flatten()[rows[: int(offsets[-1])]]
        return Jagged(rows, offsets), rows

    def leaves(self, keys: Tensor) -> list[Tensor]:
        return leaves_of(self.query, keys, *self.weights, *self.biases)

    def split(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Query, keys, weights and biases."""
        query, keys, *layers = leaves
        return query, keys, layers[: len(self.weights)], layers[len(self.weights) :]

    def jagged(self, forward: Callable[[], Any], leaves: Sequence[Tensor]) -> Prepared:
        return Prepared(forward, leaves, self.grad, comparing(2))

    def of_padded(self, forward: Callable[[], Any], leaves: Sequence[Tensor]) -> Prepared:
        return Prepared(forward, leaves, self.grad, comparing(2, unpadding(self.mask), (2,)))


def make_inputs(case: ActivationUnit, setting: Setting) -> Inputs:
    """The tensors of a case; the same for the same seed, up to their dtype. Layers start as `nn.Linear` does."""
    generator = torch.Generator().manual_seed(setting.seed)
    query, keys = draw_histories(case, case.dim, setting, generator)
    if case.candidates > 1:
        query = torch.randn(case.batch * case.candidates, case.dim, generator=generator)
    layers = _layers([4 * case.dim, *case.hidden, 1], setting.seed)
    grad = torch.randn(query.shape, generator=generator)
    to = (setting.device, setting.dtype)
    return Inputs(
        case,
        query=query.to(*to),
        keys=keys.to(*to),
        max_length=longest_of(case, keys),
        weights=[layer.weight.detach().to(*to) for layer in layers],
        biases=[layer.bias.detach().to(*to) for layer in layers],
        grad=grad.to(*to),
    )


def _layers(sizes: Sequence[int], seed: int) -> list[nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [nn.Linear(n, m) for n, m in pairwise(sizes)]


def formula(inputs: Inputs) -> Prepared:
    """In float64, one history after the other."""
    leaves = [x.double() for x in (inputs.query, inputs.keys.values, *inputs.weights, *inputs.biases)]
    query, keys, weights, biases = inputs.split(leaves := leaves_of(*leaves))
    call = partial(reference.activation_unit, query_offsets=inputs.query_offsets, **inputs.case.options)
    forward = partial(call, query, keys, inputs.keys.offsets, weights, biases)
    return inputs.jagged(forward, leaves)._replace(grad=inputs.grad.double())


def recattn(inputs: Inputs) -> Prepared:
    """The operator, on histories that lie end to end."""
    query, keys, weights, biases = inputs.split(leaves := inputs.leaves(inputs.keys.values))
    call = partial(functional.activation_unit, query_offsets=inputs.query_offsets, **inputs.case.options)
    return inputs.jagged(partial(call, query, keys, inputs.keys.offsets, weights, biases), leaves)


def recattn_padded(inputs: Inputs) -> Prepared:
    """The operator, on a padded batch, which it reads in place."""
    query, padded, weights, biases = inputs.split(leaves := inputs.leaves(inputs.padded))
    mask, groups = inputs.mask, inputs.query_offsets

    def forward() -> Any:
        rows, offsets = pack(mask)
        where: dict[str, Any] = {"rows": rows, "unique_rows": True, "query_offsets": groups}
        keys = padded.flatten(0, 1)
        return functional.activation_unit(
            query, keys, offsets, weights, biases, **where, **inputs.case.options
        )

    return inputs.of_padded(forward, leaves)


def eager(inputs: Inputs, function: Callable[..., Any] = activation_unit_padded) -> Prepared:
    """Padded PyTorch code, as ranking libraries write it; histories are repeated for each of their candidates."""
    query, padded, weights, biases = inputs.split(leaves := inputs.leaves(inputs.padded))
    count, options = inputs.case.candidates, inputs.case.options
    mask = inputs.mask.repeat_interleave(count, 0)

    def forward() -> Any:
        keys = padded.repeat_interleave(count, 0) if count > 1 else padded
        return function(query, keys, mask, weights, biases, **options)

    return inputs.of_padded(forward, leaves)


def compiled(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly these shapes."""
    return eager(inputs, torch.compile(activation_unit_padded, dynamic=False, fullgraph=True))


def by_segment(
    query: Tensor,
    keys: Tensor,
    sequence: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    normalize: str,
) -> Tensor:
    """Over the valid positions only: copy the queries, concatenate, reduce by `sequence [T]`."""
    a = _scores(query, keys, sequence, weights, biases, activation)
    if normalize == "softmax":
        top = a.new_full(query.shape[:1], -torch.inf).scatter_reduce(0, sequence, a.detach(), "amax")
        a = (a - top[sequence]).exp()
        a = a / a.new_zeros(query.shape[:1]).index_add(0, sequence, a)[sequence]
    return torch.zeros_like(query).index_add(0, sequence, a.unsqueeze(1) * keys)


def _scores(
    query: Tensor,
    keys: Tensor,
    sequence: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """`[T]`."""
    act = hidden_activation(activation, None)
    return mlp(query[sequence], keys.unsqueeze(1), weights, biases, functional.FEATURES, act).flatten()


def eager_jagged(inputs: Inputs, function: Callable[..., Any] = by_segment) -> Prepared:
    """PyTorch code over the valid positions only."""
    query, keys, weights, biases = inputs.split(leaves := inputs.leaves(inputs.keys.values))
    targets, rows = inputs.pairs
    sequence, case = targets.segment_ids(), inputs.case

    def forward() -> Any:
        items = keys if rows is None else keys[rows]
        return function(query, items, sequence, weights, biases, case.activation, case.normalize)

    return inputs.jagged(forward, leaves)


def compiled_jagged(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly this many positions."""
    return eager_jagged(inputs, torch.compile(by_segment, dynamic=False, fullgraph=True))


def nested(inputs: Inputs) -> Prepared:
    """PyTorch's nested tensors, layout torch.jagged."""
    query, keys, weights, biases = inputs.split(leaves := inputs.leaves(inputs.keys.values))
    case, offsets = inputs.case, inputs.keys.offsets
    if case.candidates > 1:
        raise NotImplementedError("nested tensors have no dimension for candidates of one history")
    act = hidden_activation(case.activation, None)

    def forward() -> Tensor:
        k = torch.nested.nested_tensor_from_jagged(keys, offsets, max_seqlen=inputs.max_length)
        q = torch.zeros_like(k) + query.unsqueeze(1)
        x = torch.cat([q, k, q - k, q * k], -1)
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = nn.functional.linear(act(layer - 1, x) if layer else x, weight, bias)
        a = torch.softmax(x, 1) if case.normalize == "softmax" else x
        return (a * k).sum(1)

    return inputs.jagged(forward, leaves)


def fbgemm(inputs: Inputs) -> Prepared:
    """fbgemm's jagged softmax and product, around the same layers.

    Raises:
        ModuleNotFoundError: where it is not installed.
    """
    import_peer("fbgemm_gpu")
    ops = torch.ops.fbgemm
    query, keys, weights, biases = inputs.split(leaves := inputs.leaves(inputs.keys.values))
    targets, rows = inputs.pairs
    sequence, case, longest = targets.segment_ids(), inputs.case, inputs.max_length

    def forward() -> Tensor:
        items = keys if rows is None else keys[rows]
        a = _scores(query, items, sequence, weights, biases, case.activation).unsqueeze(1)
        if case.normalize == "softmax":
            a, _ = ops.jagged_softmax(a, targets.offsets, longest)
        attention = ops.jagged_to_padded_dense(a, [targets.offsets], [longest], 0.0).squeeze(2)
        return ops.batched_dense_vec_jagged_2d_mul(attention, items, targets.offsets)

    return inputs.jagged(forward, leaves)


PROVIDERS: dict[str, Callable[[Inputs], Prepared]] = {
    "recattn": recattn,
    "recattn_padded": recattn_padded,
    "eager": eager,
    "eager_jagged": eager_jagged,
    "compile": compiled,
    "compile_jagged": compiled_jagged,
    "nested": nested,
    "fbgemm": fbgemm,
    **LAYERS,
}
