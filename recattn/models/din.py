"""Deep Interest Network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recattn.data import Batch
from recattn.models.mlp import mlp
from recattn.models.ranking import RankingModel
from recattn.nn import ActivationUnit


class DIN(RankingModel):
    r"""Deep Interest Network: the user's interest in this item, out of the items of the history, each weighed
    by what it has to do with this one.

    .. math::
        q = [e_{item}, e_{category}],\qquad
        p = \sum_t a_t k_t,\quad a = normalize(MLP_{att}([q, k_t, q-k_t, q \odot k_t])),\qquad
        logit = MLP([e_{user}, q, p])

    where :math:`k_t` is item t of the history, embedded by the tables that embed the target.

    Args:
        num_users, num_items, num_categories, dim: see `RankingModel`.
        attention_hidden: the widths of the hidden layers of the activation unit.
        hidden: the widths of the hidden layers of the head, PReLU each.
        activation: of the activation unit; see `recattn.nn.ActivationUnit`.
        normalize: `"softmax"`, or `"none"` for the paper's unnormalised weights.
        dropout: behind each hidden layer of the head.

    Raises:
        ValueError: for an id count or width below 1, or an option that does not exist.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018. In the paper the
    attention is not normalised, so that its sum tells how strong an interest is, and the activation unit sees
    `q`, `k` and their out product. The authors' code has the four features above, divides the scores by the
    square root of the width and takes their softmax; it has no user id, passes the pooled history through
    batch normalisation and one more linear layer, ends in a sigmoid head of 80 and 40, and adds a bias per
    item. Here: the features and the softmax of the code, without the division, under the paper's head of 200
    and 80.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_categories: int,
        *,
        dim: int = 32,
        attention_hidden: Sequence[int] = (80, 40),
        hidden: Sequence[int] = (200, 80),
        activation: str = "sigmoid",
        normalize: str = "softmax",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_users, num_items, num_categories, dim)
        self.attention = ActivationUnit(2 * dim, attention_hidden, activation=activation, normalize=normalize)
        self.head = mlp(5 * dim, hidden, dropout=dropout)

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        user, target, history = self.embedding(batch)
        pooled = self.attention(target, history)
        return self.head(torch.cat([user, target, pooled], dim=1)).squeeze(1)
