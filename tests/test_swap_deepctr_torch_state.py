"""A fused layer of DeepCTR-Torch stays the same object, with the same state."""

from __future__ import annotations

import copy

import pytest
import torch
from swap_deepctr_torch import LENGTHS, Pooling, assert_equal, pooling, query_and_keys, run
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


@pytest.mark.parametrize("weight_normalization", [True, False])
def test_torch_compile_takes_the_fused_layer(weight_normalization: bool) -> None:
    query, keys = query_and_keys()
    layer = pooling(weight_normalization=weight_normalization)
    expected = run(layer, query, keys, LENGTHS)
    recattn.fuse(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    assert_equal(run(compiled, query, keys, LENGTHS), expected)
