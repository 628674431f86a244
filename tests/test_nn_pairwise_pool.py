"""nn.PairwisePool: the eager twin, parameters, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recattn.nn import PairwisePool


def layer(**options: float) -> PairwisePool:
    torch.manual_seed(0)
    return PairwisePool(6, 5, dtype=torch.float64, **options)


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_eager_twin_computes_the_same(count: int, return_weights: bool) -> None:
    made = layer()
    fields = torch.randn(4, count, 6, dtype=torch.float64, requires_grad=True)
    results: list[list[Tensor]] = []
    for implementation in ("fused", "eager"):
        out = made.use(implementation)(fields, return_weights=return_weights)
        outputs = list(out) if isinstance(out, tuple) else [out]
        leaves = [fields, *made.parameters()]
        gradients = torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves)
        results.append([*outputs, *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_dropout_is_for_training_only() -> None:
    made, fields = layer(dropout=0.5), torch.randn(4, 9, 6, dtype=torch.float64)
    assert not torch.equal(made(fields), made(fields))
    made.eval()
    assert torch.equal(made(fields), made(fields))


def test_attention_sums_to_one() -> None:
    _, weights = layer()(torch.randn(4, 9, 6, dtype=torch.float64), return_weights=True)
    assert weights.shape == (4, 36)
    torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))


def test_bad_settings_name_the_argument() -> None:
    with pytest.raises(ValueError, match="dim, hidden: expected at least 1, got 6 and 0"):
        PairwisePool(6, 0)
    with pytest.raises(ValueError, match="dropout: expected at least 0 and less than 1, got 1"):
        PairwisePool(6, dropout=1.0)
