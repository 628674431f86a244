"""torch-rechub: the activation unit of its DIN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch_rechub.basic.layers import MLP
from torch_rechub.models.ranking.din import ActivationUnit

from recattn.swap.coverage import Options, Swap, Uncovered, expect, expect_own, instead_of
from recattn.swap.histories import ZERO, Padded, attend, remarks
from recattn.swap.scorers import Scorer

__all__ = ["SWAPS", "FusedActivationUnit"]


class FusedActivationUnit(ActivationUnit):
    """`ActivationUnit` without the concatenated features and the hidden units of the history.

    It has no mask, so that as in the library padding counts as items.
    """

    @instead_of(ActivationUnit.forward)
    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        """Pools the histories `[B, L, D]` by the target `[B, D]`; returns `[B, D]`."""
        batch, longest, width = history.shape
        if target.shape != (batch, width) or longest == 0:
            raise Uncovered(f"history, target: {tuple(history.shape)}, {tuple(target.shape)}")
        return attend(
            _scorer(self),
            target,
            Padded(history, None),
            Options.of(self),
            normalize=_normalize(self),
            empty=ZERO,
        )


def _normalize(layer: ActivationUnit) -> str:
    return "softmax" if layer.use_softmax else "none"


def _scorer(layer: ActivationUnit) -> Scorer:
    expect_own("forward", layer)
    expect("attention", layer.attention, MLP)
    expect("attention.mlp", layer.attention.mlp, nn.Sequential)
    return Scorer.of({f"attention.mlp.{i}": module for i, module in enumerate(layer.attention.mlp)})


def _check(layer: Any, options: Options) -> Sequence[str]:
    return remarks(_scorer(layer), options, ZERO, masked=False)


SWAPS = (Swap(ActivationUnit, FusedActivationUnit, _check),)
