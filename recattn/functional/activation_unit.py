"""activation_unit, with every argument checked before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recattn.backend import requested_backend
from recattn.functional.activation_unit_checks import (
    activation_tensors,
    autocast_all,
    check_histories,
    check_layers,
    check_noise,
)
from recattn.functional.checks import check_choice, check_flags, check_number, expect_sequence, expect_tensor
from recattn.ops import activation_unit as _op
from recattn.ops.activation_unit import FEATURES, NORMALIZATIONS


def activation_unit(
    query: Tensor,
    keys: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    values: Tensor | None = None,
    query_offsets: Tensor | None = None,
    rows: Tensor | None = None,
    unique_rows: bool = False,
    sparse_grad: bool = False,
    features: Sequence[str] = FEATURES,
    activation: str = "sigmoid",
    activation_params: Sequence[Tensor] | Sequence[Sequence[Tensor]] | float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    normalize: str = "softmax",
    scale: float = 1.0,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""DIN's activation unit: a small MLP scores each item of a history against the query, and the history
    is pooled by those scores.

    .. math::
        z_1 = W_1 [q, k_t, q-k_t, q \odot k_t] + b_1,\quad h_i = act(z_i),\quad z_{i+1} = W_{i+1} h_i + b_{i+1}

        a = normalize(scale \cdot (w \cdot h_n + b)),\qquad out = \sum_t a_t v_t

    Neither the concatenated features nor any hidden activation is stored; backward computes them again. Only on a CPU,
    where those of all items fit in 8 MiB, they are kept, outside of compiled graphs.

    Args:
        query: `[B, D]`, one target per history; or `[N, D]`, see `query_offsets`.
        keys: `[T, D]`, the histories end to end. Rows from `offsets[-1]` on are never read.
        offsets: `[B + 1]`, int32 or int64: history b is `keys[offsets[b]:offsets[b + 1]]`. It may be empty.
        weights: as in `nn.Linear`: `[H1, F·D]`, `[H2, H1]`, ..., `[1, Hn]`, for F features.
        biases: `[H1]`, `[H2]`, ..., `[1]`.
        values: `[T, Dv]`, what is pooled; the keys if not given.
        query_offsets: `[B + 1]`, int32 or int64: the queries from `query_offsets[b]` to `query_offsets[b + 1]` are
            candidates that share history b, which is not copied. There may be none. Those behind the last give 0.
        rows: `[T]`, int32 or int64: position t of the histories has row `rows[t]` of keys and values, which then may
            have any number of rows: padded batches, the table of an embedding. `offsets` counts positions.
        unique_rows: promises that no row is at two positions, so that gradients need no sorting.
        sparse_grad: whether the gradient of keys and values read by `rows` is sparse.
        features: which of `"q"`, `"k"`, `"q-k"`, `"q*k"`, in the order of the blocks in the first weight.
        activation: `"sigmoid"`, `"relu"`, `"leaky_relu"`, `"prelu"`, `"silu"`, `"gelu"` (exact), `"tanh"`,
            `"identity"`; or `"dice"`, `z·(alpha + (1 - alpha)·p)` with `p = sigmoid(scale·z + shift)`.
        activation_params: for prelu a slope per hidden layer, a tensor of 1 or of H elements each; for dice such an
            `(alpha, scale, shift)` per hidden layer, see `activation_unit_statistics`; for leaky_relu the negative
            slope, 0.01 if not given.
        dropout: the probability that a hidden unit is 0, while the others grow by 1 / (1 - dropout); to 16 bits.
        seed: one element of int64 on the device; it says which units are dropped, whatever computes them. Without it
            one is drawn from torch's generator of the device.
        normalize: `"softmax"` over the history; `"exp"` or `"sigmoid"` of each score; or `"none"`.
        scale: multiplies the score before it is normalised.
        return_scores: whether to return `a` too. Not with `query_offsets`, as only the device knows its size.

    All tensors are of one floating dtype (float16, bfloat16, float32; float64 without a fused kernel) and on
    one device; weights, biases and activation_params may be of float32 beside narrower ones. Under autocast tensors
    are cast to its dtype, activation_params not. float32 products follow
    `torch.get_float32_matmul_precision()`. Every floating argument is differentiable, once. Nothing waits for the
    device, but for candidates that no kernel covers.

    Returns:
        `[B, Dv]` or `[N, Dv]`, zero for an empty history; with `return_scores` also `a`, `[T]`, zero for slack.

    Raises:
        TypeError: for a dtype that is not supported, or dtypes that disagree.
        ValueError: for shapes or devices that disagree, or an option that does not exist.
        NotImplementedError: for `recattn.backend("triton")` where no kernel covers the call.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018.
    """
    expect_sequence("weights", weights, "tensors")
    params, negative_slope = activation_tensors(activation, activation_params, len(weights) - 1)
    expect_tensor("keys", keys)
    query, keys, values, weights, biases = autocast_all(query, keys, values, weights, biases)
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_number("scale", scale)
    check_flags(unique_rows=unique_rows, sparse_grad=sparse_grad, return_scores=return_scores)
    check_histories(query, keys, offsets, values, query_offsets, rows, sparse_grad)
    if return_scores and query_offsets is not None:
        raise ValueError("return_scores: expected False, since query_offsets are given")
    if len(weights) < 2:
        raise ValueError(
            f"weights: expected at least one hidden layer and the last, got {len(weights)} tensor(s)"
        )
    check_layers(query, weights, biases, params, features, scores=True)
    seed = check_noise(dropout, seed, keys.device)
    backend = requested_backend()
    out, attention, *_ = _op.forward_op(
        query,
        keys,
        offsets,
        values,
        query_offsets,
        rows,
        seed,
        weights,
        biases,
        params,
        unique_rows,
        sparse_grad,
        list(features),
        activation,
        negative_slope,
        float(dropout),
        normalize,
        float(scale),
        return_scores,
        backend,
        _op.keeps(keys, query_offsets, rows, weights, dropout, backend),
    )
    return (out, attention) if return_scores else out
