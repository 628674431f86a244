"""Deep Interest Evolution Network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn import functional
from recattn.data import Batch
from recattn.jagged import Jagged
from recattn.models.mlp import mlp
from recattn.models.ranking import Losses, RankingModel
from recattn.nn import ActivationUnit, AttentionalGRU, Twin
from recattn.nn.attention_weights import attention_weights

ATTENTIONS = ("bilinear", "mlp")
AUXILIARIES = ("dot", "mlp")


class DIEN(RankingModel):
    r"""Deep Interest Evolution Network: what the user was interested in at each step of the history, and how that
    evolved as far as it has to do with the target.

    .. math::
        h_t = GRU(h_{t-1}, e_t),\qquad a_t = softmax_t(h_t^T W q),\qquad
        h'_t = (1 - u_t) \odot h'_{t-1} + u_t \odot n_t,\qquad logit = MLP([e_{user}, q, h'_L])

    where :math:`e_t` is item t of the history and q the target, both `[e_item, e_category]`, and n and u are the
    candidate state and the update of `kind`, which reads :math:`h_t` and :math:`a_t`: see
    `recattn.functional.attentional_gru`. With `"gru"` attention is over :math:`h'_t`, whose weighted sum stands for
    the last state. An auxiliary loss asks each state of the extractor to tell the next item from another:

    .. math::
        loss = BCE + \frac{\alpha}{N} \sum_{t+1 \le L}
            -\log \sigma(s(h_t, e_{t+1})) - \log(1 - \sigma(s(h_t, \hat e_{t+1}))),\qquad s(h, e) = h \cdot e

    over the N steps of all histories, where :math:`\hat e` is drawn anew in each call from all items of the histories
    in the batch, as often as they are there. Where it is the next item itself, its term is left out.

    Args:
        num_users, num_items, num_categories, dim: see `RankingModel`. States are `2 * dim` wide.
        kind: of the cell of the evolution, `"gru"`, `"agru"`, `"aigru"` or `"augru"`.
        update: of that cell; see `recattn.functional.attentional_gru`.
        reset_after: of both recurrences.
        attention: `"bilinear"`, or `"mlp"` for an activation unit of :math:`PReLU(W q + b)` and :math:`h_t`.
        attention_hidden: the widths of its hidden layers.
        auxiliary: s, `"dot"`, or `"mlp"` for one of `[h, e]` with hidden layers of 100 and 50 and sigmoids.
        auxiliary_weight: :math:`\alpha`; without it the loss is that of the labels alone.
        hidden: the widths of the hidden layers of the head, PReLU each.
        dropout: behind each of them.

    Raises:
        ValueError: for an id count or width below 1, a negative weight, or an option that does not exist.

    Source: Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction", AAAI 2019, which sums
    the auxiliary loss over steps where here is a mean, so that its weight does not depend on lengths. The authors'
    code has `attention="mlp"`, `auxiliary="mlp"`, `update="official"` and `reset_after=False`, and differs beyond that:
    batch normalisation in front of the auxiliary network and of the head, whose units are Dice; a mean of the
    auxiliary loss over padding too; and a head that also reads the sum of the history, alone and times the target.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_categories: int,
        *,
        dim: int = 32,
        kind: str = "augru",
        update: str = "paper",
        reset_after: bool = True,
        attention: str = "bilinear",
        attention_hidden: Sequence[int] = (80, 40),
        auxiliary: str = "dot",
        auxiliary_weight: float = 1.0,
        hidden: Sequence[int] = (200, 80),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_users, num_items, num_categories, dim)
        if not auxiliary_weight >= 0:
            raise ValueError(f"auxiliary_weight: expected at least 0, got {auxiliary_weight}")
        width = 2 * dim
        self.extractor = AttentionalGRU(width, width, kind="gru", reset_after=reset_after)
        self.attention = InterestAttention(width, attention, attention_hidden)
        self.evolution = AttentionalGRU(width, width, kind=kind, update=update, reset_after=reset_after)
        self.auxiliary = NextItemLoss(width, auxiliary)
        self.auxiliary_weight = auxiliary_weight
        self.head = mlp(5 * dim, hidden, dropout=dropout)

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        user, target, history = self.embedding(batch)
        interests, _ = self.extractor(history)
        return self._logits(user, target, interests)

    def losses(self, batch: Batch) -> Losses:
        """The mean binary cross-entropy of the labels, and to it the weighted auxiliary loss."""
        user, target, history = self.embedding(batch)
        interests, _ = self.extractor(history)
        logits = self._logits(user, target, interests)
        loss = F.binary_cross_entropy_with_logits(logits, batch.label)
        if not self.auxiliary_weight:
            return Losses(loss, loss)
        auxiliary = self.auxiliary(interests, history, batch.history.values)
        return Losses(loss + self.auxiliary_weight * auxiliary, loss)

    def _logits(self, user: Tensor, target: Tensor, interests: Jagged) -> Tensor:
        if self.evolution.kind == "gru":
            states, _ = self.evolution(interests)
            weights = self.attention(target, states)
            final = states.with_values(weights.values.unsqueeze(1) * states.values).sum()
        else:
            _, final = self.evolution(interests, self.attention(target, interests))
        return self.head(torch.cat([user, target, final], dim=1)).squeeze(1)


class InterestAttention(Twin):
    """How much each target attends to the states of its history: a softmax over bilinear scores, or those of an
    activation unit."""

    def __init__(self, width: int, score: str, hidden: Sequence[int]) -> None:
        super().__init__()
        functional.check_choice("attention", score, ATTENTIONS)
        self.unit: ActivationUnit | None = None
        if score == "bilinear":
            self.query: nn.Module = nn.Linear(width, width, bias=False)
        else:
            self.query = nn.Sequential(nn.Linear(width, width), nn.PReLU(width, init=0.1))
            self.unit = ActivationUnit(width, hidden)

    def forward(self, target: Tensor, states: Jagged) -> Jagged:
        """Targets `[B, W]` and states `[T, W]` to weights `[T]`."""
        query = self.query(target)
        if self.unit is not None:
            return self.unit(query, states, return_scores=True)[1]
        if self.implementation == "fused":
            return states.with_values(attention_weights(query, states))
        padded, mask = _padded(states)
        scores = torch.bmm(padded, query.unsqueeze(2)).squeeze(2).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(1).masked_fill(~mask, 0)
        return Jagged.from_padded(weights, mask=mask, total=states.values.shape[0])


class NextItemLoss(Twin):
    """How well states tell the next item of a history from one that is drawn: the mean over all steps."""

    def __init__(self, width: int, score: str) -> None:
        super().__init__()
        functional.check_choice("auxiliary", score, AUXILIARIES)
        self.network: nn.Sequential | None = None
        if score == "mlp":
            sizes = (2 * width, 100, 50)
            layers = (
                nn.Sequential(nn.Linear(n, m), nn.Sigmoid())
                for n, m in zip(sizes[:-1], sizes[1:], strict=True)
            )
            self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, states: Jagged, items: Jagged, ids: Tensor) -> Tensor:
        """A scalar, 0 if no history has two items, of states and items `[T, W]` and the items' ids `[T]`."""
        drawn = draw(items)
        # Through a lookup, whose gradient is deterministic on a GPU, as that of an index_select is not.
        others = items.with_values(F.embedding(drawn, items.values))
        differ = items.with_values(ids[drawn] != ids.roll(-1))
        if self.implementation == "fused":
            owner = items.segment_ids()
            step = (owner[:-1] == owner[1:]) & (owner[1:] < items.batch_size)
            now, then = slice(None, -1), slice(1, None)
            losses = self._losses(
                states.values[now], items.values[then], others.values[now], differ.values[now]
            )
        else:
            step = _padded(items)[1][:, 1:]
            losses = self._losses(
                states.to_padded()[:, :-1],
                items.to_padded()[:, 1:],
                others.to_padded()[:, :-1],
                differ.to_padded()[:, :-1],
            )
        return torch.where(step, losses, 0).sum() / step.sum().clamp_min(1)

    def _losses(self, states: Tensor, items: Tensor, others: Tensor, differ: Tensor) -> Tensor:
        is_next = F.softplus(-self._score(states, items))
        is_not = F.softplus(self._score(states, others))
        return is_next + is_not * differ

    def _score(self, states: Tensor, items: Tensor) -> Tensor:
        if self.network is None:
            return torch.linalg.vecdot(states, items)
        return self.network(torch.cat([states, items], dim=-1)).squeeze(-1)


def draw(history: Jagged) -> Tensor:
    """`[T]` int64, for each row one drawn evenly from those of all histories."""
    total, count = history.values.shape[0], history.offsets[-1].to(torch.int64)
    draws = torch.rand(total, dtype=torch.float64, device=history.device)
    return torch.minimum((draws * count).to(torch.int64), count - 1).clamp_min(0)


def _padded(x: Jagged) -> tuple[Tensor, Tensor]:
    """`[B, L, ...]`, and the mask `[B, L]` of what counts."""
    padded = x.to_padded()
    return padded, torch.arange(padded.shape[1], device=x.device) < x.lengths[:, None]
