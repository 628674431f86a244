"""Whatever the library, a fused layer stays the same object with the same state: hooks, optimizers, wrappers, moves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from swap_cases import assert_same, assert_state_survives
from swap_layers import LAYERS, Example, example
from torch import Tensor, nn

import recattn

pytestmark = pytest.mark.parametrize("name", LAYERS)
EQUAL = 1e-5
ROUNDED = 10.0  # in float32; what is exact in float64 is in test_swap_options.py


def trainable(name: str) -> Example:
    found = example(name, grad=True)
    if not list(found.layer.parameters()):
        pytest.skip("has no parameters")
    return found


def fused(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    report = recattn.fuse(layer)
    assert report
    assert all(row.swapped for row in report), report
    return layer


def loss(found: Example, layer: nn.Module) -> Tensor:
    return found.out(layer).square().mean()


def gradients(layer: nn.Module) -> list[Tensor]:
    return [p.grad for p in layer.parameters() if p.grad is not None]


def test_checkpoints_copies_pickles_and_parameters(name: str) -> None:
    found = example(name, grad=True)
    with torch.no_grad():  # AFMLayer of DeepCTR-Torch keeps its weights with their graph, which has no copies
        assert_state_survives(nn.ModuleDict({"layer": found.layer}), lambda m: found.out(m["layer"]))  # type: ignore[index]


@pytest.mark.parametrize("training", [True, False])
def test_train_and_eval_are_those_of_the_library(name: str, training: bool) -> None:
    found = example(name, grad=True)
    own, twin = found.layer, fused(found.layer)
    for layer in (own, twin):
        layer.train(not training).train(training)
        assert {m.training for m in layer.modules()} == {training}
        loss(found, layer).backward()
    assert_same([found.out(twin)], [found.out(own)], EQUAL)
    assert_same(gradients(twin), gradients(own), EQUAL, least=ROUNDED)
    assert_same(list(twin.buffers()), list(own.buffers()), EQUAL)


def test_hooks_of_the_layer_run(name: str) -> None:
    found = example(name, grad=True)
    calls: list[str] = []
    layer = found.layer
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    recattn.fuse(layer)
    loss(found, layer).backward()
    assert calls == ["before", "after", "backward"]


def test_an_optimizer_goes_on_with_its_state(name: str) -> None:
    found = trainable(name)
    own, twin = found.layer, copy.deepcopy(found.layer)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (own, twin)]
    for step in range(3):
        if step == 1:
            recattn.fuse(twin)
        for layer, optimizer in zip((own, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss(found, layer).backward()
            optimizer.step()
    assert set(optimizers[1].state) <= set(twin.parameters())
    own_state, state = (o.state_dict()["state"] for o in optimizers)
    assert list(state) == list(own_state)
    assert_same(list(twin.parameters()), list(own.parameters()), 10 * EQUAL)
    optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_moves_to_another_device_and_back(name: str) -> None:
    found = example(name, grad=True)
    layer = fused(found.layer).eval()
    expected, state, kind = found.out(layer), copy.deepcopy(layer.state_dict()), type(layer)
    layer.to("meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu").load_state_dict(state)
    assert type(layer) is kind
    assert torch.equal(found.out(layer), expected)


def test_moves_to_another_dtype(name: str) -> None:
    found = example(name, grad=True)
    own, twin = found.layer, fused(found.layer)
    wide = found.to(torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of which some libraries make tensors
    try:
        try:
            expected = wide.out(own.to(torch.float64))
        except RuntimeError as error:
            pytest.skip(f"the library's own code takes float32 alone: {error}")
        out = wide.out(twin.to(torch.float64))
    finally:
        torch.set_default_dtype(before)
    assert out.dtype == expected.dtype
    assert_same([out], [expected], EQUAL if expected.dtype == torch.float32 else 1e-10)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_trains_it(name: str) -> None:
    found = trainable(name)
    own, twin = found.layer, fused(found.layer)
    parallel = nn.parallel.DistributedDataParallel(twin, find_unused_parameters=True)
    for layer in (own, parallel):
        loss(found, layer).backward()
    assert_same(gradients(twin), gradients(own), EQUAL, least=ROUNDED)
    if next(twin.buffers(), None) is not None:
        assert_same(list(twin.buffers()), list(own.buffers()), EQUAL)
