"""Dot-product attention of targets over their histories."""

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
from recattn.bench.layers.target_attention import LAYERS
from recattn.bench.task import Prepared, Setting, Task, Work, comparing, leaves_of
from recattn.jagged import Jagged, offsets_of


@dataclass(frozen=True)
class TargetAttention(HistoryCase):
    """Args:
    heads, dim: of heads, and the width of each.
    candidates: C, targets per history.
    """

    op = "target_attention"
    heads: int = 1
    dim: int = 64
    candidates: int = 1

    @property
    def providers(self) -> Mapping[str, Callable[[Any], Prepared]]:
        return PROVIDERS

    def task(self, setting: Setting) -> Task:
        inputs = make_inputs(self, setting)
        width = self.heads * self.dim
        rows, queries = inputs.keys.values.shape[0], inputs.query.shape[0]
        shared = f", {self.candidates} candidates each" if self.candidates > 1 else ""
        return Task(
            self,
            setting,
            f"{self.describe(inputs.keys)}{shared}, {self.heads} heads of {self.dim}",
            {name: partial(provider, inputs) for name, provider in self.providers.items()},
            partial(formula, inputs),
            Work(
                2.0 * (rows + queries) * width * inputs.query.itemsize, 4.0 * rows * self.candidates * width
            ),
        )


CASES = (
    TargetAttention("target-long", True, 512, 200),
    TargetAttention("target-short", False, 2048, 20),
    TargetAttention("target-heads", False, 512, 200, heads=4, dim=16),
    TargetAttention("target-candidates", False, 64, 200, heads=2, candidates=64),
    TargetAttention("target-log", False, 512, 100, FROM_LOG, heads=2, dim=32),
)
SWEPT = TargetAttention("sweep")


@dataclass(frozen=True, eq=False)
class Inputs:
    """`query [B·C, H·d]`, `keys` and `values [T, H·d]`, and dL/dout `[B·C, H·d]`."""

    case: TargetAttention
    query: Tensor
    keys: Jagged
    values: Tensor
    max_length: int
    grad: Tensor

    @cached_property
    def query_offsets(self) -> Tensor | None:
        if self.case.candidates == 1:
            return None
        return offsets_of(torch.full_like(self.keys.lengths, self.case.candidates))

    @cached_property
    def mask(self) -> Tensor:
        return valid(self.keys, self.max_length)

    def padded(self) -> list[Tensor]:
        """Leaves `[B, C, H·d]`, `[B, L, H·d]` twice."""
        keys, values = (
            self.keys.with_values(x).to_padded(self.max_length) for x in (self.keys.values, self.values)
        )
        return leaves_of(self.query.unflatten(0, (-1, self.case.candidates)), keys, values)

    def of_padded(self, forward: Callable[[], Tensor], leaves: list[Tensor]) -> Prepared:
        """`forward` gives `[B, C, H·d]`."""
        unpad = comparing(3, unpadding(self.mask), (2, 3))

        def comparable(result: Any) -> list[Tensor]:
            out, *gradients = result
            flat = [x.flatten(0, 1) for x in (out, *gradients[:1])]
            return unpad([*flat, *gradients[1:]])

        return Prepared(forward, leaves, self.grad.unflatten(0, (-1, self.case.candidates)), comparable)


def make_inputs(case: TargetAttention, setting: Setting) -> Inputs:
    generator = torch.Generator().manual_seed(setting.seed)
    width, to = case.heads * case.dim, (setting.device, setting.dtype)
    _, keys = draw_histories(case, width, setting, generator)
    query, grad = (torch.randn(case.batch * case.candidates, width, generator=generator) for _ in range(2))
    values = torch.randn(keys.values.shape, generator=generator)
    longest = longest_of(case, keys)
    return Inputs(case, query.to(*to), keys.to(*to), values.to(*to), longest, grad.to(*to))


def formula(inputs: Inputs) -> Prepared:
    """In float64, one history after the other."""
    return _jagged(inputs, reference.target_attention, torch.float64)


def recattn(inputs: Inputs) -> Prepared:
    return _jagged(inputs, functional.target_attention, inputs.query.dtype)


def _jagged(inputs: Inputs, function: Callable[..., Any], dtype: torch.dtype) -> Prepared:
    leaves = leaves_of(*(x.to(dtype) for x in (inputs.query, inputs.keys.values, inputs.values)))
    options = {"num_heads": inputs.case.heads, "query_offsets": inputs.query_offsets}
    forward = partial(function, *leaves, inputs.keys.offsets, **options)
    return Prepared(forward, leaves, inputs.grad.to(dtype))


def eager(inputs: Inputs, function: Callable[..., Any] = reference.target_attention_padded) -> Prepared:
    """Padded PyTorch code, with the scores in memory."""
    leaves, mask, heads = inputs.padded(), inputs.mask, inputs.case.heads
    return inputs.of_padded(lambda: function(*leaves, mask, num_heads=heads)[0], leaves)


def compiled(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly these shapes."""
    return eager(inputs, torch.compile(reference.target_attention_padded, dynamic=False, fullgraph=True))


def by_segment(query: Tensor, keys: Tensor, values: Tensor, sequence: Tensor, heads: int) -> Tensor:
    """Over the valid positions only, reduced by `sequence [T]`."""
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (query, keys, values))  # [B or T, H, d]
    s = (q[sequence] * k).sum(2) * q.shape[2] ** -0.5
    where = sequence.unsqueeze(1).expand_as(s)
    top = s.new_full(q.shape[:2], -torch.inf).scatter_reduce(0, where, s.detach(), "amax")
    a = (s - top[sequence]).exp()
    mass = torch.zeros_like(top).index_add(0, sequence, a)
    return torch.zeros_like(q).index_add(0, sequence, (a / mass[sequence]).unsqueeze(2) * v).flatten(1)


def eager_jagged(inputs: Inputs, function: Callable[..., Any] = by_segment) -> Prepared:
    """PyTorch code over the valid positions only."""
    if inputs.case.candidates > 1:
        raise NotImplementedError("a composition by segment would copy the history for each candidate")
    leaves = leaves_of(inputs.query, inputs.keys.values, inputs.values)
    sequence, heads = inputs.keys.segment_ids(), inputs.case.heads
    return Prepared(lambda: function(*leaves, sequence, heads), leaves, inputs.grad)


def compiled_jagged(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly this many positions."""
    return eager_jagged(inputs, torch.compile(by_segment, dynamic=False, fullgraph=True))


def sdpa(inputs: Inputs) -> Prepared:
    """PyTorch's `scaled_dot_product_attention` on the padded batch."""
    leaves, heads = inputs.padded(), inputs.case.heads
    mask = inputs.mask[:, None, None]

    def forward() -> Tensor:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in leaves)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    return inputs.of_padded(forward, leaves)


def nested(inputs: Inputs) -> Prepared:
    """PyTorch's `scaled_dot_product_attention` on nested tensors, layout torch.jagged, of targets and of histories."""
    leaves, heads = leaves_of(inputs.query, inputs.keys.values, inputs.values), inputs.case.heads
    targets = inputs.query_offsets
    if targets is None:
        targets = torch.arange(inputs.query.shape[0] + 1, device=inputs.query.device)
    layouts = ((targets, inputs.case.candidates), *[(inputs.keys.offsets, inputs.max_length)] * 2)

    def forward() -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offsets, max_seqlen=longest)
            .unflatten(-1, (heads, -1))
            .transpose(1, 2)
            for x, (offsets, longest) in zip(leaves, layouts, strict=True)
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
