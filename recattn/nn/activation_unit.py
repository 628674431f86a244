"""DIN's activation unit as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.jagged import Jagged
from recattn.nn.histories import Histories
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
        values: Jagged | Tensor | None = None,
        table: Tensor | None = None,
        sparse_grad: bool = False,
        query_offsets: Tensor | None = None,
        return_scores: bool = False,
    ) -> Any:
        """Pools the histories. No layout is copied into another.

        Args:
            query: `[B, D]`, or with `query_offsets` `[N, D]`.
            keys: the histories: a `Jagged` of `[T, D]`; a nested tensor (layout torch.jagged) `[B, *, D]`; or
                padded, `[B, L, D]`, together with
            lengths: `[B]` integers, for right padding, or
            mask: `[B, L]`, bool or integers, non-zero where an item counts, in any pattern.
            values: what is pooled instead of the keys, in the layout of the keys but of any width.
            table: `[R, D]`, such as the weight of an embedding. Then `keys` has ids of its rows, without the last
                dimension, the vectors of the histories never exist, and `values` may be another table.
            sparse_grad: whether the gradient of a table is sparse.
            query_offsets: `[B + 1]`: queries from `query_offsets[b]` to `query_offsets[b + 1]` share history b.
            return_scores: whether to return the attention too.

        Returns:
            `[B, Dv]` or `[N, Dv]`, zero for an empty history; with `return_scores` also the attention, in the layout
            of the keys: Jagged or nested `[T]`, or `[B, L]` with 0 at the padding.

        Raises:
            TypeError, ValueError: as `recattn.functional.activation_unit`, and if lengths or a mask come with
                keys that are not padded, or neither with keys that are.
        """
        history = Histories.of(keys, values, lengths, mask, table)
        queries = history.offsets.numel() - 1 if query_offsets is None else "N"
        if query.dim() != 2 or query.shape[1] != self.dim or queries not in ("N", query.shape[0]):
            raise ValueError(f"query: expected shape [{queries}, {self.dim}], got {list(query.shape)}")
        if self.implementation == "eager":
            result = self._eager(query, history, query_offsets, return_scores)
        else:
            result = functional.activation_unit(
                query,
                history.keys,
                history.offsets,
                values=history.values,
                query_offsets=query_offsets,
                rows=history.rows,
                unique_rows=history.unique_rows,
                sparse_grad=sparse_grad,
                return_scores=return_scores,
                **self._arguments(),
            )
        if not return_scores:
            return result
        out, attention = result
        return out, history.in_layout_of(keys, attention)

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

    def _eager(
        self, query: Tensor, history: Histories, query_offsets: Tensor | None, return_scores: bool
    ) -> Any:
        items, values = history.packed()
        keys = items.to_padded()
        mask = torch.arange(keys.shape[1], device=keys.device) < items.lengths[:, None]
        padded_values = None if values is None else items.with_values(values).to_padded()
        if query_offsets is not None:
            owner = Jagged(query, query_offsets).segment_ids()
            mask = torch.nn.functional.pad(mask, (0, 0, 0, 1))[
                owner
            ]  # the last row for queries of no history
            owner = owner.clamp_max(items.batch_size - 1)
            keys = keys[owner]
            padded_values = None if padded_values is None else padded_values[owner]
        out, attention = activation_unit_padded(
            query, keys, mask, values=padded_values, return_scores=True, **self._arguments()
        )
        if not return_scores:
            return out
        position = torch.arange(items.values.shape[0], device=keys.device)
        sequence = items.segment_ids()
        padded_row = sequence * keys.shape[1] + position - items.offsets[sequence]
        flat = torch.nn.functional.pad(attention.reshape(-1), (0, 1))  # the last for slack rows
        return out, flat[torch.where(sequence < items.batch_size, padded_row, flat.numel() - 1)]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, activation={self.activation!r}, normalize={self.normalize!r}, scale={self.scale}"
