"""self_attention, with every argument checked before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn.backend import requested_backend
from recattn.composite.score_dropout import draw_seed
from recattn.functional import checks
from recattn.functional.checks import autocast, check_choice, check_tensor, expect_tensor
from recattn.jagged import Jagged, check_offsets
from recattn.ops import self_attention as _op


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    causal: bool = False,
    hide_self: bool = False,
    bias_table: Tensor | None = None,
    bias_index: str | Tensor = "position",
    dropout: float = 0.0,
) -> Tensor:
    r"""Attention of each item of a sequence to the items of the same sequence, for sequences end to end.

    .. math::
        a_{ij} = softmax_j(scale \cdot q_i \cdot k_j + bias_{r(i, j)}),\qquad out_i = \sum_j a_{ij} v_j

    per head, over the items j of the sequence that item i may see. Scores are never stored; backward computes them
    again.

    Args:
        q, k: `[T, H·d]`, head after head, the sequences end to end. Rows from `offsets[-1]` on are never read.
        v: `[T, H·dv]`.
        offsets: `[B + 1]`, int32 or int64: sequence b is the rows from `offsets[b]` to `offsets[b + 1]`. It may be
            empty.
        num_heads: H.
        scale: multiplies the products; `1 / sqrt(d)` if not given.
        causal: whether an item sees only itself and those before it.
        hide_self: whether an item does not see itself. One that then sees none gets 0.
        bias_table: `[R, H]`, added to the scores: its row r(i, j) = clamp(index_i - index_j + R // 2, 0, R - 1).
        bias_index: `"position"`, the place in the sequence, or `[T]` integers, such as bucketed times.
        dropout: the probability that `a_ij` is dropped; those kept are divided by `1 - dropout`. What is dropped
            follows from a seed drawn from PyTorch's generator, and is the same for every backend.

    All floating tensors are of one dtype (float16, bfloat16, float32; float64 without a fused kernel) and on one
    device; under autocast they are cast to its dtype. float32 products follow
    `torch.get_float32_matmul_precision()`. They are differentiable, once. Nothing waits for the device where a kernel
    covers the call.

    Returns:
        `[T, H·dv]`, zero for slack.

    Raises:
        TypeError: for a dtype that is not supported, or dtypes that disagree.
        ValueError: for shapes or devices that disagree, or an option that does not exist.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; for behaviour sequences Chen et al., "Behavior
    Sequence Transformer", DLP-KDD 2019; hiding a token from itself as in the code of Feng et al., "Deep Session
    Interest Network", IJCAI 2019.
    """
    expect_tensor("k", k)
    q, k, v, bias_table = autocast(k.device, q, k, v, bias_table)
    _check(q, k, v, offsets, num_heads, dropout)
    checks.check_flags(causal=causal, hide_self=hide_self)
    if scale is not None:
        checks.check_number("scale", scale)
    positions = _check_bias(k, bias_table, bias_index, num_heads)
    if checks.VALIDATE:
        Jagged(k, offsets).validate()
    out, *_ = _op.forward_op(
        q,
        k,
        v,
        offsets,
        bias_table,
        positions,
        draw_seed(k.device) if dropout else None,
        num_heads,
        (k.shape[1] // num_heads) ** -0.5 if scale is None else float(scale),
        causal,
        hide_self,
        float(dropout),
        requested_backend(),
    )
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, num_heads: int, dropout: float) -> None:
    check_tensor("k", k, ("T", "H·d"), like=k)
    if k.dtype not in checks.DTYPES:
        raise TypeError(f"k: expected one of {', '.join(map(str, checks.DTYPES))}, got {k.dtype}")
    check_tensor("q", q, tuple(k.shape), like=k)
    check_tensor("v", v, (k.shape[0], "H·dv"), like=k)
    expect_tensor("offsets", offsets)
    check_offsets("offsets", offsets, k.device)
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads: expected an integer of at least 1, got {num_heads!r}")
    for name, x in (("k", k), ("v", v)):
        if x.shape[1] == 0 or x.shape[1] % num_heads:
            raise ValueError(
                f"{name}: expected a width that num_heads = {num_heads} divides, got {list(x.shape)}"
            )
    checks.check_dropout(dropout)


def _check_bias(
    k: Tensor, bias_table: Tensor | None, bias_index: str | Tensor, num_heads: int
) -> Tensor | None:
    """What the bias is looked up by; None for the place in the sequence."""
    positions = None
    if isinstance(bias_index, str):
        check_choice("bias_index", bias_index, ("position",))
    else:
        positions = bias_index
        expect_tensor("bias_index", positions)
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"bias_index: expected int32 or int64, got {positions.dtype}")
        if tuple(positions.shape) != (k.shape[0],):
            raise ValueError(f"bias_index: expected shape [{k.shape[0]}], got {list(positions.shape)}")
        if positions.device != k.device:
            raise ValueError(f"bias_index: expected device {k.device}, as the keys, got {positions.device}")
        if bias_table is None:
            raise ValueError('bias_index: expected "position", since no bias_table is given')
    if bias_table is not None:
        check_tensor("bias_table", bias_table, ("R", num_heads), like=k)
        if bias_table.shape[0] == 0:
            raise ValueError(f"bias_table: expected at least one row, got {list(bias_table.shape)}")
    return positions
