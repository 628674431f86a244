"""attentional_gru, with every argument checked before anything is launched."""

from __future__ import annotations

from torch import Tensor

from recattn.backend import requested_backend
from recattn.functional import checks
from recattn.functional.checks import autocast, check_choice, check_tensor, expect_tensor
from recattn.jagged import Jagged, check_offsets
from recattn.ops import attentional_gru as _op
from recattn.ops.attentional_gru import KINDS, UPDATES


def attentional_gru(
    inputs: Tensor,
    offsets: Tensor,
    scores: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    kind: str = "gru",
    update: str = "paper",
    reset_after: bool = True,
    h0: Tensor | None = None,
    rows: Tensor | None = None,
    unique_rows: bool = False,
    row_scores: bool = False,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""A GRU over histories, in which attention may decide how far each item moves the state.

    .. math::
        r = \sigma(W_{ir} x_t + b_{ir} + W_{hr} h + b_{hr}),\qquad z = \sigma(W_{iz} x_t + b_{iz} + W_{hz} h + b_{hz})

        n = \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h + b_{hn})),\qquad h_t = (1 - u) \odot h + u \odot n

    Gates are stored as r, z, n and z is what is kept, as in `torch.nn.GRU`, whose parameters fit. With the attention
    a of an item, u is, by `kind` and `update`:

    ==========================  ====================
    `"gru"`, and `"aigru"`,     `1 - z`
    which reads `a x_t` for x
    `"agru"`                    `a`
    `"augru"`, `"paper"`        `a (1 - z)`
    `"augru"`, `"official"`     `1 - (1 - a) z`
    ==========================  ====================

    Only states are stored; backward computes gates again.

    Args:
        inputs: `[T, I]`, the histories end to end; or `[R, I]`, see `rows`. Positions from `offsets[-1]` on are never
            read.
        offsets: `[B + 1]`, int32 or int64: history b is `inputs[offsets[b]:offsets[b + 1]]`. It may be empty.
        scores: `[T]`, the attention, normalised if it is to be; None for `"gru"`.
        weight_ih: `[3H, I]`.
        weight_hh: `[3H, H]`.
        bias_ih, bias_hh: `[3H]`.
        kind: `"gru"`, `"agru"`, `"aigru"` or `"augru"`.
        update: of augru, `"paper"`, or `"official"` for what the code does that the paper's authors published:
            there a weight of 0 is an ordinary step, and 1 replaces the state.
        reset_after: whether the reset gate scales `W_hn h + b_hn`, as in `torch.nn.GRU`, or else h before the
            product, `W_hn (r ⊙ h) + b_hn`, as in TensorFlow's GRUCell.
        h0: `[B, H]`, the states to start from; zero if None.
        rows: `[T]`, int32 or int64: position t of the histories has row `rows[t]` of the inputs, which then may have
            any number of rows: a padded batch, the table of an embedding. `offsets` counts positions.
        unique_rows: promises that no row is at two positions, so that gradients need no sorting.
        row_scores: whether the scores are read by `rows` too, `[R]` as the inputs, not `[T]`.
        sparse_grad: whether the gradient of inputs read by `rows` is sparse.

    All tensors are of one floating dtype (float16, bfloat16, float32; float64 without a fused kernel) and on
    one device; under autocast they are cast to its dtype. float32 products follow
    `torch.get_float32_matmul_precision()`. Every floating argument is differentiable, once. Nothing waits for the
    device, but for calls that no kernel covers.

    Returns:
        The state after each item, `[T, H]`, zero for slack; and the last of each history, `[B, H]`, for an empty one
        that it started from.

    Raises:
        TypeError: for a dtype that is not supported, or dtypes that disagree.
        ValueError: for shapes or devices that disagree, or an option that does not exist.

    Source: Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction", AAAI 2019.
    """
    expect_tensor("inputs", inputs)
    inputs, scores, weight_ih, weight_hh, bias_ih, bias_hh, h0 = autocast(
        inputs.device, inputs, scores, weight_ih, weight_hh, bias_ih, bias_hh, h0
    )
    check_choice("kind", kind, KINDS)
    check_choice("update", update, UPDATES)
    checks.check_flags(reset_after=reset_after)
    checks.check_flags(unique_rows=unique_rows, row_scores=row_scores, sparse_grad=sparse_grad)
    check_tensor("inputs", inputs, ("T", "I"), like=inputs, of="inputs")
    if inputs.dtype not in checks.DTYPES:
        raise TypeError(f"inputs: expected one of {', '.join(map(str, checks.DTYPES))}, got {inputs.dtype}")
    if inputs.shape[1] == 0:
        raise ValueError(f"inputs: expected a width of at least 1, got {list(inputs.shape)}")
    expect_tensor("offsets", offsets)
    check_offsets("offsets", offsets, inputs.device)
    if (scores is None) != (kind == "gru"):
        expected = "None" if kind == "gru" else "a tensor"
        raise ValueError(f"scores: expected {expected} for {kind!r}, got {type(scores).__name__}")
    if rows is not None:
        checks.check_rows(rows, inputs, "inputs")
    for name, flag in (("row_scores", row_scores), ("sparse_grad", sparse_grad)):
        if flag and rows is None:
            raise ValueError(f"{name}: expected False, since no rows are given")
    if row_scores and scores is None:
        raise ValueError("row_scores: expected False, since no scores are given")
    if scores is not None:
        positions = inputs.shape[0] if rows is None or row_scores else rows.numel()
        check_tensor("scores", scores, (positions,), like=inputs, of="inputs")
    check_tensor("weight_hh", weight_hh, ("3H", "H"), like=inputs, of="inputs")
    size = weight_hh.shape[1]
    if size == 0:
        raise ValueError(f"weight_hh: expected a width of at least 1, got {list(weight_hh.shape)}")
    check_tensor("weight_hh", weight_hh, (3 * size, size), like=inputs, of="inputs")
    check_tensor("weight_ih", weight_ih, (3 * size, inputs.shape[1]), like=inputs, of="inputs")
    check_tensor("bias_ih", bias_ih, (3 * size,), like=inputs, of="inputs")
    check_tensor("bias_hh", bias_hh, (3 * size,), like=inputs, of="inputs")
    if h0 is not None:
        check_tensor("h0", h0, (offsets.numel() - 1, size), like=inputs, of="inputs")
    if checks.VALIDATE:
        Jagged(inputs if rows is None else rows, offsets).validate()
        if rows is not None:
            checks.validate_rows(rows[: int(offsets[-1])], inputs.shape[0])
    return _op.forward_op(
        inputs,
        offsets,
        scores,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        rows,
        unique_rows,
        row_scores,
        sparse_grad,
        kind,
        update,
        reset_after,
        requested_backend(),
    )
