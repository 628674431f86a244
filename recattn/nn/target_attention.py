"""Attention of targets over their histories, by any of the usual similarities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.functional.target_attention import NORMALIZATIONS
from recattn.jagged import Jagged
from recattn.nn.activation_unit import ActivationUnit
from recattn.nn.histories import as_jagged, expect_sequences, padded_values
from recattn.nn.twin import Twin
from recattn.reference import target_attention_padded

PRODUCTS = ("dot", "scaled_dot", "bilinear")
NETWORKS = ("additive", "concat", "mlp")
SCORES = PRODUCTS + NETWORKS


class TargetAttention(Twin):
    r"""Pools each history by the similarity of its items to the query: `out = Σ_t normalize(s)_t v_t`, where s is

    ==============  =====================================  ====================================
    `"dot"`         :math:`q \cdot k`
    `"scaled_dot"`  :math:`q \cdot k / \sqrt{d}`           d the width of a head
    `"bilinear"`    :math:`q^T W k`                        `projection`, square, no bias
    `"additive"`    :math:`w \cdot \tanh(U q + V k + b)`   a score network, see `unit`
    `"concat"`      :math:`w \cdot \tanh(W [q; k] + b)`    the same function, W = [U | V]
    `"mlp"`         DIN's, of :math:`[q, k, q-k, q*k]`     `unit`, an `ActivationUnit`
    ==============  =====================================  ====================================

    Args:
        dim: width of query and keys.
        score: one of the above.
        num_heads: of the products; networks have one.
        normalize: `"softmax"` over the history, `"none"`, and for products `"exp"` or `"sigmoid"`.
        hidden: widths of a network's hidden layers; `(dim,)` for additive and concat if not given, `(80, 40)` for mlp.
        device, dtype: of the parameters.

    Source: Bahdanau et al., ICLR 2015 (additive); Luong et al., EMNLP 2015 (dot, general, concat); Vaswani et al.,
    NeurIPS 2017 (scaled dot); Zhou et al., KDD 2018 (DIN).
    """

    def __init__(
        self,
        dim: int,
        score: str = "scaled_dot",
        *,
        num_heads: int = 1,
        normalize: str = "softmax",
        hidden: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        functional.check_choice("score", score, SCORES)
        functional.check_choice("normalize", normalize, NORMALIZATIONS)
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(
                f"dim, num_heads: expected a positive multiple of the heads, got {dim}, {num_heads}"
            )
        if score in PRODUCTS and hidden is not None:
            raise ValueError(f"hidden: expected None for {score}, got {tuple(hidden)}")
        if score in NETWORKS and num_heads > 1:
            raise ValueError(f"num_heads: expected 1 for {score}, got {num_heads}")
        self.dim, self.score, self.num_heads, self.normalize = dim, score, num_heads, normalize
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.projection = nn.Linear(dim, dim, bias=False, **factory) if score == "bilinear" else None
        self.unit: ActivationUnit | None = None
        if score == "mlp":
            self.unit = ActivationUnit(dim, hidden or (80, 40), normalize=normalize, **factory)
        elif score in NETWORKS:
            self.unit = ActivationUnit(
                dim, hidden or (dim,), activation="tanh", features=("q", "k"), normalize=normalize, **factory
            )

    def forward(
        self,
        query: Tensor,
        keys: Jagged | Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        values: Jagged | Tensor | None = None,
        query_offsets: Tensor | None = None,
    ) -> Tensor:
        """Pools the histories.

        Args:
            query: `[B, D]`, or with `query_offsets` `[N, D]`, the candidates of all histories.
            keys: the histories: a `Jagged` of `[T, D]`; a nested tensor (layout torch.jagged) `[B, *, D]`; or
                padded, `[B, L, D]`, together with
            lengths: `[B]` integers, for right padding, or
            mask: `[B, L]`, bool or integers, non-zero where an item counts, in any pattern.
            values: what is pooled instead of the keys, in their layout but of any width.
            query_offsets: `[B + 1]`: candidates `query_offsets[b]` to `query_offsets[b + 1]` share history b.

        Returns:
            `[B, Dv]` or `[N, Dv]`, zero for an empty history.

        Raises:
            TypeError, ValueError: as `recattn.functional.target_attention`, and if lengths or a mask come with keys
                that are not padded, or neither with keys that are.
        """
        if self.unit is not None:
            pooled: Tensor = self.unit(
                query, keys, lengths=lengths, mask=mask, values=values, query_offsets=query_offsets
            )
            return pooled
        functional.checks.expect_tensor("query", query)
        expect_sequences("keys", keys)
        if values is not None:
            expect_sequences("values", values)
        padded = isinstance(keys, Tensor) and not keys.is_nested
        if not padded and (lengths is not None or mask is not None):
            raise ValueError("lengths, mask: expected None, since keys are not padded")
        if padded and keys.dim() != 3:  # type: ignore[union-attr]
            raise ValueError(f"keys: expected [B, L, D], got {list(keys.shape)}")  # type: ignore[union-attr]
        if isinstance(keys, Tensor) and padded:
            padded_values(keys, values)
        history = as_jagged(keys, lengths, mask)
        pooled_rows = history if values is None else as_jagged(values, lengths, mask)
        if self.projection is not None:  # qᵀ W k is the product of k with Wᵀ q
            query = self.projection(query)
        compute = self._eager if self.implementation == "eager" else self._fused
        return compute(query, history, pooled_rows.values, query_offsets)

    def _options(self) -> dict[str, Any]:
        scale = None if self.score == "scaled_dot" else 1.0
        return {"num_heads": self.num_heads, "scale": scale, "normalize": self.normalize}

    def _fused(self, query: Tensor, history: Jagged, values: Tensor, query_offsets: Tensor | None) -> Tensor:
        out = functional.target_attention(
            query, history.values, values, history.offsets, query_offsets=query_offsets, **self._options()
        )
        assert isinstance(out, Tensor)
        return out

    def _eager(self, query: Tensor, history: Jagged, values: Tensor, query_offsets: Tensor | None) -> Tensor:
        keys = history.to_padded()
        mask = torch.arange(keys.shape[1], device=keys.device) < history.lengths[:, None]
        targets = query.unsqueeze(1)
        if query_offsets is not None:
            groups = Jagged(query, query_offsets)
            targets = groups.to_padded()
            chosen = torch.arange(targets.shape[1], device=keys.device) < groups.lengths[:, None]
        out, _ = target_attention_padded(
            targets, keys, history.with_values(values).to_padded(), mask, **self._options()
        )
        return out.squeeze(1) if query_offsets is None else out[chosen]

    def example(self, like: Tensor, offsets: Tensor) -> tuple[Any, ...]:
        items = like.new_zeros(int(offsets[-1]), self.dim)
        return like.new_zeros(offsets.numel() - 1, self.dim), Jagged(items, offsets)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, score={self.score!r}, num_heads={self.num_heads}, normalize={self.normalize!r}"
        )
