"""Whole models of DeepCTR-Torch predict and learn the same with fused attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swap_deepctr_torch import (
    BATCH,
    DIEN,
    DIN,
    LENGTHS,
    LONGEST,
    WIDTH,
    SparseFeat,
    VarLenSparseFeat,
    assert_equal,
    get_feature_names,
)
from torch import Tensor, nn

import recattn


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """The library makes tensors of the default dtype inside its models."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def columns(behaviours: tuple[str, ...]) -> list[Any]:
    sizes = {"user": 3, "item": 6, "category": 3}
    result: list[Any] = [SparseFeat(name, size + 1, embedding_dim=WIDTH) for name, size in sizes.items()]
    for i, name in enumerate(behaviours):
        item = SparseFeat(f"hist_{name}", sizes[name] + 1, embedding_dim=WIDTH, embedding_name=name)
        result.append(VarLenSparseFeat(item, maxlen=LONGEST, length_name="length" if i == 0 else None))
    return result


def batch_for(model: Any, features: list[Any]) -> Tensor:
    table = torch.zeros(BATCH, max(stop for _, stop in model.feature_index.values()))
    for name in get_feature_names(features):
        start, stop = model.feature_index[name]
        table[:, start:stop] = torch.randint(1, 4, (BATCH, stop - start)).to(table)
    start, stop = model.feature_index["length"]
    table[:, start:stop] = LENGTHS.clamp_max(LONGEST)[:, None].to(table)
    return table


def spread(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_din_model_predicts_and_learns_the_same(normalized: bool, training: bool) -> None:
    behaviours = ("item", "category")
    features = columns(behaviours)
    model = DIN(
        features,
        list(behaviours),
        dnn_hidden_units=(8, 4),
        att_hidden_size=(5, 3),
        att_activation="sigmoid",
        att_weight_normalization=normalized,
        dnn_use_bn=True,
    ).train(training)
    spread(model)
    assert_model_is_the_same(model, batch_for(model, features), "attention")


@pytest.mark.parametrize("gru_type", ["GRU", "AIGRU", "AUGRU"])
def test_a_dien_model_predicts_and_learns_the_same(gru_type: str) -> None:
    features = columns(("item",))
    model = DIEN(
        features,
        ["item"],
        gru_type=gru_type,
        dnn_hidden_units=(8, 4),
        att_hidden_units=(5, 3),
        att_activation="relu",
        att_weight_normalization=True,
    )
    spread(model)
    assert_model_is_the_same(model, batch_for(model, features), "interest_evolution.attention")


def assert_model_is_the_same(model: nn.Module, batch: Tensor, path: str) -> None:
    def results() -> list[Tensor]:
        out = model(batch)
        loss = nn.functional.binary_cross_entropy(out, torch.arange(BATCH).remainder(2.0)[:, None].to(out))
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return [out, *gradients]

    state = copy.deepcopy(model.state_dict())
    own = results()
    assert list(recattn.fuse(model)) == [(path, "AttentionSequencePoolingLayer", True, "")]
    model.load_state_dict(state)
    assert_equal(results(), own)
    assert own[0].std() > 0
