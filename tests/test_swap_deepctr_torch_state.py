"""A fused layer of DeepCTR-Torch stays the same object, with the same state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from swap_deepctr_torch import LENGTHS, FusedPooling, Pooling, assert_equal, pooling, query_and_keys, run
from torch import nn

import recattn


def test_the_object_its_parameters_and_state_dict_stay() -> None:
    layer = pooling(activation="prelu")
    model = nn.Sequential(layer)
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    recattn.fuse(model)
    assert model[0] is layer
    assert isinstance(layer, Pooling)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_state_loads_across_fuse_and_unfuse() -> None:
    query, keys = query_and_keys()
    trained, fused = pooling(), pooling()
    recattn.fuse(fused)
    fused.load_state_dict(trained.state_dict())
    expected = trained(query, keys, LENGTHS)
    torch.testing.assert_close(fused(query, keys, LENGTHS), expected)
    fresh = pooling()
    fresh.load_state_dict(fused.state_dict())
    assert torch.equal(fresh(query, keys, LENGTHS), expected)


def test_an_optimizer_made_before_trains_the_fused_layer() -> None:
    query, keys = query_and_keys()
    own = pooling()
    fused = copy.deepcopy(own)
    results = []
    for layer in (own, fused):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        if layer is fused:
            recattn.fuse(layer)
        for _ in range(3):
            optimizer.zero_grad()
            layer(query, keys, LENGTHS).square().sum().backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in layer.parameters()])
    assert_equal(results[1], results[0])


def test_hooks_of_the_layer_run() -> None:
    layer = pooling()
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    recattn.fuse(layer)
    query, keys = query_and_keys()
    layer(query.requires_grad_(), keys, LENGTHS).sum().backward()
    assert calls == ["before", "after", "backward"]


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_copies_are_fused_and_can_be_unfused(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    query, keys = query_and_keys()
    model = nn.ModuleDict({"pool": pooling(weight_normalization=True)})
    expected = model["pool"](query, keys, LENGTHS)
    recattn.fuse(model)
    twin = duplicate(model)
    assert type(twin["pool"]) is FusedPooling  # type: ignore[index]
    assert twin["pool"].local_att.dense.weight is not model["pool"].local_att.dense.weight  # type: ignore[index]
    torch.testing.assert_close(twin["pool"](query, keys, LENGTHS), expected)  # type: ignore[index]
    assert torch.equal(recattn.unfuse(twin)["pool"](query, keys, LENGTHS), expected)  # type: ignore[index]


def test_to_and_train_reach_the_parameters() -> None:
    layer = pooling()
    recattn.fuse(layer)
    layer.to(torch.float32).eval()
    assert not layer.local_att.dnn.training
    query, keys = (x.float() for x in query_and_keys())
    assert layer(query, keys, LENGTHS).dtype == torch.float32


def test_unfuse_restores_class_and_output_bitwise() -> None:
    query, keys = query_and_keys()
    model = nn.Sequential(pooling(weight_normalization=True))
    before, attributes = run(model[0], query, keys, LENGTHS), set(vars(model[0]))
    recattn.fuse(model)
    assert recattn.unfuse(model) is model
    assert type(model[0]) is Pooling
    assert set(vars(model[0])) == attributes
    for a, b in zip(run(model[0], query, keys, LENGTHS), before, strict=True):
        assert torch.equal(a, b)


def test_distributed_data_parallel_trains_the_fused_layer(tmp_path: Path) -> None:
    query, keys = query_and_keys()
    own = pooling(activation="dice")
    fused = copy.deepcopy(own)
    recattn.fuse(fused)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(fused)
        parallel(query, keys, LENGTHS).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    own(query, keys, LENGTHS).square().sum().backward()
    grads = [[p.grad for p in layer.parameters() if p.grad is not None] for layer in (fused, own)]
    assert_equal(grads[0], grads[1])


@pytest.mark.parametrize("weight_normalization", [True, False])
def test_torch_compile_takes_the_fused_layer(weight_normalization: bool) -> None:
    query, keys = query_and_keys()
    layer = pooling(weight_normalization=weight_normalization)
    expected = run(layer, query, keys, LENGTHS)
    recattn.fuse(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    assert_equal(run(compiled, query, keys, LENGTHS), expected)
