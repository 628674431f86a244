"""DeepCTR-Torch: the attention pooling of its DIN and DIEN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepctr_torch.layers.activation import Dice, Identity
from deepctr_torch.layers.core import DNN, LocalActivationUnit
from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer
from torch import Tensor, nn

from recattn.swap.coverage import Options, Swap, Uncovered, expect, expect_own, instead_of, leave_small
from recattn.swap.histories import MEAN, ZERO, Padded, attend, by_length, remarks
from recattn.swap.scorers import Gate, Scorer

__all__ = ["SWAPS", "FusedAttentionSequencePoolingLayer"]


class FusedAttentionSequencePoolingLayer(AttentionSequencePoolingLayer):
    r"""`AttentionSequencePoolingLayer`, computed over the items that count and no others.

    .. math::
        s_t = MLP([q, k_t, q-k_t, q \odot k_t]),\quad a = softmax(s) \text{ or } s,\quad out = \sum_t a_t k_t

    As in the library, a row without items pools to 0, or with `weight_normalization` to the mean of all its
    positions, and Dice in training has statistics of all positions. What the library lets through beyond its documented
    shapes, and a layer changed after it was fused so that the operator no longer computes it, runs through the
    library's own code.
    """

    @instead_of(AttentionSequencePoolingLayer.forward)
    def forward(self, query: Tensor, keys: Tensor, keys_length: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools the histories.

        Args:
            query: `[B, 1, E]`.
            keys: `[B, T, E]`.
            keys_length: `[B, 1]` or `[B]`, for right padding.
            mask: `[B, T]` bool, instead of the lengths if the layer was built with `supports_masking`.

        Returns:
            `[B, 1, E]`, or with `return_score` the attention, `[B, 1, T]`.
        """
        leave_small(keys, Options.of(self), "activation_unit")
        result = attend(
            _scorer(self),
            query.squeeze(1),
            Padded(keys, _valid(self, query, keys, keys_length, mask)),
            Options.of(self),
            return_scores=self.return_score,
            **_pooling(self),
        )
        return result.unsqueeze(1)


def _pooling(layer: AttentionSequencePoolingLayer) -> dict[str, Any]:
    """With every position masked alike, the library's softmax weighs all of them alike."""
    if layer.weight_normalization:
        return {"normalize": "softmax", "empty": MEAN}
    return {"normalize": "none", "empty": ZERO}


def _scorer(layer: AttentionSequencePoolingLayer) -> Scorer:
    """Raises Uncovered if an operator would compute something else."""
    unit = layer.local_att
    expect("local_att", unit, LocalActivationUnit)
    dnn = unit.dnn
    expect("local_att.dnn", dnn, DNN)
    expect_own("forward", layer)
    if dnn.use_bn:
        raise Uncovered("local_att.dnn: use_bn is not built")
    modules: dict[str, nn.Module] = {}
    for i, (linear, activation) in enumerate(zip(dnn.linears, dnn.activation_layers, strict=True)):
        modules[f"local_att.dnn.linears.{i}"] = linear
        modules[f"local_att.dnn.activation_layers.{i}"] = activation
        modules[f"local_att.dnn.dropout, {i}"] = dnn.dropout
        if isinstance(activation, nn.PReLU) and activation.num_parameters != 1:
            raise Uncovered(
                f"local_att.dnn.activation_layers.{i}: PReLU of a 3-D input has a slope per position, not per unit"
            )
    modules["local_att.dense"] = unit.dense
    return Scorer.of(modules, {Identity: "identity", Dice: "dice"}, _gate)


def _gate(dice: Dice) -> Gate:
    if dice.dim != 3:
        raise Uncovered("Dice of a 2-D input")
    return Gate(dice.alpha.flatten(), dice.bn)


def _valid(
    layer: AttentionSequencePoolingLayer,
    query: Tensor,
    keys: Tensor,
    keys_length: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`[B, T]` bool: the positions that count. Raises Uncovered for other shapes than the documented ones."""
    batch, longest, width = keys.shape
    if query.shape != (batch, 1, width):
        raise Uncovered(f"query: {tuple(query.shape)}")
    if layer.supports_masking:
        if mask is None or mask.shape != (batch, longest) or mask.dtype not in (torch.bool, torch.uint8):
            raise Uncovered("mask")
        return mask.bool()
    if keys_length.numel() != batch:
        raise Uncovered(f"keys_length: {tuple(keys_length.shape)}")
    return by_length(keys_length, longest)


def _check(layer: Any, options: Options) -> Sequence[str]:
    return remarks(_scorer(layer), options, _pooling(layer)["empty"])


SWAPS = (Swap(AttentionSequencePoolingLayer, FusedAttentionSequencePoolingLayer, _check, "activation_unit"),)
