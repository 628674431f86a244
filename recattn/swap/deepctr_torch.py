"""DeepCTR-Torch: the attention pooling of its DIN and DIEN."""

from __future__ import annotations

from typing import Any

import torch
from deepctr_torch.layers.activation import Identity
from deepctr_torch.layers.core import DNN, LocalActivationUnit
from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer
from torch import Tensor, nn

from recattn import functional
from recattn.backend import requested_backend
from recattn.jagged import pack, unpack
from recattn.swap.coverage import Swap, Uncovered, expect, hidden_activation

__all__ = ["SWAPS", "FusedAttentionSequencePoolingLayer"]


class FusedAttentionSequencePoolingLayer(AttentionSequencePoolingLayer):
    r"""`AttentionSequencePoolingLayer`, computed over the items that count and no others.

    .. math::
        s_t = MLP([q, k_t, q-k_t, q \odot k_t]),\quad a = softmax(s) \text{ or } s,\quad out = \sum_t a_t k_t

    As in the library, a row without items pools to 0, or with `weight_normalization` to the mean of all its
    positions. What the library lets through beyond its documented shapes, and a layer changed after it was
    fused so that the operator no longer computes it, runs through the library's own code.
    """

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
        try:
            arguments = _arguments(self)
            valid = _valid(self, query, keys, keys_length, mask)
        except Uncovered as reason:
            if requested_backend() == "triton":
                raise NotImplementedError(f'backend "triton": {reason}') from None
            return super().forward(query, keys, keys_length, mask)
        rows, offsets = pack(valid)
        result = functional.activation_unit(
            query.squeeze(1),
            keys.flatten(0, 1),
            offsets,
            rows=rows,
            unique_rows=True,
            return_scores=self.return_score,
            **arguments,
        )
        result = unpack(result[1], valid) if self.return_score else result
        assert isinstance(result, Tensor)
        if self.weight_normalization:
            result = _fill_empty(result, keys, valid, self.return_score)
        return result.unsqueeze(1)


def _arguments(layer: AttentionSequencePoolingLayer) -> dict[str, Any]:
    """What the operator takes from the layer. Raises Uncovered if it would compute something else."""
    unit = layer.local_att
    expect("local_att", unit, LocalActivationUnit)
    dnn = unit.dnn
    expect("local_att.dnn", dnn, DNN)
    if "forward" in vars(layer):
        raise Uncovered("its forward is replaced")
    if dnn.use_bn:
        raise Uncovered("local_att.dnn: use_bn is not built")
    expect("local_att.dnn.dropout", dnn.dropout, nn.Dropout)
    if dnn.dropout.p > 0:
        raise Uncovered(f"local_att.dnn.dropout: dropout of {dnn.dropout.p} is not built")
    linears = {f"local_att.dnn.linears.{i}": linear for i, linear in enumerate(dnn.linears)}
    linears["local_att.dense"] = unit.dense
    for name, linear in linears.items():
        expect(name, linear, nn.Linear)
        if linear.bias is None:
            raise Uncovered(f"{name}: no bias")
    activations = {f"local_att.dnn.activation_layers.{i}": a for i, a in enumerate(dnn.activation_layers)}
    for name, activation in activations.items():
        if isinstance(activation, nn.PReLU) and activation.num_parameters != 1:
            raise Uncovered(f"{name}: PReLU of a 3-D input has a slope per position, not per unit")
    return {
        "weights": [linear.weight for linear in linears.values()],
        "biases": [linear.bias for linear in linears.values()],
        "normalize": "softmax" if layer.weight_normalization else "none",
        **hidden_activation(activations, {Identity: "identity"}),
    }


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
    position = torch.arange(longest, device=keys_length.device, dtype=keys_length.dtype)
    return position < keys_length.reshape(-1, 1)


def _fill_empty(result: Tensor, keys: Tensor, valid: Tensor, scores: bool) -> Tensor:
    """With every position masked alike, the library's softmax weighs all of them alike."""
    longest = keys.shape[1]
    empty = ~valid.any(1, keepdim=True)
    if longest == 0 or (empty.is_cpu and not bool(empty.any())):
        return result
    if scores:
        return result.masked_fill(empty, 1 / longest)
    return torch.where(empty, keys.mean(1).to(result.dtype), result)


SWAPS = (Swap(AttentionSequencePoolingLayer, FusedAttentionSequencePoolingLayer, _arguments),)
