"""RecBole's attention computes the same fused as by its own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from swap_cases import (
    BATCH,
    LENGTHS,
    LONGEST,
    TOLERANCES,
    WIDTH,
    assert_fused_equals_own,
    import_or_skip,
    spread,
)
from torch import Tensor, nn

import recattn

SequenceAttLayer = import_or_skip("recbole.model.layers").SequenceAttLayer
ACTIVATIONS = ("sigmoid", "tanh", "relu", "leakyrelu", "dice", "none", nn.PReLU)


def attention(**options: Any) -> Any:
    return spread(SequenceAttLayer(torch.arange(LONGEST).view(1, -1), [4 * WIDTH, 5, 3], **options))


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(BATCH, WIDTH), torch.randn(BATCH, LONGEST, WIDTH)]


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_sequence_attention(activation: Any, weight: bool, softmax: bool) -> None:
    layer = attention(activation=activation, softmax_stag=softmax, return_seq_weight=weight)
    for dtype in TOLERANCES:
        for training in (True, False):
            assert_fused_equals_own(layer.train(training), lambda m, q, k: m(q, k, LENGTHS), batch(), dtype)


def test_valid_semantics_have_no_nan() -> None:
    layer = attention(softmax_stag=True, return_seq_weight=False)
    (row,) = recattn.fuse(layer, semantics="valid")
    assert row.reason == "an empty history gives 0, not NaN"
    out = layer(*batch(), LENGTHS)
    assert out.isfinite().all()
    assert (out[LENGTHS == 0] == 0).all()


def test_what_is_left() -> None:
    layer = attention()
    layer.mask_mat = layer.mask_mat + 1
    assert list(recattn.fuse(layer)) == [("", "SequenceAttLayer", False, "mask_mat: other than positions")]
    layer = attention()
    layer.att_mlp_layers.mlp_layers[0].p = 0.5
    (row,) = recattn.fuse(layer)
    assert row.reason == "att_mlp_layers.mlp_layers.0: dropout of inputs is not built"


def test_another_length_than_the_mask_s_raises_as_in_the_library() -> None:
    layer, (query, keys) = attention(), batch()
    recattn.fuse(layer)
    with pytest.raises(RuntimeError, match="must match"):
        layer(query, keys[:, :4], LENGTHS)
