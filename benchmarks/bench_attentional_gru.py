"""attentional_gru against torch.nn.GRU on packed sequences and DeepCTR-Torch's cells, under pytest-benchmark.

One thread on a CPU; a GPU is used where there is one. Lengths are log-normal, as in logs of clicks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import recattn
from recattn import Jagged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(512, 100, 36), (1024, 50, 32), (256, 100, 64), (64, 300, 64)]  # batch, longest history, width
KINDS = ["gru", "agru", "augru"]
MODES = ["forward", "forward+backward"]
PROVIDERS = ["recattn", "library"]


class Inputs(NamedTuple):
    items: Jagged
    scores: Tensor
    lengths: Tensor


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_inputs(batch: int, longest: int, width: int) -> Inputs:
    torch.manual_seed(0)
    lengths = (0.9 * torch.randn(batch) + 2.6).exp().long().clamp(1, longest)
    items = Jagged.from_lengths(torch.randn(int(lengths.sum()), width), lengths).to(DEVICE)
    scores = torch.rand(items.values.shape[0], device=DEVICE)
    return Inputs(items.with_values(items.values.requires_grad_()), scores.requires_grad_(), lengths)


def ours(inputs: Inputs, kind: str) -> Callable[[], Tensor]:
    width = inputs.items.values.shape[1]
    layer = recattn.nn.AttentionalGRU(width, width, kind=kind, device=DEVICE)
    attention = None if kind == "gru" else inputs.items.with_values(inputs.scores)
    return lambda: layer(inputs.items, attention)[0].values


def library(inputs: Inputs, kind: str) -> Callable[[], Tensor]:
    """As a DIEN of these libraries calls them: padded embeddings, packed for the recurrence."""
    width = inputs.items.values.shape[1]
    padded = inputs.items.to_padded().detach().requires_grad_()
    scores = inputs.items.with_values(inputs.scores).to_padded().detach().unsqueeze(2).requires_grad_()

    def packed(x: Tensor) -> Any:
        return pack_padded_sequence(x, inputs.lengths, batch_first=True, enforce_sorted=False)

    if kind == "gru":
        gru = nn.GRU(width, width, batch_first=True, device=DEVICE)
        return lambda: gru(packed(padded))[0].data
    utils = ModuleType("deepctr_torch.utils")  # which at its import asks the network whether it is the newest
    utils.check_version = lambda _: None  # type: ignore[attr-defined]
    sys.modules.setdefault("deepctr_torch.utils", utils)
    layers = pytest.importorskip("deepctr_torch.layers.sequence")
    cells = layers.DynamicGRU(width, width, gru_type=kind.upper()).to(DEVICE)
    for parameter in cells.parameters():
        nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)
    return lambda: cells(packed(padded), packed(scores)).data


@pytest.mark.benchmark(min_rounds=3, max_time=1.0, warmup=True)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attentional_gru(
    benchmark: Any, shape: tuple[int, int, int], kind: str, mode: str, provider: str
) -> None:
    inputs = make_inputs(*shape)
    call = {"recattn": ours, "library": library}[provider](inputs, kind)
    backward = mode == "forward+backward"
    benchmark.group = f"{shape}, {kind}, {mode}"

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = call()
        if backward:
            out.sum().backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
