"""Self-attention within histories and sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from recattn import functional, reference
from recattn.bench.histories import FROM_LOG, HistoryCase, draw_histories, longest_of, unpadding, valid
from recattn.bench.layers.self_attention import LAYERS
from recattn.bench.task import Prepared, Setting, Task, Work, comparing, leaves_of
from recattn.jagged import Jagged


@dataclass(frozen=True)
class SelfAttention(HistoryCase):
    """Args:
    heads, dim: of heads, and the width of each.
    """

    op = "self_attention"
    heads: int = 2
    dim: int = 32

    @property
    def providers(self) -> Mapping[str, Callable[[Any], Prepared]]:
        return PROVIDERS

    def task(self, setting: Setting) -> Task:
        inputs = make_inputs(self, setting)
        width = self.heads * self.dim
        pairs = float(inputs.items.lengths.double().square().sum())
        rows = inputs.items.values.shape[0]
        return Task(
            self,
            setting,
            f"{self.describe(inputs.items)}, {self.heads} heads of {self.dim}",
            {name: partial(provider, inputs) for name, provider in self.providers.items()},
            partial(formula, inputs),
            Work(4.0 * rows * width * inputs.grad.itemsize, 4.0 * pairs * width),
        )


CASES = (
    SelfAttention("bst", True, 512, 20, heads=8, dim=8),
    SelfAttention("bst-long", False, 256, 100),
    SelfAttention("bst-very-long", False, 16, 1000),
    SelfAttention("dsin", False, 2048, 10, fill=0.4, heads=8, dim=8),  # a session each
    SelfAttention("bst-log", True, 512, 50, FROM_LOG),
)
SWEPT = SelfAttention("sweep")


@dataclass(frozen=True, eq=False)
class Inputs:
    """`items`, the queries, and the keys and values, `[T, H·d]`, and dL/dout."""

    case: SelfAttention
    items: Jagged
    keys: Tensor
    values: Tensor
    max_length: int
    grad: Tensor

    @property
    def jagged(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.items.values, self.keys, self.values

    @cached_property
    def mask(self) -> Tensor:
        return valid(self.items, self.max_length)

    def _padded(self, x: Tensor) -> Tensor:
        return self.items.with_values(x).to_padded(self.max_length)

    def padded(self) -> list[Tensor]:
        """Leaves `[B, L, H·d]`."""
        return leaves_of(*map(self._padded, self.jagged))

    def of_padded(self, forward: Callable[[], Any], leaves: list[Tensor]) -> Prepared:
        comparable = comparing(3, unpadding(self.mask), (0, 1, 2, 3))
        return Prepared(forward, leaves, self._padded(self.grad), comparable)


def make_inputs(case: SelfAttention, setting: Setting) -> Inputs:
    generator = torch.Generator().manual_seed(setting.seed)
    _, items = draw_histories(case, case.heads * case.dim, setting, generator)
    keys, values, grad = (
        torch.randn(items.values.shape, generator=generator).to(setting.device, setting.dtype)
        for _ in range(3)
    )
    longest = longest_of(case, items)
    return Inputs(case, items.to(setting.device, setting.dtype), keys, values, longest, grad)


def formula(inputs: Inputs) -> Prepared:
    """In float64, one sequence after the other."""
    return _jagged(inputs, reference.self_attention, torch.float64)


def recattn(inputs: Inputs) -> Prepared:
    return _jagged(inputs, functional.self_attention, inputs.grad.dtype)


def _jagged(inputs: Inputs, function: Callable[..., Any], dtype: torch.dtype) -> Prepared:
    leaves = leaves_of(*(x.to(dtype) for x in inputs.jagged))
    forward = partial(function, *leaves, inputs.items.offsets, num_heads=inputs.case.heads)
    return Prepared(forward, leaves, inputs.grad.to(dtype))


def eager(inputs: Inputs, function: Callable[..., Any] = reference.self_attention_padded) -> Prepared:
    """Padded PyTorch code, with all scores in memory."""
    leaves, mask, heads = inputs.padded(), inputs.mask, inputs.case.heads
    return inputs.of_padded(lambda: function(*leaves, mask, num_heads=heads), leaves)


def compiled(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly these shapes."""
    return eager(inputs, torch.compile(reference.self_attention_padded, dynamic=False, fullgraph=True))


def by_pair(q: Tensor, k: Tensor, v: Tensor, pairs: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Over the valid positions only: a row for each pair of them, reduced by its query."""
    (query, key), (q, k, v) = pairs, (x.unflatten(1, (heads, -1)) for x in (q, k, v))  # [T, H, d]
    s = (q[query] * k[key]).sum(2) * q.shape[2] ** -0.5  # [P, H]
    where = query.unsqueeze(1).expand_as(s)
    top = s.new_full(q.shape[:2], -torch.inf).scatter_reduce(0, where, s.detach(), "amax")
    a = (s - top[query]).exp()
    a = a / torch.zeros_like(top).index_add(0, query, a)[query]
    return torch.zeros_like(v).index_add(0, query, a.unsqueeze(2) * v[key]).flatten(1)


def eager_jagged(inputs: Inputs, function: Callable[..., Any] = by_pair) -> Prepared:
    """PyTorch code over the valid positions only."""
    leaves, heads, items = leaves_of(*inputs.jagged), inputs.case.heads, inputs.items
    lengths, sequence = items.lengths, items.segment_ids()
    partners = lengths[sequence]  # of each position
    query = torch.arange(len(sequence), device=sequence.device).repeat_interleave(partners)
    behind = torch.arange(len(query), device=query.device) - (partners.cumsum(0) - partners)[query]
    pairs = query, items.offsets[sequence][query] + behind
    return Prepared(lambda: function(*leaves, pairs, heads), leaves, inputs.grad)


def compiled_jagged(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly this many pairs."""
    return eager_jagged(inputs, torch.compile(by_pair, dynamic=False, fullgraph=True))


def sdpa(inputs: Inputs) -> Prepared:
    """PyTorch's `scaled_dot_product_attention` on the padded batch."""
    leaves, heads = inputs.padded(), inputs.case.heads
    # Finite, so that nothing comes of an empty sequence.
    bias = torch.zeros_like(inputs.mask, dtype=inputs.grad.dtype).masked_fill(~inputs.mask, -1e4)[
        :, None, None
    ]

    def forward() -> Tensor:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in leaves)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    return inputs.of_padded(forward, leaves)


def nested(inputs: Inputs) -> Prepared:
    """PyTorch's `scaled_dot_product_attention` on nested tensors, layout torch.jagged."""
    leaves, heads, offsets = leaves_of(*inputs.jagged), inputs.case.heads, inputs.items.offsets

    def forward() -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offsets, max_seqlen=inputs.max_length)
            .unflatten(-1, (heads, -1))
            .transpose(1, 2)
            for x in leaves
        )
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2).values()

    return Prepared(forward, leaves, inputs.grad)


PROVIDERS: dict[str, Callable[[Inputs], Prepared]] = {
    "recattn": recattn,
    "eager": eager,
    "eager_jagged": eager_jagged,
    "compile": compiled,
    "compile_jagged": compiled_jagged,
    "sdpa": sdpa,
    "nested": nested,
    **LAYERS,
}
