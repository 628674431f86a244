"""FuxiCTR's target attentions compute the same fused as by their own code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from swap_cases import (
    BATCH,
    LONGEST,
    MASKS,
    TOLERANCES,
    WIDTH,
    assert_fused_equals_own,
    import_or_skip,
    run,
    spread,
)
from torch import Tensor

import recattn

layers = import_or_skip("fuxictr.pytorch.layers.attentions.target_attention")
DIN_Attention, MultiHeadTargetAttention = layers.DIN_Attention, layers.MultiHeadTargetAttention
ACTIVATIONS = (
    "ReLU",
    "sigmoid",
    "tanh",
    "prelu",
    "dice",
    "GELU",
    "SiLU",
    "LeakyReLU",
    None,
    ["dice", "dice"],
)


def din(**options: Any) -> Any:
    return spread(DIN_Attention(WIDTH, **{"attention_units": [5, 3], **options}))


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(BATCH, WIDTH), torch.randn(BATCH, LONGEST, WIDTH)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_din_attention(activation: Any, use_softmax: bool, training: bool, dtype: torch.dtype) -> None:
    layer = din(hidden_activations=activation, use_softmax=use_softmax).train(training)
    mask = MASKS["left"].float()
    assert_fused_equals_own(layer, lambda m, q, k: m(q, k, mask), batch(), dtype)


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("activation", ["ReLU", "dice"])
def test_din_attention_with_batch_norm_and_any_mask(
    activation: str, use_softmax: bool, training: bool, kind: str | None
) -> None:
    layer = din(hidden_activations=activation, use_softmax=use_softmax, batch_norm=True).train(training)
    mask = None if kind is None else MASKS[kind]
    assert_fused_equals_own(layer, lambda m, q, k: m(q, k, mask), batch())


def test_a_sigmoid_of_the_score_is_a_normalisation() -> None:
    layer = din(output_activation="sigmoid")
    assert_fused_equals_own(layer, lambda m, q, k: m(q, k, MASKS["left"]), batch())


def test_dropout_has_its_own_draws_in_training_and_none_in_eval() -> None:
    remark = "training drops other units than the library would"
    layer = din(dropout_rate=0.5).eval()
    fused = assert_fused_equals_own(
        layer, lambda m, q, k: m(q, k, MASKS["left"]), batch(), remark=remark
    ).train()
    query, keys = (x.double() for x in batch())
    torch.manual_seed(0)
    results = torch.stack([fused(query, keys, MASKS["left"]) for _ in range(300)])
    own = layer.train()
    expected = torch.stack([own(query, keys, MASKS["left"]) for _ in range(300)])
    assert results.std(0).max() > 0
    error = (results.mean(0) - expected.mean(0)).abs()
    assert (error <= 5 * (results.var(0) + expected.var(0)).div(300).sqrt() + 1e-12).all()


def test_dice_behind_dropout_trains_by_the_library_s_own_code() -> None:
    layer = din(dropout_rate=0.5, hidden_activations="dice").double()
    fused = copy.deepcopy(layer)
    (row,) = recattn.fuse(fused)
    assert row.swapped
    assert "in eval only" in row.reason
    query, keys = (x.double() for x in batch())
    outs = []
    for module in (layer, fused):
        torch.manual_seed(3)
        outs.append(module(query, keys, MASKS["left"]))
    assert torch.equal(*outs)


def test_valid_semantics_ignore_the_padding_altogether() -> None:
    layer = din(hidden_activations="dice", use_softmax=True).double()
    (row,) = recattn.fuse(layer, semantics="valid")
    assert row == (
        "",
        "DIN_Attention",
        True,
        "batch statistics over valid positions only; an empty history gives 0, not the mean of its padding",
    )
    query, keys = (x.double() for x in batch())
    mask = MASKS["holes"]
    noisy = keys.masked_fill(~mask[..., None], torch.nan)
    twin = copy.deepcopy(layer)
    out = layer(query, keys, mask)
    assert torch.equal(out, twin(query, noisy, mask))
    assert (out[~mask.any(1)] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_activations": ["ReLU", "Tanh"]}, "different activations of hidden layers, ReLU(), Tanh()"),
        ({"hidden_activations": "Softplus"}, "attention_layer.mlp.1: Softplus is not built"),
        ({"output_activation": "Tanh"}, "attention_layer: tanh of the score is not built"),
    ],
)
def test_what_is_left(options: dict[str, Any], reason: str) -> None:
    assert list(recattn.fuse(din(**options))) == [("", "DIN_Attention", False, reason)]


def test_a_mask_of_weights_is_left_to_the_library() -> None:
    weights = MASKS["left"] * 0.5
    assert_fused_equals_own(din(use_softmax=True), lambda m, q, k: m(q, k, weights), batch())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_the_dtype_of_the_result_is_the_library_s(masked: bool, dtype: torch.dtype) -> None:
    layer, (query, keys) = din().to(dtype), (x.to(dtype) for x in batch())
    mask = MASKS["left"] if masked else None
    own = layer(query, keys, mask)
    recattn.fuse(layer)
    assert layer(query, keys, mask).dtype == own.dtype


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize(("heads", "use_qkvo"), [(1, True), (2, True), (2, False)])
def test_multi_head_target_attention(
    heads: int, use_qkvo: bool, use_scale: bool, kind: str | None, dtype: torch.dtype
) -> None:
    layer = spread(
        MultiHeadTargetAttention(
            WIDTH, attention_dim=6, num_heads=heads, use_scale=use_scale, use_qkvo=use_qkvo
        )
    )
    mask = None if kind is None else MASKS[kind]
    assert_fused_equals_own(layer, lambda m, q, k: m(q, k, mask), batch(), dtype)


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_as_candidates_of_a_shared_history(
    heads: int, use_scale: bool, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerators run, in float64."""
    monkeypatch.setattr("recattn.swap.fuxictr.on_cpu", lambda _: False)
    layer = spread(MultiHeadTargetAttention(WIDTH, attention_dim=6, num_heads=heads, use_scale=use_scale))
    mask = None if kind is None else MASKS[kind]
    assert_fused_equals_own(layer, lambda m, q, k: m(q, k, mask), batch())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention_takes_masks_of_any_dtype(training: bool, dtype: torch.dtype) -> None:
    layer = spread(MultiHeadTargetAttention(WIDTH, attention_dim=6, num_heads=2)).train(training)
    mask = MASKS["holes"].to(dtype)
    assert_fused_equals_own(layer, lambda m, q, k: m(q, k, mask), batch())


@pytest.mark.parametrize("masked", [True, False])
def test_multi_head_attention_over_nothing_and_over_all(masked: bool) -> None:
    layer = spread(MultiHeadTargetAttention(WIDTH, attention_dim=6, num_heads=2))
    mask = torch.full((BATCH, LONGEST), not masked)
    assert_fused_equals_own(layer, lambda m, q, k: m(q, k, mask), batch())


def test_multi_head_attention_with_valid_semantics_gives_0_for_an_empty_history() -> None:
    layer = spread(MultiHeadTargetAttention(WIDTH, attention_dim=6, num_heads=2))
    mask = MASKS["left"]
    own = layer(*batch(), mask)
    (row,) = recattn.fuse(layer, semantics="valid")
    assert row.reason == "an empty history gives 0, not the mean of its padding"
    out = layer(*batch(), mask)
    assert (out[~mask.any(1)] == 0).all()
    torch.testing.assert_close(out[mask.any(1)], own[mask.any(1)])


def test_dropout_of_the_attention_is_the_library_s_own() -> None:
    layer = spread(MultiHeadTargetAttention(WIDTH, attention_dim=6, dropout_rate=0.3)).eval()
    remark = "in eval only: dropout of the attention is not built"
    fused = assert_fused_equals_own(
        layer, lambda m, q, k: m(q, k, MASKS["left"]), batch(), remark=remark
    ).train()
    query, keys = (x.double() for x in batch())
    torch.manual_seed(3)
    out = fused(query, keys, MASKS["left"])
    torch.manual_seed(3)
    assert torch.equal(out, layer.train()(query, keys, MASKS["left"]))


def test_the_kernels_compute_the_same() -> None:
    layer = spread(MultiHeadTargetAttention(WIDTH, attention_dim=6, num_heads=2))
    fused = copy.deepcopy(layer)
    recattn.fuse(fused, backend="triton")
    inputs = [x.requires_grad_() for x in batch()]
    expected = run(layer, lambda m: m(*inputs, MASKS["holes"]), inputs)
    for a, b in zip(run(fused, lambda m: m(*inputs, MASKS["holes"]), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
