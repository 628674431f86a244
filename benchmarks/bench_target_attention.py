"""target_attention against padded PyTorch code, forward and backward, under pytest-benchmark.

One thread on a CPU; a GPU is used where there is one. Padded code gets its padding for free: it is made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn import Jagged, functional
from recattn.jagged import offsets_of
from recattn.reference import target_attention_padded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    longest: int  # lengths are log-normal, mean about a third of it
    heads: int
    dim: int
    candidates: int = 0  # that share a history, or 0 for one target each


CASES = [
    Case("one target, long", 512, 200, 1, 64),
    Case("one target, short", 2048, 20, 1, 64),
    Case("one target, 4 heads", 512, 200, 4, 16),
    Case("64 candidates", 64, 200, 2, 64, 64),
    Case("5 candidates", 256, 200, 2, 64, 5),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def inputs(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(0)
    lengths = torch.exp(torch.randn(case.batch)).mul_(case.longest / 5).long().clamp_(1, case.longest)
    count, width = case.batch * (case.candidates or 1), case.heads * case.dim
    history = Jagged.from_lengths(torch.randn(int(lengths.sum()), 2 * width), lengths)
    keys, values = history.values.split(width, 1)
    tensors = {"query": torch.randn(count, width), "keys": keys.contiguous(), "values": values.contiguous()}
    padded = history.to_padded(case.longest).split(width, 2)
    tensors |= {
        "offsets": history.offsets,
        "query_offsets": offsets_of(torch.full_like(lengths, case.candidates)),
        "padded_query": tensors["query"].unflatten(0, (case.batch, -1)),
        "padded_keys": padded[0].contiguous(),
        "padded_values": padded[1].contiguous(),
        "mask": torch.arange(case.longest) < lengths[:, None],
    }
    return {name: t.to(DEVICE).requires_grad_(t.is_floating_point()) for name, t in tensors.items()}


def recattn(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [x["query"], x["keys"], x["values"]]
    groups = x["query_offsets"] if case.candidates else None
    out = functional.target_attention(*leaves, x["offsets"], num_heads=case.heads, query_offsets=groups)
    assert isinstance(out, Tensor)
    return out, leaves


def eager(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [x["padded_query"], x["padded_keys"], x["padded_values"]]
    return target_attention_padded(*leaves, x["mask"], num_heads=case.heads)[0], leaves


def sdpa(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [x["padded_query"], x["padded_keys"], x["padded_values"]]
    q, k, v = (t.unflatten(2, (case.heads, -1)).transpose(1, 2) for t in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=x["mask"][:, None, None])
    return out, leaves


@pytest.mark.benchmark(min_rounds=3, max_time=1.0, warmup=True)
@pytest.mark.parametrize("provider", [recattn, eager, sdpa], ids=lambda provider: provider.__name__)
@pytest.mark.parametrize("mode", ["forward", "forward and backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_target_attention(benchmark: Any, case: Case, mode: str, provider: Callable[..., Any]) -> None:
    x = inputs(case)
    benchmark.group = f"{case.name}, {mode}"

    def run() -> None:
        with torch.set_grad_enabled(mode != "forward"):
            out, leaves = provider(case, x)
        if mode != "forward":
            torch.autograd.grad(out.square().sum(), leaves)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
