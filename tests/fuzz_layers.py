"""Random calls of layers: the same histories end to end, nested, padded, padded with holes, and as ids of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_cases import TOLERANCE, error_of, lengths
from hypothesis import strategies as st
from torch import Tensor

from recattn import Jagged, nn
from recattn.jagged import offsets_of

DIM = 6
DTYPE = torch.float64
Call = Callable[
    ..., Tensor
]  # layer, histories, how they are laid out -> what it gives, `[B, ...]` or `[T, ...]`


def of_query(layer: Any, query: Tensor, keys: Any, **layout: Any) -> Tensor:
    return layer(query, keys, **layout)


def of_items(layer: Any, _: Tensor, keys: Any, **layout: Any) -> Tensor:
    """What self-attention gives, end to end as the items lie."""
    if isinstance(keys, Tensor) and keys.is_nested:
        keys = Jagged.from_nested(keys)
    out = layer(keys, **layout)
    return out.values if isinstance(out, Jagged) else Jagged.from_padded(out, **layout).values


def of_scored(layer: Any, _: Tensor, keys: Any, **layout: Any) -> Tensor:
    """The last states, where each item's attention is its first element."""
    if isinstance(keys, Jagged):
        scores: Any = keys.with_values(keys.values[:, 0])
    elif keys.is_nested:
        history = Jagged.from_nested(keys)
        scores = history.with_values(history.values[:, 0]).to_nested()
    else:
        scores = keys[:, :, 0]
    return layer(keys, scores, **layout)[1]


@dataclass(frozen=True)
class LayerExample:
    layer: Any
    call: Call
    lengths: tuple[int, ...]
    layout: str
    slack: int
    seed: int

    def check(self) -> None:
        """Raises unless the layout changes neither the result nor any gradient, whatever is in the padding."""
        generator = torch.Generator().manual_seed(self.seed)
        items = torch.randn(sum(self.lengths), DIM, generator=generator, dtype=DTYPE)
        query = torch.randn(len(self.lengths), DIM, generator=generator, dtype=DTYPE)
        offsets = offsets_of(torch.tensor(self.lengths, dtype=torch.int64))
        expected = self.run(query, items, lambda x: (Jagged(x, offsets), {}))
        got = self.run(query, items, lambda x: self.laid_out(x, offsets, generator))
        for name, result in got.items():
            error = error_of(result, expected[name])
            assert error <= TOLERANCE[DTYPE], f"{name}: error {error:.1e} in {self}"

    def run(self, query: Tensor, items: Tensor, lay_out: Callable[[Tensor], Any]) -> dict[str, Tensor]:
        leaves = {"query": query.clone().requires_grad_(), "items": items.clone().requires_grad_()}
        keys, layout = lay_out(leaves["items"])
        out = self.call(self.layer, leaves["query"], keys, **layout)
        if self.call is of_items:
            out = out[: len(items)]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
        leaves |= dict(self.layer.named_parameters())
        total = (out * weight).sum()
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        results = {"out": out.detach()}
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            results[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
        return results

    def laid_out(
        self, items: Tensor, offsets: Tensor, generator: torch.Generator
    ) -> tuple[Any, dict[str, Any]]:
        history = Jagged(items, offsets)
        if self.layout == "slack":
            slack = torch.full((self.slack, DIM), torch.nan, dtype=DTYPE)
            return Jagged(torch.cat([items, slack]), offsets.int()), {}
        if self.layout == "nested":
            return history.to_nested(), {}
        longest = max(self.lengths, default=0) + self.slack
        if self.layout == "lengths":
            return history.to_padded(longest, padding_value=torch.nan), {"lengths": offsets.diff()}
        # As many valid positions per row as there are items, anywhere.
        mask = torch.zeros(len(self.lengths), longest, dtype=torch.bool)
        for row, length in zip(mask, self.lengths, strict=True):
            row[torch.randperm(longest, generator=generator)[:length]] = True
        padded = torch.full((*mask.shape, DIM), torch.nan, dtype=DTYPE).masked_scatter(
            mask.unsqueeze(2), items
        )
        return padded, {"mask": mask}


@st.composite
def examples(draw: st.DrawFn, make: Callable[[st.DrawFn], Any], call: Call) -> LayerExample:
    torch.manual_seed(0)
    some = draw(lengths(False))
    layouts = ("slack", "lengths", "mask") if not some else ("slack", "lengths", "mask", "nested")
    return LayerExample(
        make(draw).double(),
        call,
        some,
        draw(st.sampled_from(layouts)),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 2**31)),
    )


def unit(draw: st.DrawFn) -> Any:
    return nn.ActivationUnit(
        DIM,
        (5, 4),
        activation=draw(st.sampled_from(("sigmoid", "prelu", "dice"))),
        normalize=draw(st.sampled_from(("softmax", "none"))),
    )


def target(draw: st.DrawFn) -> Any:
    score = draw(st.sampled_from(("dot", "scaled_dot", "bilinear", "additive", "concat", "mlp")))
    heads = draw(st.sampled_from((1, 2, 3))) if score in ("dot", "scaled_dot", "bilinear") else 1
    return nn.TargetAttention(DIM, score, num_heads=heads)


def own(draw: st.DrawFn) -> Any:
    causal, hide_self = draw(st.booleans()), draw(st.booleans())
    heads = draw(st.sampled_from((1, 2, 3)))
    return nn.SelfAttention(DIM, heads, causal=causal, hide_self=hide_self, buckets=draw(st.integers(0, 5)))


def recurrent(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(("agru", "aigru", "augru")))
    return nn.AttentionalGRU(DIM, 4, kind=kind, reset_after=draw(st.booleans()))


LAYERS: dict[str, Callable[[], st.SearchStrategy[LayerExample]]] = {
    "ActivationUnit": lambda: examples(unit, of_query),
    "TargetAttention": lambda: examples(target, of_query),
    "SelfAttention": lambda: examples(own, of_items),
    "AttentionalGRU": lambda: examples(recurrent, of_scored),
}
