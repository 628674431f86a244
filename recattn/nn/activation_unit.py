"""DIN's activation unit as a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.functional.activation_unit_checks import check_features
from recattn.functional.checks import check_dropout, check_number, expect_tensor
from recattn.jagged import Jagged
from recattn.nn.batch_norm import Dice, Moments, UnitNorm
from recattn.nn.histories import Histories
from recattn.nn.twin import Twin
from recattn.ops.dropout import Dropout
from recattn.reference import activation_unit_padded
from recattn.reference.activation_unit import Activation, activate, drop, rows_of
from recattn.reference.activation_unit_statistics import moments as moments_of


class ActivationUnit(Twin):
    r"""Pools each history by how much its items matter to the query, which a small MLP decides.

    .. math::
        out = \sum_t a_t v_t,\qquad a = normalize(scale \cdot MLP([q, k_t, q-k_t, q \odot k_t]))

    Args:
        dim: D, the width of query and keys.
        hidden: the widths of the hidden layers.
        activation: see `recattn.functional.activation_unit`; prelu learns one slope per unit, dice one alpha.
        normalize: `"softmax"` over the history, or `"none"`.
        scale: multiplies the score before it is normalised.
        features: which of `"q"`, `"k"`, `"q-k"`, `"q*k"` the MLP sees, in this order.
        negative_slope: of leaky_relu.
        batch_norm: whether hidden layers are batch-normalised before the activation; or options of `nn.BatchNorm1d`.
        dropout: the probability that training drops a hidden unit, after the activation.
        dice: options of the `nn.BatchNorm1d` inside Dice; by default `{"eps": 1e-8, "affine": False}`.
        device, dtype: of the parameters.

    Parameters are those of `layers`, a list of `nn.Linear`; for prelu of `slopes`; and of `norms` and `gates`, for
    batch norm and Dice one per hidden layer. Their statistics are of the items that count, without padding.

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
        batch_norm: bool | Mapping[str, Any] = False,
        dropout: float = 0.0,
        dice: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"dim, hidden: expected positive widths, got {dim} and {tuple(hidden)}")
        functional.check_choice("activation", activation, functional.ACTIVATIONS)
        functional.check_choice("normalize", normalize, functional.NORMALIZATIONS)
        check_features(features)
        check_number("scale", scale)
        check_dropout(dropout)
        if dice is not None and activation != "dice":
            raise ValueError(f"dice: expected None, since the activation is {activation}, got {dice}")
        sizes = [len(features) * dim, *hidden, 1]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            nn.Linear(n, m, **factory) for n, m in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.slopes = nn.ParameterList(
            nn.Parameter(torch.full((size,), 0.25, **factory)) for size in hidden if activation == "prelu"
        )
        options = batch_norm if isinstance(batch_norm, Mapping) else {}
        normed = hidden if batch_norm is not False else ()
        self.norms = nn.ModuleList(UnitNorm(size, **options, **factory) for size in normed)
        self.gates = nn.ModuleList(
            Dice(size, **(dice or {}), **factory) for size in hidden if activation == "dice"
        )
        self.dropout = dropout
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
        expect_tensor("query", query)
        history = Histories.of(keys, values, lengths, mask, table)
        queries = history.offsets.numel() - 1 if query_offsets is None else "N"
        if query.dim() != 2 or query.shape[1] != self.dim or queries not in ("N", query.shape[0]):
            raise ValueError(f"query: expected shape [{queries}, {self.dim}], got {list(query.shape)}")
        noise: dict[str, Any] = {}
        if self.training and self.dropout:
            seed = torch.empty(1, dtype=torch.int64, device=query.device).random_()
            noise = {"dropout": self.dropout, "seed": seed}
        if self.implementation == "eager":
            result = self._eager(query, history, query_offsets, return_scores, **noise)
        else:
            data = {
                "query": query,
                "keys": history.keys,
                "offsets": history.offsets,
                "query_offsets": query_offsets,
                "rows": history.rows,
                "unique_rows": history.unique_rows,
                "sparse_grad": sparse_grad,
                **noise,
            }
            result = functional.activation_unit(
                **data,
                **self._network(partial(functional.activation_unit_statistics, **data)),
                values=history.values,
                normalize=self.normalize,
                scale=self.scale,
                return_scores=return_scores,
            )
        if not return_scores:
            return result
        out, attention = result
        return out, history.in_layout_of(keys, attention)

    def _network(self, statistics: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        """The MLP as `recattn.functional` takes it, batch norm within its weights. The `statistics` of a hidden
        layer are those of a network that ends there."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        params: list[Any] = []

        def network() -> dict[str, Any]:
            return {
                "weights": weights,
                "biases": biases,
                "features": self.features,
                "activation": self.activation,
                "activation_params": {
                    "prelu": params,
                    "dice": params,
                    "leaky_relu": self.negative_slope,
                }.get(self.activation),
            }

        linears: list[Any] = list(self.layers)
        for layer, linear in enumerate(linears):
            weights.append(linear.weight)
            biases.append(linear.bias)
            if linear is not linears[-1]:
                moments = Moments(*statistics(**network())) if self._needs_moments(layer) else None
                for norm in self._norms_of(layer):
                    scale, shift = norm.scale_and_shift(moments)
                    weights[-1], biases[-1] = weights[-1] * scale.unsqueeze(1), biases[-1] * scale + shift
                    moments = None if moments is None else moments.after(scale, shift)
                params += self._params(layer, moments)
        return network()

    def _eager(
        self,
        query: Tensor,
        history: Histories,
        query_offsets: Tensor | None,
        return_scores: bool,
        dropout: float = 0.0,
        seed: Tensor | None = None,
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
        linears: list[Any] = list(self.layers)
        out, attention = activation_unit_padded(
            query,
            keys,
            mask,
            weights=[layer.weight for layer in linears],
            biases=[layer.bias for layer in linears],
            values=padded_values,
            features=self.features,
            act=self._eager_activation(mask, Dropout.of(dropout, seed)),
            normalize=self.normalize,
            scale=self.scale,
            return_scores=True,
        )
        if not return_scores:
            return out
        position = torch.arange(items.values.shape[0], device=keys.device)
        sequence = items.segment_ids()
        padded_row = sequence * keys.shape[1] + position - items.offsets[sequence]
        flat = torch.nn.functional.pad(attention.reshape(-1), (0, 1))  # the last for slack rows
        return out, flat[torch.where(sequence < items.batch_size, padded_row, flat.numel() - 1)]

    def _eager_activation(self, mask: Tensor, dropout: Dropout | None) -> Activation:
        rows = None if dropout is None else rows_of(mask)

        def act(layer: int, z: Tensor) -> Tensor:
            moments = Moments(*moments_of(z[mask])) if self._needs_moments(layer) else None
            for norm in self._norms_of(layer):
                scale, shift = norm.scale_and_shift(moments)
                z = (scale * z + shift).to(z.dtype)
                moments = None if moments is None else moments.after(scale, shift)
            (params,) = self._params(layer, moments) or [self.negative_slope]
            return drop(activate(z, self.activation, params).to(z.dtype), layer, dropout, rows)

        return act

    def _needs_moments(self, layer: int) -> bool:
        """Whether anything normalises by the batch itself."""
        gates: list[Any] = list(self.gates[layer : layer + 1])
        return any(norm.needs_moments for norm in [*self._norms_of(layer), *(gate.bn for gate in gates)])

    def _norms_of(self, layer: int) -> list[Any]:
        """The batch norm before a hidden layer's activation, if there is one."""
        return list(self.norms[layer : layer + 1])

    def _params(self, layer: int, moments: Moments | None) -> list[Any]:
        """The parameters of a hidden layer's activation as one element, if it has any."""
        gates: list[Any] = list(self.gates[layer : layer + 1])
        return [*self.slopes[layer : layer + 1], *(gate.params(moments) for gate in gates)]

    def example(self, like: Tensor, offsets: Tensor) -> tuple[Any, ...]:
        items = like.new_zeros(int(offsets[-1]), self.dim)
        return like.new_zeros(offsets.numel() - 1, self.dim), Jagged(items, offsets)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, activation={self.activation!r}, normalize={self.normalize!r}, scale={self.scale}"
