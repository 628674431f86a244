"""Whole models of DeepCTR-Torch predict and learn the same with fused attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swap_deepctr_torch import (
    AFM,
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
@pytest.mark.parametrize(
    ("activation", "normalized"), [("sigmoid", True), ("sigmoid", False), ("Dice", False)]
)
def test_a_din_model_predicts_and_learns_the_same(activation: str, normalized: bool, training: bool) -> None:
    behaviours = ("item", "category")
    features = columns(behaviours)
    model = DIN(
        features,
        list(behaviours),
        dnn_hidden_units=(8, 4),
        att_hidden_size=(5, 3),
        att_activation=activation,
        att_weight_normalization=normalized,
        dnn_use_bn=True,
    ).train(training)
    spread(model)
    assert_model_is_the_same(model, batch_for(model, features), ["attention"])


@pytest.mark.parametrize("gru_type", ["GRU", "AIGRU", "AGRU", "AUGRU"])
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
    paths = ["interest_extractor", "interest_evolution", "interest_evolution.attention"]
    assert_model_is_the_same(model, batch_for(model, features), paths)


def assert_model_is_the_same(model: nn.Module, batch: Tensor, paths: list[str]) -> None:
    def results() -> list[Tensor]:
        out = model(batch)
        loss = nn.functional.binary_cross_entropy(out, torch.arange(BATCH).remainder(2.0)[:, None].to(out))
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return [out, *gradients]

    state = copy.deepcopy(model.state_dict())
    own = results()
    assert [(row.path, row.swapped, row.reason) for row in recattn.fuse(model)] == [
        (p, True, "") for p in paths
    ]
    model.load_state_dict(state)
    assert_equal(results(), own)
    assert own[0].std() > 0


@pytest.mark.parametrize("name", ["DIN", "DIEN", "AFM"])
def test_fit_gives_the_same_losses(name: str) -> None:
    torch.set_default_dtype(torch.float32)  # which fit casts to
    features = columns(("item",))
    build = {
        "DIN": lambda: DIN(features, ["item"], dnn_hidden_units=(8,), att_hidden_size=(5, 3), init_std=0.3),
        "DIEN": lambda: DIEN(
            features, ["item"], gru_type="AUGRU", dnn_hidden_units=(8,), att_hidden_units=(5, 3), init_std=0.3
        ),
        "AFM": lambda: AFM(features[:3], features[:3], attention_factor=3, init_std=0.3),
    }
    histories = []
    for fused in (False, True):
        model = build[name]()
        if fused:
            assert all(row.swapped for row in recattn.fuse(model))
        torch.manual_seed(4)
        names = list(model.feature_index)
        table = batch_for(model, features) if name != "AFM" else torch.randint(1, 3, (BATCH, 3)).float()
        data = {n: table[:, slice(*model.feature_index[n])].squeeze(1).numpy() for n in names}
        model.compile("sgd", "binary_crossentropy")
        labels = torch.arange(BATCH).remainder(2).float().numpy()
        fitted = model.fit(data, labels, batch_size=4, epochs=3, verbose=0, shuffle=False)
        histories.append(fitted.history["loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    assert histories[0][0] != histories[0][-1]
