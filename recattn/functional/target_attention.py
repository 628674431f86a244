"""target_attention, with every argument checked before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn.backend import requested_backend
from recattn.functional import checks
from recattn.functional.checks import (
    autocast,
    check_choice,
    check_flags,
    check_number,
    check_tensor,
    expect_tensor,
)
from recattn.jagged import Jagged, check_offsets
from recattn.ops import target_attention as _op
from recattn.ops.target_attention import NORMALIZATIONS


def target_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    query_offsets: Tensor | None = None,
    rows: Tensor | None = None,
    normalize: str = "softmax",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Dot-product attention of targets over the history that each belongs to.

    .. math::
        s_{th} = scale \cdot \langle q_h, k_{th} \rangle + bias_{th},\qquad
        out_h = \sum_t normalize(s_h)_t\, v_{th}

    A bilinear similarity `qᵀ W k` is this after projecting the query by W. No score is stored.

    Args:
        query: `[B, H·d]`, one target per history; with `query_offsets` `[N, H·d]`, the candidates of all histories.
        keys: `[T, H·d]`, the histories end to end. Rows from `offsets[-1]` on are never read.
        values: `[T, H·dv]`, what is pooled.
        offsets: `[B + 1]`, int32 or int64: history b is `keys[offsets[b]:offsets[b + 1]]`. It may be empty.
        num_heads: H. Head h takes the columns `h·d` to `(h + 1)·d`.
        scale: multiplies the products; `d**-0.5` if not given, 1 for plain dot products.
        bias: `[T]`, or `[T, H]`, added to the scores, in the dtype of the keys or float32; -inf hides a token.
        query_offsets: `[B + 1]`, the dtype of either free: candidates `query_offsets[b]` to `query_offsets[b + 1]`
            attend to history b, which they share. Queries from the last offset on get zero.
        rows: `[T]`, int32 or int64: token t is row `rows[t]` of keys and values, then tables of any length. Equal
            rows are read each time, and sum up in the gradient.
        normalize: `"softmax"` over the history, `"sigmoid"` or `"exp"` of each score, or `"none"`.
        return_lse: whether to return the log-sum-exp of the scores too, as softmax has it; it is differentiable, so
            that attention over parts of a history can be merged.

    All floating tensors are of one dtype (float16, bfloat16, float32; float64 without a fused kernel), but the bias
    may be float32, and on one device; under autocast they are cast to its dtype, but the bias. float32 products
    follow `torch.get_float32_matmul_precision()`. Every floating argument is differentiable, once.

    Returns:
        `[B, H·dv]` or `[N, H·dv]`, zero for an empty history; with `return_lse` also `[N, H]` in float32 (float64
        for float64), `-inf` for an empty history.

    Raises:
        TypeError: for a dtype that is not supported, or dtypes that disagree.
        ValueError: for shapes or devices that disagree, or an option that does not exist.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; over histories as in Pi et al., "Search-based
    User Interest Modeling with Lifelong Sequential Behavior Data", CIKM 2020.
    """
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        expect_tensor(name, tensor)
    query, keys, values = autocast(keys.device, query, keys, values)
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_flags(return_lse=return_lse)
    if scale is not None:
        check_number("scale", scale)
    if return_lse and normalize != "softmax":
        raise ValueError(f"return_lse: expected normalize='softmax', got {normalize!r}")
    tokens = _check_histories(keys, values, offsets, rows)
    _check_queries(query, keys, offsets, query_offsets)
    _check_heads(num_heads, keys, values)
    if bias is not None:
        _check_bias(bias, keys, tokens, num_heads)
    if checks.VALIDATE:
        Jagged(keys if rows is None else rows, offsets).validate()
        if query_offsets is not None:
            Jagged(query, query_offsets).validate()
        if rows is not None:
            _check_rows(rows[: int(offsets[-1])], keys.shape[0])
    out, lse, *_ = _op.forward_op(
        query,
        keys,
        values,
        offsets,
        query_offsets,
        rows,
        bias,
        num_heads,
        (keys.shape[1] // num_heads) ** -0.5 if scale is None else float(scale),
        normalize,
        return_lse,
        requested_backend(),
    )
    return (out, lse) if return_lse else out


def _check_histories(keys: Tensor, values: Tensor, offsets: Tensor, rows: Tensor | None) -> int:
    """Returns the number of tokens."""
    check_tensor("keys", keys, ("T", "H·d"), like=keys)
    if keys.dtype not in checks.DTYPES:
        raise TypeError(f"keys: expected one of {', '.join(map(str, checks.DTYPES))}, got {keys.dtype}")
    check_tensor("values", values, (keys.shape[0], "H·dv"), like=keys)
    expect_tensor("offsets", offsets)
    check_offsets("offsets", offsets, keys.device)
    if rows is None:
        return keys.shape[0]
    checks.check_rows(rows, keys, "keys")
    return rows.shape[0]


def _check_queries(query: Tensor, keys: Tensor, offsets: Tensor, query_offsets: Tensor | None) -> None:
    if query_offsets is None:
        check_tensor("query", query, (offsets.numel() - 1, keys.shape[1]), like=keys)
        return
    check_tensor("query", query, ("N", keys.shape[1]), like=keys)
    expect_tensor("query_offsets", query_offsets)
    check_offsets("query_offsets", query_offsets, keys.device)
    if query_offsets.shape != offsets.shape:
        raise ValueError(
            f"query_offsets: expected shape {list(offsets.shape)}, as the offsets, got {list(query_offsets.shape)}"
        )


def _check_heads(num_heads: int, keys: Tensor, values: Tensor) -> None:
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.shape[1] == 0 or tensor.shape[1] % num_heads:
            raise ValueError(
                f"{name}: expected a width that is a positive multiple of num_heads={num_heads},"
                f" got {list(tensor.shape)}"
            )


def _check_bias(bias: Tensor, keys: Tensor, tokens: int, num_heads: int) -> None:
    expect_tensor("bias", bias)
    if bias.dtype not in (keys.dtype, torch.float32):
        raise TypeError(f"bias: expected torch.float32 or {keys.dtype}, as the keys, got {bias.dtype}")
    shape: tuple[int, ...] = (tokens,) if bias.dim() == 1 else (tokens, num_heads)
    if tuple(bias.shape) != shape:
        raise ValueError(
            f"bias: expected shape [{tokens}] or [{tokens}, {num_heads}], got {list(bias.shape)}"
        )
    if bias.device != keys.device:
        raise ValueError(f"bias: expected device {keys.device}, as the keys, got {bias.device}")


def _check_rows(rows: Tensor, count: int) -> None:
    bad = rows[(rows < 0) | (rows >= count)]
    if bad.numel():
        raise ValueError(f"rows: expected indices of the {count} rows of keys, got {int(bad[0])}")
