"""RecBole: the attention of its DIN and DIEN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from recbole.model.layers import Dice, MLPLayers, SequenceAttLayer
from torch import Tensor, nn

from recattn.swap.coverage import Options, Swap, Uncovered, expect, expect_own, instead_of, leave_small
from recattn.swap.histories import NAN, ZERO, Padded, attend, by_length, remarks
from recattn.swap.scorers import Scorer

__all__ = ["SWAPS", "FusedSequenceAttLayer"]


class FusedSequenceAttLayer(SequenceAttLayer):
    r"""`SequenceAttLayer`, computed over the items that count and no others.

    .. math:: a_t = s_t / \sqrt{D},\text{ or the softmax of that}

    As in the library, an empty history pools to 0, or with `softmax_stag` to NaN.
    """

    @instead_of(SequenceAttLayer.forward)
    def forward(self, queries: Tensor, keys: Tensor, keys_length: Tensor) -> Tensor:
        """Pools the histories.

        Args:
            queries: `[B, D]`.
            keys: `[B, T, D]`.
            keys_length: `[B]`, for right padding.

        Returns:
            `[B, 1, D]`, or with `return_seq_weight` the attention, `[B, 1, T]`.
        """
        leave_small(keys, Options.of(self), "activation_unit")
        batch, longest, width = keys.shape
        if queries.shape != (batch, width) or keys_length.shape != (batch,):
            raise Uncovered(f"queries, keys_length: {tuple(queries.shape)}, {tuple(keys_length.shape)}")
        if tuple(self.mask_mat.shape) != (1, longest):
            raise Uncovered(f"mask_mat: {tuple(self.mask_mat.shape)}")
        result = attend(
            _scorer(self),
            queries,
            Padded(keys, by_length(keys_length, longest)),
            Options.of(self),
            scale=width**-0.5,
            return_scores=self.return_seq_weight,
            **_pooling(self),
        )
        return result.unsqueeze(1)


def _pooling(layer: SequenceAttLayer) -> dict[str, Any]:
    if layer.softmax_stag:
        return {"normalize": "softmax", "empty": NAN}
    return {"normalize": "none", "empty": ZERO}


def _scorer(layer: SequenceAttLayer) -> Scorer:
    expect_own("forward", layer)
    network = layer.att_mlp_layers
    expect("att_mlp_layers", network, MLPLayers)
    expect("att_mlp_layers.mlp_layers", network.mlp_layers, nn.Sequential)
    modules = {f"att_mlp_layers.mlp_layers.{i}": module for i, module in enumerate(network.mlp_layers)}
    for name, module in modules.items():
        if isinstance(module, nn.BatchNorm1d):
            raise Uncovered(f"{name}: of a 3-D input")
        if isinstance(module, Dice) and bool(module.alpha.any()):
            raise Uncovered(f"{name}: Dice with alpha")
        if isinstance(module, nn.PReLU) and module.num_parameters != 1:
            raise Uncovered(f"{name}: PReLU of a 3-D input has a slope per position, not per unit")
    return Scorer.of({**modules, "dense": layer.dense}, {Dice: "silu"})


def _check(layer: Any, options: Options) -> Sequence[str]:
    if not torch.equal(layer.mask_mat.flatten(), torch.arange(layer.mask_mat.numel()).to(layer.mask_mat)):
        raise Uncovered("mask_mat: other than positions")
    return remarks(_scorer(layer), options, _pooling(layer)["empty"])


SWAPS = (Swap(SequenceAttLayer, FusedSequenceAttLayer, _check, "activation_unit"),)
