"""DIN's activation unit as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.jagged import Jagged, unpack
from recattn.nn.twin import Twin
from recattn.reference import activation_unit_padded


class ActivationUnit(Twin):
    r"""Pools each history by how much its items matter to the query, which a small MLP decides.

    .. math::
        out = \sum_t a_t v_t,\qquad a = normalize(scale \cdot MLP([q, k_t, q-k_t, q \odot k_t]))

    Args:
        dim: D, the width of query and keys.
        hidden: the widths of the hidden layers.
        activation: see `recattn.functional.activation_unit`; prelu learns one slope per unit.
        normalize: `"softmax"` over the history, or `"none"`.
        scale: multiplies the score before it is normalised.
        features: which of `"q"`, `"k"`, `"q-k"`, `"q*k"` the MLP sees, in this order.
        negative_slope: of leaky_relu.
        device, dtype: of the parameters.

    Parameters are those of `layers`, a list of `nn.Linear`, and for prelu of `slopes`.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (80, 40),
        *,
        activation: str = "sigmoid",
        normalize: str = "softmax",
        scale: float = 1.0,
        features: Sequence[str] = functional.FEATURES,
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"dim, hidden: expected positive widths, got {dim} and {tuple(hidden)}")
        functional.check_choice("activation", activation, functional.ACTIVATIONS)
        functional.check_choice("normalize", normalize, functional.NORMALIZATIONS)
        sizes = [len(features) * dim, *hidden, 1]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            nn.Linear(n, m, **factory) for n, m in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.slopes = nn.ParameterList(
            nn.Parameter(torch.full((size,), 0.25, **factory)) for size in hidden if activation == "prelu"
        )
        self.dim, self.activation, self.normalize, self.scale = dim, activation, normalize, scale
        self.features, self.negative_slope = tuple(features), negative_slope

    def forward(
        self,
        query: Tensor,
        keys: Jagged | Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        values: Tensor | None = None,
        return_scores: bool = False,
    ) -> Any:
        """Pools the histories.

        Args:
            query: `[B, D]`.
            keys: the histories: a `Jagged` of `[T, D]`; a nested tensor (layout torch.jagged) `[B, *, D]`; or
                padded, `[B, L, D]`, together with
            lengths: `[B]` integers, for right padding, or
            mask: `[B, L]`, bool or integers, non-zero where an item counts, in any pattern.
            values: what is pooled instead of the keys, in the layout of the keys but of any width.
            return_scores: whether to return the attention too.

        Returns:
            `[B, Dv]`, zero for an empty history; with `return_scores` also the attention, in the layout of the
            keys: Jagged or nested `[T]`, or `[B, L]` with 0 at the padding.

        Raises:
            TypeError, ValueError: as `recattn.functional.activation_unit`, and if lengths or a mask come with
                keys that are not padded, or neither with keys that are.
        """
        padded = isinstance(keys, Tensor) and not keys.is_nested
        if not padded and (lengths is not None or mask is not None):
            raise ValueError("lengths, mask: expected None, since keys are not padded")
        if isinstance(keys, Tensor) and not keys.is_nested and keys.dim() != 3:
            raise ValueError(f"keys: expected [B, L, D], got {list(keys.shape)}")
        history = _to_jagged(keys, lengths, mask)
        if query.shape != (history.batch_size, self.dim):
            raise ValueError(
                f"query: expected shape [{history.batch_size}, {self.dim}], got {list(query.shape)}"
            )
        pooled = None if values is None else _to_jagged(values, lengths, mask).values
        compute = self._eager if self.implementation == "eager" else self._fused
        result = compute(query, history, pooled, return_scores)
        if not return_scores:
            return result
        out, attention = result
        if isinstance(keys, Jagged):
            return out, history.with_values(attention)
        if not padded:
            return out, history.with_values(attention).to_nested()
        return out, unpack(attention, _valid(keys, lengths, mask))

    def _arguments(self) -> dict[str, Any]:
        slope: Any = None
        if self.activation == "prelu":
            slope = list(self.slopes)
        elif self.activation == "leaky_relu":
            slope = self.negative_slope
        return {
            "weights": [layer.weight for layer in self.layers],
            "biases": [layer.bias for layer in self.layers],
            "features": self.features,
            "activation": self.activation,
            "activation_params": slope,
            "normalize": self.normalize,
            "scale": self.scale,
        }

    def _fused(self, query: Tensor, history: Jagged, values: Tensor | None, return_scores: bool) -> Any:
        return functional.activation_unit(
            query,
            history.values,
            history.offsets,
            values=values,
            return_scores=return_scores,
            **self._arguments(),
        )

    def _eager(self, query: Tensor, history: Jagged, values: Tensor | None, return_scores: bool) -> Any:
        keys = history.to_padded()
        mask = torch.arange(keys.shape[1], device=keys.device) < history.lengths[:, None]
        out, attention = activation_unit_padded(
            query,
            keys,
            mask,
            values=None if values is None else history.with_values(values).to_padded(),
            return_scores=True,
            **self._arguments(),
        )
        if not return_scores:
            return out
        position = torch.arange(history.values.shape[0], device=keys.device)
        sequence = history.segment_ids()
        padded_row = sequence * keys.shape[1] + position - history.offsets[sequence]
        flat = torch.nn.functional.pad(attention.reshape(-1), (0, 1))  # the last for slack rows
        return out, flat[torch.where(sequence < history.batch_size, padded_row, flat.numel() - 1)]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, activation={self.activation!r}, normalize={self.normalize!r}, scale={self.scale}"


def _to_jagged(x: Jagged | Tensor, lengths: Tensor | None, mask: Tensor | None) -> Jagged:
    if isinstance(x, Jagged):
        return x
    if x.is_nested:
        return Jagged.from_nested(x)
    return Jagged.from_padded(x, lengths=lengths, mask=mask)


def _valid(keys: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return mask != 0
    assert lengths is not None
    return torch.arange(keys.shape[1], device=keys.device) < lengths[:, None]
