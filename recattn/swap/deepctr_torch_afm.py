"""DeepCTR-Torch: the attention over pairs of features of its AFM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepctr_torch.layers.interaction import AFMLayer
from torch import Tensor

from recattn import functional
from recattn.swap.coverage import Options, Swap, Uncovered, expect_own, instead_of, leave_small

__all__ = ["SWAPS", "FusedAFMLayer"]


class FusedAFMLayer(AFMLayer):
    """`AFMLayer` without the products of all pairs. `normalized_att_score` is kept, without its graph."""

    @instead_of(AFMLayer.forward)
    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The logits `[B, 1]` of a list of features, `[B, 1, E]` each."""
        expect_own("forward", self)
        if len(inputs) < 2 or any(x.shape != inputs[0].shape for x in inputs) or inputs[0].shape[1:2] != (1,):
            raise Uncovered(f"inputs: {[tuple(x.shape) for x in inputs]}")
        pairs = len(inputs[0]) * len(inputs) * (len(inputs) - 1) // 2
        leave_small(inputs[0], Options.of(self), "pairwise_pool", pairs)
        pooled, weights = functional.pairwise_pool(
            torch.cat(list(inputs), 1),
            self.attention_W.t(),
            self.attention_b,
            self.projection_h.squeeze(1),
            return_weights=True,
        )
        self.normalized_att_score = weights.detach().unsqueeze(2)
        return self.dropout(pooled) @ self.projection_p


def _check(layer: Any, _: Options) -> Sequence[str]:
    expect_own("forward", layer)
    return ()


SWAPS = (Swap(AFMLayer, FusedAFMLayer, _check, "pairwise_pool"),)
