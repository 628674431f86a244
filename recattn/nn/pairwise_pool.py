"""Attention over pairs of fields as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.nn.twin import Twin
from recattn.reference import pairwise_pool_gathered

EXAMPLE_FIELDS = 8  # kernels are the same for any number


class PairwisePool(Twin):
    r"""Pools the products of all pairs of fields by attention, as AFM does.

    .. math::
        out = \sum_{i<j} a_{ij}\, v_i \odot v_j,\qquad
        a_{ij} = softmax_{i<j}\big(h \cdot relu(W (v_i \odot v_j) + b)\big)

    Args:
        dim: K, the width of the fields.
        hidden: A, the width of the attention network.
        dropout: the probability that an attention weight is dropped in training.
        device, dtype: of the parameters.

    Parameters are those of `hidden`, an `nn.Linear` for W and b, and of `projection`, one without a bias for h.

    Source: Xiao et al., "Attentional Factorization Machines", IJCAI 2017.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 16,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim, hidden: expected at least 1, got {dim} and {hidden}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and less than 1, got {dropout}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden = nn.Linear(dim, hidden, **factory)
        self.projection = nn.Linear(hidden, 1, bias=False, **factory)
        self.dim, self.dropout = dim, dropout

    def forward(self, fields: Tensor, *, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pools `fields [B, F, K]` to `[B, K]`, zero for fewer than two fields.

        With `return_weights` also returns the attention `[B, P]`, pairs in the order of (0, 1), (0, 2), ...

        Raises:
            TypeError, ValueError: as `recattn.functional.pairwise_pool`.
        """
        compute = functional.pairwise_pool if self.implementation == "fused" else pairwise_pool_gathered
        return compute(
            fields,
            self.hidden.weight,
            self.hidden.bias,
            self.projection.weight.squeeze(0),
            dropout=self.dropout if self.training else 0.0,
            return_weights=return_weights,
        )

    def example(self, like: Tensor, offsets: Tensor) -> tuple[Any, ...]:
        return (like.new_zeros(offsets.numel() - 1, EXAMPLE_FIELDS, self.dim),)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, dropout={self.dropout}"
