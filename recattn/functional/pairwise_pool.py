"""pairwise_pool, with every argument checked before anything is launched."""

from __future__ import annotations

import math

from torch import Tensor

from recattn.backend import requested_backend
from recattn.composite.score_dropout import draw_seed
from recattn.functional import checks
from recattn.functional.checks import autocast, check_tensor, expect_tensor
from recattn.ops import pairwise_pool as _op


def pairwise_pool(
    fields: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor,
    *,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention over the products of all pairs of fields.

    .. math::
        a_{ij} = softmax_{i<j}\big(projection \cdot relu(weight\,(v_i \odot v_j) + bias)\big),\qquad
        out = \sum_{i<j} a_{ij}\, v_i \odot v_j

    The products `[B, P, K]` of the P = F(F-1)/2 pairs are never stored; backward computes them again.

    Args:
        fields: `[B, F, K]`, the vectors of each sample's fields, already scaled by their values where those are not 1.
            With fewer than two fields there is no pair, and the output is 0.
        weight: `[A, K]`, as in nn.Linear.
        bias: `[A]`.
        projection: `[A]`.
        dropout: the probability that `a_ij` is dropped; those kept are divided by `1 - dropout`. What is dropped
            follows from a seed drawn from PyTorch's generator, and is the same for every backend.
        return_weights: whether to return `a_ij` too, with dropout applied: what the products were multiplied by. It is
            differentiable.

    All tensors are of one dtype (float16, bfloat16, float32; float64 without a fused kernel) and on one device; under
    autocast they are cast to its dtype. float32 products follow `torch.get_float32_matmul_precision()`. They are
    differentiable, once. Nothing waits for the device.

    Returns:
        `[B, K]`; with `return_weights` also `[B, P]`, pairs in the order of (0, 1), (0, 2), ..., (F-2, F-1).

    Raises:
        TypeError: for a dtype that is not supported, or dtypes that disagree.
        ValueError: for shapes or devices that disagree, or a dropout that is no probability below 1.

    Source: Xiao et al., "Attentional Factorization Machines", IJCAI 2017, whose code takes the exponentials without
    subtracting the maximum.
    """
    expect_tensor("fields", fields)
    fields, weight, bias, projection = autocast(fields.device, fields, weight, bias, projection)
    check_tensor("fields", fields, ("B", "F", "K"), like=fields)
    if fields.dtype not in checks.DTYPES:
        raise TypeError(f"fields: expected one of {', '.join(map(str, checks.DTYPES))}, got {fields.dtype}")
    if fields.shape[2] == 0:
        raise ValueError(f"fields: expected at least one column, got {list(fields.shape)}")
    check_tensor("weight", weight, ("A", fields.shape[2]), like=fields, of="fields")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one row, got {list(weight.shape)}")
    for name, tensor in (("bias", bias), ("projection", projection)):
        check_tensor(name, tensor, (weight.shape[0],), like=fields, of="fields")
    if not 0 <= dropout < 1 or not math.isfinite(dropout):
        raise ValueError(f"dropout: expected at least 0 and less than 1, got {dropout}")
    out, weights, *_ = _op.forward_op(
        fields,
        weight,
        bias,
        projection,
        draw_seed(fields.device) if dropout else None,
        float(dropout),
        return_weights,
        requested_backend(),
    )
    return (out, weights) if return_weights else out
