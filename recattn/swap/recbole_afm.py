"""RecBole: the attention over pairs of features of its AFM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recbole.model.context_aware_recommender.afm import AFM
from recbole.model.layers import AttLayer
from torch import Tensor, nn

from recattn import functional
from recattn.swap.coverage import Options, Swap, expect, expect_own, instead_of, leave_small

__all__ = ["SWAPS", "FusedAFM"]


class FusedAFM(AFM):
    """`AFM` whose `AttLayer` is computed without the products of all pairs that it is given."""

    @instead_of(AFM.afm_layer)
    def afm_layer(self, infeature: Tensor) -> Tensor:
        """The logits `[B, 1]` of features `[B, F, E]`."""
        batch, fields = infeature.shape[:2]
        leave_small(infeature, Options.of(self), "pairwise_pool", batch * fields * (fields - 1) // 2)
        _check(self, Options())
        weight = self.attlayer.w.weight
        pooled = functional.pairwise_pool(infeature, weight, weight.new_zeros(len(weight)), self.attlayer.h)
        assert isinstance(pooled, Tensor)
        return (self.dropout_layer(pooled) * self.p).sum(1, keepdim=True)


def _check(model: Any, _: Options) -> Sequence[str]:
    for method in ("afm_layer", "build_cross"):
        expect_own(method, model)
    expect("attlayer", model.attlayer, AttLayer)
    expect("attlayer.w", model.attlayer.w, nn.Linear)
    return ()


SWAPS = (Swap(AFM, FusedAFM, _check, "pairwise_pool"),)
