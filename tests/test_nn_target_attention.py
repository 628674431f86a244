"""nn.TargetAttention: each similarity is what it is called, whatever the layout, and the same from the eager twin."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from recattn import Jagged
from recattn.nn import TargetAttention
from recattn.nn.target_attention import NETWORKS, PRODUCTS, SCORES

WIDTH = 6
LENGTHS = torch.tensor([2, 0, 4, 1, 3])
VALID = torch.arange(4) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch() -> tuple[Tensor, Tensor]:
    """The query, and padded keys with NaN at the padding."""
    keys = torch.randn(5, 4, WIDTH, dtype=torch.float64).masked_fill(~VALID[..., None], torch.nan)
    return torch.randn(5, WIDTH, dtype=torch.float64), keys


def similarity(layer: TargetAttention, q: Tensor, k: Tensor) -> Tensor:
    """Of one query with keys `[L, D]`."""
    if layer.score == "dot":
        return k @ q
    if layer.score == "scaled_dot":
        return k @ q / WIDTH**0.5
    if layer.projection is not None:
        return k @ layer.projection.weight @ q
    assert layer.unit is not None
    first, *later = layer.unit.layers
    q = q.expand_as(k)
    if layer.score == "mlp":
        hidden = first(torch.cat([q, k, q - k, q * k], 1)).sigmoid()
        hidden = later[0](hidden).sigmoid()
    else:
        hidden = first(torch.cat([q, k], 1)).tanh()
    return later[-1](hidden)[:, 0]


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("score", SCORES)
def test_each_similarity_is_what_it_is_called(score: str, implementation: str) -> None:
    layer = TargetAttention(WIDTH, score, dtype=torch.float64).use(implementation)
    query, padded = batch()
    out = layer(query, padded, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        keys = padded[b, :length]
        expected = similarity(layer, query[b], keys).softmax(0) @ keys
        torch.testing.assert_close(out[b], expected)


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("score", SCORES)
def test_every_layout_gives_the_same_output_and_gradients(score: str, implementation: str) -> None:
    layer = TargetAttention(WIDTH, score, dtype=torch.float64).use(implementation)
    query, padded = batch()
    results = []
    for layout in ("jagged", "nested", "mask", "lengths"):
        keys = padded.clone().requires_grad_()
        history: Any = Jagged.from_padded(keys, lengths=LENGTHS)
        options = {}
        if layout == "nested":
            history = torch.nested.nested_tensor_from_jagged(history.values, history.offsets)
        elif layout == "mask":
            history, options = keys, {"mask": VALID}
        elif layout == "lengths":
            history, options = keys, {"lengths": LENGTHS}
        out = layer(query, history, **options)
        gradients = torch.autograd.grad(out.sin().sum(), [keys, *layer.parameters()])
        results.append([out, *gradients])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("score", "num_heads"), [*((s, n) for s in PRODUCTS for n in (1, 3)), *((s, 1) for s in NETWORKS)]
)
@pytest.mark.parametrize("normalize", ["softmax", "none", "exp", "sigmoid"])
def test_the_eager_twin_computes_the_same_for_candidates(score: str, num_heads: int, normalize: str) -> None:
    layer = TargetAttention(WIDTH, score, num_heads=num_heads, normalize=normalize, dtype=torch.float64)
    _, padded = batch()
    history = Jagged.from_padded(padded, lengths=LENGTHS)
    query = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)
    values = history.with_values(torch.randn(len(history.values), 9, dtype=torch.float64))
    offsets = torch.tensor([0, 3, 4, 4, 8, 9])
    results = []
    for implementation in ("fused", "eager"):
        out = layer.use(implementation)(query, history, values=values, query_offsets=offsets)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [query, *layer.parameters()])])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "cosine"}, "score: expected one of dot, scaled_dot, bilinear, additive, concat, mlp"),
        ({"num_heads": 4}, "dim, num_heads: expected a positive multiple of the heads, got 6, 4"),
        ({"hidden": (4,)}, "hidden: expected None for scaled_dot, got (4,)"),
        ({"score": "mlp", "num_heads": 2}, "num_heads: expected 1 for mlp, got 2"),
        ({"normalize": "l2"}, "normalize: expected one of softmax, none, exp, sigmoid, got 'l2'"),
    ],
)
def test_bad_settings_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TargetAttention(WIDTH, **arguments)


def test_bad_input_names_the_argument() -> None:
    layer = TargetAttention(WIDTH, dtype=torch.float64)
    query, padded = batch()
    history = Jagged.from_padded(padded, lengths=LENGTHS)
    with pytest.raises(ValueError, match="lengths, mask: expected None, since keys are not padded"):
        layer(query, history, lengths=LENGTHS)
    with pytest.raises(ValueError, match=re.escape("keys: expected [B, L, D], got [4, 6]")):
        layer(query, padded[0])
