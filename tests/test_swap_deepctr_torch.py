"""DeepCTR-Torch's attention pooling computes the same fused as by its own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from swap_deepctr_torch import (
    BATCH,
    LENGTHS,
    LONGEST,
    assert_equal,
    assert_fused_equals_own,
    pooling,
    query_and_keys,
    run,
)
from torch import Tensor, nn

import recattn

# holes, left padding, an empty row, a full one
MASK = torch.tensor(
    [
        [1, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [1, 1, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
ACTIVATIONS = (
    "sigmoid",
    "relu",
    "prelu",
    "linear",
    nn.Tanh,
    nn.SiLU,
    nn.GELU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Identity,
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("return_score", [True, False])
@pytest.mark.parametrize("weight_normalization", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_library(
    activation: Any, weight_normalization: bool, return_score: bool, training: bool
) -> None:
    layer = pooling(
        activation=activation, weight_normalization=weight_normalization, return_score=return_score
    ).train(training)
    assert_fused_equals_own(layer, *query_and_keys(), LENGTHS)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("return_score", [True, False])
@pytest.mark.parametrize("weight_normalization", [True, False])
@pytest.mark.filterwarnings("ignore:where received a uint8 condition")
def test_any_mask_is_followed(weight_normalization: bool, return_score: bool, dtype: torch.dtype) -> None:
    layer = pooling(
        supports_masking=True, weight_normalization=weight_normalization, return_score=return_score
    )
    assert_fused_equals_own(layer, *query_and_keys(), None, MASK.to(dtype))


@pytest.mark.parametrize("hidden", [(4,), (80, 40), (6, 5, 4, 3)])
def test_any_number_of_hidden_layers(hidden: tuple[int, ...]) -> None:
    assert_fused_equals_own(pooling(hidden, "relu", weight_normalization=True), *query_and_keys(), LENGTHS)


@pytest.mark.parametrize(
    "lengths",
    [
        LENGTHS[:, None],
        LENGTHS.int(),
        LENGTHS + 0.5,  # the library compares positions with them as they are
        LENGTHS - 3,
        torch.zeros(BATCH, dtype=torch.int64),
        torch.full((BATCH,), LONGEST),
    ],
    ids=["column", "int32", "fractional", "negative", "all empty", "all full"],
)
@pytest.mark.parametrize("return_score", [True, False])
@pytest.mark.parametrize("weight_normalization", [True, False])
def test_lengths_of_every_kind(lengths: Tensor, weight_normalization: bool, return_score: bool) -> None:
    layer = pooling(weight_normalization=weight_normalization, return_score=return_score)
    assert_fused_equals_own(layer, *query_and_keys(), lengths)


@pytest.mark.parametrize("return_score", [True, False])
@pytest.mark.parametrize("weight_normalization", [True, False])
@pytest.mark.parametrize(("batch", "longest"), [(0, LONGEST), (3, 0), (0, 0)])
def test_no_rows_and_no_positions(
    batch: int, longest: int, weight_normalization: bool, return_score: bool
) -> None:
    layer = pooling(weight_normalization=weight_normalization, return_score=return_score)
    lengths = torch.ones(batch, dtype=torch.int64)
    assert_fused_equals_own(layer, *query_and_keys(batch, longest), lengths)


def test_an_empty_row_is_the_mean_of_its_padding_only_with_softmax() -> None:
    query, keys = query_and_keys()
    for normalized, expected in ((True, keys[1].mean(0)), (False, torch.zeros_like(query[1, 0]))):
        layer = pooling(weight_normalization=normalized)
        recattn.fuse(layer)
        torch.testing.assert_close(layer(query, keys, LENGTHS)[1, 0], expected)


@pytest.mark.parametrize("weight_normalization", [True, False])
def test_padding_of_rows_with_items_may_hold_nan(weight_normalization: bool) -> None:
    query, keys = query_and_keys()
    lengths = LENGTHS.clamp_min(1)
    layer = pooling(weight_normalization=weight_normalization)
    recattn.fuse(layer)
    expected = run(layer, query, keys, lengths)
    padding = torch.arange(LONGEST) >= lengths[:, None]
    assert_equal(run(layer, query, keys.masked_fill(padding[..., None], torch.nan), lengths), expected)


@pytest.mark.parametrize("weight_normalization", [True, False])
def test_a_query_per_position_goes_through_the_library_s_own_code(weight_normalization: bool) -> None:
    layer = pooling(weight_normalization=weight_normalization)
    _, keys = query_and_keys()
    assert_fused_equals_own(layer, torch.randn_like(keys), keys, LENGTHS)


def test_a_call_that_no_kernel_serves_raises_where_triton_was_asked_for_by_name() -> None:
    layer = pooling()
    recattn.fuse(layer)
    _, keys = query_and_keys()
    with recattn.backend("triton"), pytest.raises(NotImplementedError, match=r"query: \(7, 6, 4\)"):
        layer(torch.randn_like(keys), keys, LENGTHS)


def test_bad_calls_raise_as_in_the_library() -> None:
    query, keys = query_and_keys()
    for masked, rest in ((True, (LENGTHS,)), (True, (None, MASK.double())), (False, (LENGTHS[:3],))):
        layer = pooling(supports_masking=masked)
        with pytest.raises((ValueError, RuntimeError)) as own:
            layer(query, keys, *rest)
        recattn.fuse(layer)
        with pytest.raises(own.type) as fused:
            layer(query, keys, *rest)
        assert str(fused.value) == str(own.value)


@pytest.mark.parametrize("weight_normalization", [True, False])
@pytest.mark.parametrize("return_score", [True, False])
def test_autocast_gives_the_dtype_of_the_library(weight_normalization: bool, return_score: bool) -> None:
    layer = pooling(weight_normalization=weight_normalization, return_score=return_score).float()
    query, keys = (x.float() for x in query_and_keys())
    with torch.autocast("cpu", torch.bfloat16):
        own = layer(query, keys, LENGTHS)
        recattn.fuse(layer)
        fused = layer(query, keys, LENGTHS)
    assert fused.dtype == own.dtype
    torch.testing.assert_close(fused, own, rtol=0.05, atol=0.05)
