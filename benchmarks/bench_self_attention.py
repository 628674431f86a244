"""self_attention against padded batches, forward and backward, under pytest-benchmark.

One thread on a CPU; a GPU is used where there is one. A provider that gives another result is an error, not a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from recattn import functional
from recattn.jagged import Jagged, offsets_of
from recattn.reference import self_attention_padded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    batch: int
    longest: int
    width: int
    heads: int
    skewed: bool

    @property
    def name(self) -> str:
        lengths = "skewed" if self.skewed else "full"
        return f"B={self.batch} L={self.longest} {self.heads}x{self.width // self.heads} {lengths}"


CASES = [
    Case(batch, longest, width, heads, skewed)
    for batch, longest, width, heads in (
        (256, 20, 16, 2),
        (512, 50, 32, 8),
        (256, 100, 64, 2),
        (16, 1000, 64, 2),
    )
    for skewed in (True, False)
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def sequences(case: Case) -> list[Jagged]:
    """q, k and v; skewed lengths are log-normal, a fifth of the longest on average."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((case.batch,), case.longest)
    if case.skewed:
        drawn = (0.9 * torch.randn(case.batch, generator=generator)).exp()
        lengths = (drawn * 0.2 * case.longest / drawn.mean()).long().clamp(1, case.longest)
    offsets = offsets_of(lengths).to(DEVICE)
    rows = int(offsets[-1])
    return [
        Jagged(torch.randn(rows, case.width, generator=generator).to(DEVICE).requires_grad_(), offsets)
        for _ in range(3)
    ]


def fused(case: Case, inputs: list[Jagged]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    leaves = [x.values for x in inputs]
    return lambda: functional.self_attention(*leaves, inputs[0].offsets, num_heads=case.heads), leaves


def padded(inputs: list[Jagged], longest: int) -> tuple[list[Tensor], Tensor]:
    leaves = [x.to_padded(longest).detach().requires_grad_() for x in inputs]
    return leaves, torch.arange(longest, device=DEVICE) < inputs[0].lengths[:, None]


def eager(case: Case, inputs: list[Jagged]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    (q, k, v), mask = padded(inputs, case.longest)
    return lambda: self_attention_padded(q, k, v, mask, num_heads=case.heads)[mask], [q, k, v]


def torch_attention(case: Case, inputs: list[Jagged]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    leaves, mask = padded(inputs, case.longest)
    bias = (
        torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -1e9)[:, None, None]
        if case.skewed
        else None
    )

    def run() -> Tensor:
        q, k, v = (x.unflatten(2, (case.heads, -1)).transpose(1, 2) for x in leaves)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)[mask]

    return run, leaves


PROVIDERS = {"fused": fused, "eager": eager, "scaled_dot_product_attention": torch_attention}


@pytest.mark.benchmark(min_rounds=5, max_time=1.0, warmup=True)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_self_attention(benchmark: Any, case: Case, mode: str, provider: str) -> None:
    inputs = sequences(case)
    forward, leaves = PROVIDERS[provider](case, inputs)
    expected, _ = fused(case, inputs)
    torch.testing.assert_close(forward(), expected(), rtol=1e-3, atol=1e-4)
    benchmark.group = f"{case.name}, {mode}"

    def run() -> None:
        if mode == "forward":
            with torch.no_grad():
                forward()
        else:
            torch.autograd.grad(forward().sum(), leaves)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
