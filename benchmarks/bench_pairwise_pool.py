"""pairwise_pool against all pairs in memory and DeepCTR-Torch's layer, forward and backward, under pytest-benchmark.

One thread on a CPU; a GPU is used where there is one. A provider that gives another result is an error, not a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn import functional
from recattn.reference import pairwise_pool_gathered

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    batch: int
    count: int  # of fields
    dim: int
    hidden: int

    @property
    def name(self) -> str:
        return f"B={self.batch} F={self.count} K={self.dim} A={self.hidden}"


CASES = [Case(2048, 10, 16, 16), Case(1024, 24, 16, 16), Case(512, 39, 16, 16), Case(256, 39, 40, 40)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def inputs(case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [
        torch.randn(case.batch, case.count, case.dim),
        torch.randn(case.hidden, case.dim) * case.dim**-0.5,
        torch.randn(case.hidden) * 0.3,
        torch.randn(case.hidden),
    ]
    return [x.to(DEVICE).requires_grad_() for x in tensors]


def recattn(*x: Tensor) -> Any:
    return functional.pairwise_pool(*x)


def gathered(*x: Tensor) -> Any:
    """As FuxiCTR and RecBole compute it."""
    return pairwise_pool_gathered(*x)


def deepctr_torch(fields: Tensor, weight: Tensor, bias: Tensor, projection: Tensor) -> Any:
    """Its layer, up to the product with a vector that it ends in."""
    utils = ModuleType("deepctr_torch.utils")  # which at its import asks the network whether it is the newest
    utils.check_version = lambda _: None  # type: ignore[attr-defined]
    sys.modules.setdefault("deepctr_torch.utils", utils)
    layers = pytest.importorskip("deepctr_torch.layers.interaction")
    layer = layers.AFMLayer(weight.shape[1], weight.shape[0], device=str(DEVICE))
    pooled = []
    layer.dropout.register_forward_hook(lambda _, __, out: pooled.append(out))
    given = {"attention_W": weight.T, "attention_b": bias, "projection_h": projection[:, None]}
    torch.func.functional_call(layer, given, (list(fields.split(1, 1)),))
    return pooled[0]


@pytest.mark.benchmark(min_rounds=3, max_time=1.0, warmup=True)
@pytest.mark.parametrize(
    "provider", [recattn, gathered, deepctr_torch], ids=lambda provider: provider.__name__
)
@pytest.mark.parametrize("mode", ["forward", "forward and backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pairwise_pool(benchmark: Any, case: Case, mode: str, provider: Callable[..., Tensor]) -> None:
    x = inputs(case)
    torch.testing.assert_close(provider(*x), gathered(*x))
    benchmark.group = f"{case.name}, {mode}"

    def run() -> None:
        with torch.set_grad_enabled(mode != "forward"):
            out = provider(*x)
        if mode != "forward":
            torch.autograd.grad(out.square().sum(), x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
