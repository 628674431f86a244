"""activation_unit, with every argument checked before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recattn.backend import requested_backend
from recattn.functional import checks
from recattn.functional.checks import autocast, check_choice, check_tensor, expect_tensor
from recattn.jagged import Jagged, check_offsets
from recattn.ops import activation_unit as _op
from recattn.ops.activation_unit import ACTIVATIONS, FEATURES, NORMALIZATIONS


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
    activation_params: Sequence[Tensor] | float | None = None,
    normalize: str = "softmax",
    scale: float = 1.0,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""DIN's activation unit: a small MLP scores each item of a history against the query, and the history
    is pooled by those scores.

    .. math::
        z_1 = W_1 [q, k_t, q-k_t, q \odot k_t] + b_1,\quad h_i = act(z_i),\quad z_{i+1} = W_{i+1} h_i + b_{i+1}

        a = normalize(scale \cdot (w \cdot h_n + b)),\qquad out = \sum_t a_t v_t

    Neither the concatenated features nor any hidden activation is stored; backward computes them again.

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
        activation: `"sigmoid"`, `"relu"`, `"leaky_relu"`, `"prelu"`, `"silu"`, `"gelu"` (exact), `"tanh"` or
            `"identity"`.
        activation_params: for prelu a slope per hidden layer, a tensor of 1 or of H elements each; for
            leaky_relu the negative slope, 0.01 if not given.
        normalize: `"softmax"` over the history; `"exp"` or `"sigmoid"` of each score; or `"none"`.
        scale: multiplies the score before it is normalised.
        return_scores: whether to return `a` too. Not with `query_offsets`, as only the device knows its size.

    All tensors are of one floating dtype (float16, bfloat16, float32; float64 without a fused kernel) and on
    one device; under autocast they are cast to its dtype. float32 products follow
    `torch.get_float32_matmul_precision()`. Every floating argument is differentiable, once. Nothing waits for the
    device, but for candidates that no kernel covers.

    Returns:
        `[B, Dv]` or `[N, Dv]`, zero for an empty history; with `return_scores` also `a`, `[T]`, zero for slack.

    Raises:
        TypeError: for a dtype that is not supported, or dtypes that disagree.
        ValueError: for shapes or devices that disagree, or an option that does not exist.
        NotImplementedError: for an option that is not built yet, by name.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018.
    """
    weights, biases = list(weights), list(biases)
    slopes, negative_slope = _activation_params(activation, activation_params, len(weights) - 1)
    expect_tensor("keys", keys)
    query, keys, values, *layers = autocast(keys.device, query, keys, values, *weights, *biases, *slopes)
    weights, biases, slopes = (
        layers[: len(weights)],
        layers[len(weights) :][: len(biases)],
        layers[len(weights) + len(biases) :],
    )
    check_choice("normalize", normalize, NORMALIZATIONS)
    _check_histories(query, keys, offsets, values, query_offsets, rows)
    if sparse_grad and rows is None:
        raise ValueError("sparse_grad: expected False, since no rows are given")
    if return_scores and query_offsets is not None:
        raise ValueError("return_scores: expected False, since query_offsets are given")
    _check_layers(query, weights, biases, slopes, features)
    if checks.VALIDATE:
        _validate(keys, offsets, query, query_offsets, rows)
    out, attention, *_ = _op.forward_op(
        query,
        keys,
        offsets,
        values,
        query_offsets,
        rows,
        weights,
        biases,
        slopes,
        unique_rows,
        sparse_grad,
        list(features),
        activation,
        negative_slope,
        normalize,
        float(scale),
        return_scores,
        requested_backend(),
    )
    return (out, attention) if return_scores else out


def _check_histories(
    query: Tensor,
    keys: Tensor,
    offsets: Tensor,
    values: Tensor | None,
    query_offsets: Tensor | None,
    rows: Tensor | None,
) -> None:
    check_tensor("keys", keys, ("T", "D"), like=keys)
    if keys.dtype not in checks.DTYPES:
        raise TypeError(f"keys: expected one of {', '.join(map(str, checks.DTYPES))}, got {keys.dtype}")
    if keys.shape[1] == 0:
        raise ValueError(f"keys: expected a width of at least 1, got {list(keys.shape)}")
    expect_tensor("offsets", offsets)
    check_offsets("offsets", offsets, keys.device)
    queries: int | str = offsets.numel() - 1
    if query_offsets is not None:
        expect_tensor("query_offsets", query_offsets)
        check_offsets("query_offsets", query_offsets, keys.device)
        if query_offsets.numel() != offsets.numel():
            raise ValueError(
                f"query_offsets: expected {offsets.numel()} elements, as offsets, got {query_offsets.numel()}"
            )
        queries = "N"
    check_tensor("query", query, (queries, keys.shape[1]), like=keys)
    if values is not None:
        check_tensor("values", values, (keys.shape[0], "Dv"), like=keys)
    if rows is not None:
        expect_tensor("rows", rows)
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rows: expected int32 or int64, got {rows.dtype}")
        if rows.dim() != 1:
            raise ValueError(f"rows: expected shape [T], got {list(rows.shape)}")
        if rows.device != keys.device:
            raise ValueError(f"rows: expected device {keys.device}, as the keys, got {rows.device}")


def _validate(
    keys: Tensor, offsets: Tensor, query: Tensor, query_offsets: Tensor | None, rows: Tensor | None
) -> None:
    """Checks what only the device knows."""
    Jagged(keys if rows is None else rows, offsets).validate()
    if query_offsets is not None:
        Jagged(query, query_offsets).validate()
    if rows is not None:
        read = rows[: int(offsets[-1])]
        if read.numel() and not 0 <= int(read.min()) <= int(read.max()) < keys.shape[0]:
            raise ValueError(
                f"rows: expected 0 to {keys.shape[0] - 1}, got {int(read.min())} to {int(read.max())}"
            )


def _check_layers(
    query: Tensor, weights: list[Tensor], biases: list[Tensor], slopes: list[Tensor], features: Sequence[str]
) -> None:
    if isinstance(features, str) or not features or len(set(features)) != len(features):
        raise ValueError(f"features: expected distinct names out of {', '.join(FEATURES)}, got {features!r}")
    for feature in features:
        check_choice("features", feature, FEATURES)
    if len(weights) < 2:
        raise ValueError(
            f"weights: expected at least one hidden layer and the last, got {len(weights)} tensor(s)"
        )
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)} tensors, one per weight, got {len(biases)}")
    width: int = len(features) * query.shape[1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        height: int | str = 1 if layer == len(weights) - 1 else "H"
        check_tensor(f"weights[{layer}]", weight, (height, width), like=query)
        check_tensor(f"biases[{layer}]", bias, (weight.shape[0],), like=query)
        if layer < len(slopes):
            expect_tensor(f"activation_params[{layer}]", slopes[layer])
            slope_size = 1 if slopes[layer].numel() == 1 else weight.shape[0]
            check_tensor(f"activation_params[{layer}]", slopes[layer], (slope_size,), like=query)
        width = weight.shape[0]


def _activation_params(
    activation: str, params: Sequence[Tensor] | float | None, layers: int
) -> tuple[list[Tensor], float]:
    """The slopes of prelu, one tensor per hidden layer, and the one of leaky_relu."""
    check_choice("activation", activation, ACTIVATIONS, planned=("dice",))
    if activation == "prelu":
        if params is None or isinstance(params, float | int) or len(params) != layers:
            got = len(params) if isinstance(params, Sequence) else params
            raise ValueError(
                f"activation_params: expected {layers} slopes for prelu, one per hidden layer, got {got}"
            )
        return list(params), 0.0
    if activation == "leaky_relu":
        if params is not None and not isinstance(params, float | int):
            raise TypeError(
                f"activation_params: expected a float for leaky_relu, got {type(params).__name__}"
            )
        return [], 0.01 if params is None else float(params)
    if params is not None:
        raise ValueError(f"activation_params: expected None for {activation}, got {type(params).__name__}")
    return [], 0.0
