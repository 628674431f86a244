"""Attentional Factorization Machine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recattn.data import Batch
from recattn.jagged import Jagged
from recattn.models.ranking import RankingModel
from recattn.nn import PairwisePool


class AFM(RankingModel):
    r"""Attentional Factorization Machine: a factorization machine that weighs its interactions.

    .. math::
        logit = w_0 + \sum_i w_i x_i + p^T \sum_{i<j} a_{ij}\, (v_i \odot v_j)\, x_i x_j,\qquad
        a_{ij} = softmax_{i<j}\big(h \cdot relu(W (v_i \odot v_j)\, x_i x_j + b)\big)

    over five fields: user, item, category, and the items and categories of the history, each entry of which counts
    1 / L. What an empty history would say is 0.

    Args:
        num_users, num_items, num_categories, dim: see `RankingModel`; here all fields are `dim` wide.
        attention_hidden: A, the width of the attention network.
        attention_dropout: of the weights of the pairs.
        dropout: of what is pooled.

    Raises:
        ValueError: for an id count or width below 1, or a dropout outside [0, 1).

    Source: Xiao et al., "Attentional Factorization Machines: Learning the Weight of Feature Interactions via
    Attention Networks", IJCAI 2017. The authors' code divides exponentials without subtracting the maximum, which
    overflows, starts from a trained factorization machine, draws h from N(0, 1) and trains p from ones, as here; it
    has no fields of more than one entry.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_categories: int,
        *,
        dim: int = 32,
        attention_hidden: int = 16,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_users, num_items, num_categories, dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.user_weight = nn.Embedding(num_users, 1)
        self.item_weight = nn.Embedding(num_items, 1)
        self.category_weight = nn.Embedding(num_categories, 1)
        self.history_item_weight = nn.Embedding(num_items, 1)
        self.history_category_weight = nn.Embedding(num_categories, 1)
        for name, table in self.named_children():
            if name.endswith("_weight"):
                nn.init.zeros_(table.weight)  # type: ignore[arg-type]
        self.attention = PairwisePool(dim, attention_hidden, dropout=attention_dropout)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        user, target, history = self.embedding(batch)
        fields = torch.stack([user, *target.chunk(2, 1), *history.mean().chunk(2, 1)], dim=1)  # [B, 5, dim]
        pooled = self.attention(fields)
        return self.bias + self._linear(batch) + self.dropout(pooled) @ self.projection

    def _linear(self, batch: Batch) -> Tensor:
        """`[B]`, the part of a linear model."""

        def mean(table: nn.Module, ids: Jagged) -> Tensor:
            return ids.with_values(table(ids.values)).mean()

        weights = (
            self.user_weight(batch.user),
            self.item_weight(batch.item),
            self.category_weight(batch.category),
            mean(self.history_item_weight, batch.history),
            mean(self.history_category_weight, batch.history_category),
        )
        return torch.cat(weights, 1).sum(1)
