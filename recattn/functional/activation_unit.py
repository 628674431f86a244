"""activation_unit, with every argument checked before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

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
        query: `[B, D]`, one target per history.
        keys: `[T, D]`, the histories end to end. Rows from `offsets[-1]` on are never read.
        offsets: `[B + 1]`, int32 or int64: history b is `keys[offsets[b]:offsets[b + 1]]`. It may be empty.
        weights: as in `nn.Linear`: `[H1, F·D]`, `[H2, H1]`, ..., `[1, Hn]`, for F features.
        biases: `[H1]`, `[H2]`, ..., `[1]`.
        values: `[T, Dv]`, what is pooled; the keys if not given.
        features: which of `"q"`, `"k"`, `"q-k"`, `"q*k"`, in the order of the blocks in the first weight.
        activation: `"sigmoid"`, `"relu"`, `"leaky_relu"`, `"prelu"`, `"silu"`, `"gelu"` (exact), `"tanh"` or
            `"identity"`.
        activation_params: for prelu a slope per hidden layer, a tensor of 1 or of H elements each; for
            leaky_relu the negative slope, 0.01 if not given.
        normalize: `"softmax"` over the history, or `"none"`.
        scale: multiplies the score before it is normalised.
        return_scores: whether to return `a` too.

    All tensors are of one floating dtype (float16, bfloat16, float32; float64 without a fused kernel) and on
    one device; under autocast they are cast to its dtype. float32 products follow
    `torch.get_float32_matmul_precision()`. Every floating argument is differentiable, once.

    Returns:
        `[B, Dv]`, zero for an empty history; with `return_scores` also `a`, `[T]`, zero for slack rows.

    Raises:
        TypeError: for a dtype that is not supported, or dtypes that disagree.
        ValueError: for shapes or devices that disagree, or an option that does not exist.
        NotImplementedError: for an option that is not built yet, by name.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018.
    """
    if query_offsets is not None:
        raise NotImplementedError("query_offsets: candidates that share a history are not built yet")
    if rows is not None:
        raise NotImplementedError("rows: keys by index are not built yet")
    weights, biases = list(weights), list(biases)
    slopes, negative_slope = _activation_params(activation, activation_params, len(weights) - 1)
    expect_tensor("keys", keys)
    query, keys, values, *layers = autocast(keys.device, query, keys, values, *weights, *biases, *slopes)
    weights, biases, slopes = (
        layers[: len(weights)],
        layers[len(weights) :][: len(biases)],
        layers[len(weights) + len(biases) :],
    )
    check_choice("normalize", normalize, NORMALIZATIONS, planned=("exp", "sigmoid"))
    _check_histories(query, keys, offsets, values)
    _check_layers(query, weights, biases, slopes, features)
    if checks.VALIDATE:
        Jagged(keys, offsets).validate()
    out, attention, *_ = _op.forward_op(
        query,
        keys,
        offsets,
        values,
        weights,
        biases,
        slopes,
        list(features),
        activation,
        negative_slope,
        normalize,
        float(scale),
        return_scores,
        requested_backend(),
    )
    return (out, attention) if return_scores else out


def _check_histories(query: Tensor, keys: Tensor, offsets: Tensor, values: Tensor | None) -> None:
    check_tensor("keys", keys, ("T", "D"), like=keys)
    if keys.dtype not in checks.DTYPES:
        raise TypeError(f"keys: expected one of {', '.join(map(str, checks.DTYPES))}, got {keys.dtype}")
    if keys.shape[1] == 0:
        raise ValueError(f"keys: expected a width of at least 1, got {list(keys.shape)}")
    expect_tensor("offsets", offsets)
    check_offsets("offsets", offsets, keys.device)
    check_tensor("query", query, (offsets.numel() - 1, keys.shape[1]), like=keys)
    if values is not None:
        check_tensor("values", values, (keys.shape[0], "Dv"), like=keys)


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
