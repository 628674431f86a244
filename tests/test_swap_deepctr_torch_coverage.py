"""Layers of DeepCTR-Torch that the fused operator would not compute exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swap_deepctr_torch import LENGTHS, LONGEST, WIDTH, Dice, Pooling, pooling, query_and_keys
from torch import Tensor, nn

import recattn


def _with(change: Callable[[Pooling], object], **options: Any) -> Pooling:
    layer = pooling(**options)
    change(layer)
    return layer


class Subclass(Pooling):
    def forward(self, *arguments: Any) -> Tensor:
        return 2 * super().forward(*arguments)


def _hook(*_: Any) -> None:
    return None


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "unknown activation": (
        lambda: pooling(activation=nn.Softplus),
        "local_att.dnn.activation_layers.0: Softplus is not built",
    ),
    "approximate gelu": (
        lambda: _with(
            lambda layer: layer.local_att.dnn.activation_layers.__setitem__(1, nn.GELU(approximate="tanh")),
            activation=nn.GELU,
        ),
        "local_att.dnn.activation_layers.1: GELU(approximate='tanh') is not built",
    ),
    "slopes per position": (
        lambda: _with(
            lambda layer: layer.local_att.dnn.activation_layers.__setitem__(0, nn.PReLU(LONGEST)),
            activation="prelu",
        ),
        "local_att.dnn.activation_layers.0: PReLU of a 3-D input has a slope per position, not per unit",
    ),
    "different slopes": (
        lambda: _with(
            lambda layer: layer.local_att.dnn.activation_layers.__setitem__(0, nn.LeakyReLU(0.5)),
            activation=nn.LeakyReLU,
        ),
        "different activations of hidden layers, LeakyReLU(negative_slope=0.5), LeakyReLU(negative_slope=0.01)",
    ),
    "batch norm": (
        lambda: _with(lambda layer: setattr(layer.local_att.dnn, "use_bn", True)),
        "local_att.dnn: use_bn is not built",
    ),
    "another linear": (
        lambda: _with(lambda layer: nn.utils.parametrizations.weight_norm(layer.local_att.dnn.linears[0])),
        "local_att.dnn.linears.0: ParametrizedLinear is not built",
    ),
    "inner hook": (
        lambda: _with(lambda layer: layer.local_att.dnn.linears[1].register_forward_hook(_hook)),
        "local_att.dnn.linears.1: its hooks would not run",
    ),
    "inner forward": (
        lambda: _with(lambda layer: setattr(layer.local_att, "forward", _hook)),
        "local_att: its forward is replaced",
    ),
    "own forward": (
        lambda: _with(lambda layer: setattr(layer, "forward", _hook)),
        "its forward is replaced",
    ),
    "subclass": (
        lambda: Subclass((5, 3), embedding_dim=WIDTH),
        "a subclass, Subclass, which may compute something else",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_would_not_be_exact_is_left_and_the_report_says_why(case: str) -> None:
    build, reason = LEFT[case]
    layer = build()
    before = type(layer)
    assert list(recattn.fuse(layer)) == [("", "AttentionSequencePoolingLayer", False, reason)]
    assert type(layer) is before


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.local_att.dnn.linears[0].register_forward_hook(lambda *call: 2 * call[-1]),
        lambda layer: layer.local_att.dnn.activation_layers.__setitem__(0, Dice(5, 3).double()),
        lambda layer: nn.utils.parametrizations.weight_norm(layer.local_att.dense),
    ],
    ids=["hook", "activation", "parametrization"],
)
def test_a_layer_changed_after_it_was_fused_computes_what_the_change_says(
    change: Callable[[Pooling], object],
) -> None:
    own, (query, keys) = pooling(), query_and_keys()
    fused = copy.deepcopy(own)
    recattn.fuse(fused)
    change(own)
    change(fused)
    assert torch.equal(fused(query, keys, LENGTHS), own(query, keys, LENGTHS))
