"""torch-rechub: the activation unit of its DIN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_rechub.basic.activation import Dice
from torch_rechub.basic.layers import MLP
from torch_rechub.models.ranking.din import ActivationUnit

from recattn.backend import requested_backend
from recattn.composite.network import BLOCK_BYTES
from recattn.nn.batch_norm import needs_moments, scale_and_shift
from recattn.ops.fold import FEATURES, fold
from recattn.swap.coverage import Options, Swap, Uncovered, expect, expect_own, instead_of, leave_small
from recattn.swap.histories import ZERO, Padded, attend, remarks
from recattn.swap.scorers import Hidden, Scorer

__all__ = ["SWAPS", "FusedActivationUnit"]

NO_KERNEL = "its Dice, over the units of a position, has no kernel: PyTorch computes it on every device"


class FusedActivationUnit(ActivationUnit):
    """`ActivationUnit` without the concatenated features and, but for its Dice in training, the hidden units of the
    history.

    It has no mask, so that as in the library padding counts as items.
    """

    @instead_of(ActivationUnit.forward)
    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        """Pools the histories `[B, L, D]` by the target `[B, D]`; returns `[B, D]`."""
        leave_small(history, Options.of(self), "activation_unit")
        scorer = _scorer(self)
        batch, longest, width = history.shape
        if target.shape != (batch, width) or longest == 0:
            raise Uncovered(f"history, target: {tuple(history.shape)}, {tuple(target.shape)}")
        if scorer.activation == "dice":
            if requested_backend() == "triton":
                raise Uncovered(NO_KERNEL)
            scores = _scores(scorer, history, target)
            attention = scores.softmax(1) if self.use_softmax else scores
            return torch.bmm(attention.unsqueeze(1), history.to(attention.dtype)).squeeze(1)
        return attend(
            scorer,
            target,
            Padded(history, None),
            Options.of(self),
            normalize="softmax" if self.use_softmax else "none",
            empty=ZERO,
        )


def _scores(scorer: Scorer, history: Tensor, target: Tensor) -> Tensor:
    """`[B, L]`, by an MLP whose activation is Dice; block by block where nothing is kept for a gradient."""
    if torch.is_grad_enabled() or scorer.needs_moments or history.shape[0] == 0:
        return _scores_of_block(scorer, history, target)
    units = history.shape[2] + sum(layer.linear.out_features for layer in scorer.hidden)
    room = BLOCK_BYTES.get(history.device.type, BLOCK_BYTES["cuda"])
    size = max(room // (history.itemsize * history.shape[1] * units), 1)
    blocks = zip(history.split(size), target.split(size), strict=True)
    return torch.cat([_scores_of_block(scorer, *block) for block in blocks])


def _scores_of_block(scorer: Scorer, history: Tensor, target: Tensor) -> Tensor:
    weight, bias = _product(scorer.hidden[0])
    first = fold(weight, bias, target, FEATURES)
    effective = torch.addcmul(first.key, first.product, target.unsqueeze(1))  # [B, H, D]
    z = torch.baddbmm(first.bias.unsqueeze(1), history, effective.mT).flatten(0, 1)  # [B·L, H]
    for index, layer in enumerate(scorer.hidden):
        if index > 0:
            z = F.linear(z, *_product(layer))
        if layer.norm is not None and needs_moments(layer.norm):
            z = layer.norm(z)
        z = _dice(z, layer.activation)
        z = z if layer.dropout is None else layer.dropout(z)
    return scorer.last(z).view(history.shape[:2])


def _product(layer: Hidden) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a hidden layer, batch norm of known statistics within them."""
    weight, bias = layer.linear.weight, layer.linear.bias
    if layer.norm is None or needs_moments(layer.norm):
        return weight, bias
    scale, shift = scale_and_shift(layer.norm, None)
    return (weight * scale.unsqueeze(1)).to(weight), (bias * scale + shift).to(bias)


def _dice(z: Tensor, dice: Any) -> Tensor:
    """Of `[n, H]`. The library adds epsilon to the square of each unit, and sums these."""
    centred = z - z.mean(1, keepdim=True)
    squares = torch.linalg.vecdot(centred, centred).unsqueeze(1)
    p = torch.sigmoid(centred * torch.rsqrt(squares + z.shape[1] * dice.epsilon))
    return z * (dice.alpha + (1 - dice.alpha) * p)


def _scorer(layer: ActivationUnit) -> Scorer:
    expect_own("forward", layer)
    expect("attention", layer.attention, MLP)
    expect("attention.mlp", layer.attention.mlp, nn.Sequential)
    modules = {f"attention.mlp.{i}": module for i, module in enumerate(layer.attention.mlp)}
    return Scorer.of(modules, {Dice: "dice"})


def _check(layer: Any, options: Options) -> Sequence[str]:
    scorer = _scorer(layer)
    return [*remarks(scorer, options, ZERO, masked=False), *[NO_KERNEL] * (scorer.activation == "dice")]


SWAPS = (Swap(ActivationUnit, FusedActivationUnit, _check, "activation_unit"),)
