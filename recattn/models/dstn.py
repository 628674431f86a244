"""Deep Spatio-Temporal Network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recattn.data import Batch
from recattn.functional import check_choice
from recattn.jagged import Jagged, select_rows
from recattn.models.mlp import mlp
from recattn.models.ranking import RankingModel
from recattn.nn import ActivationUnit

VARIANTS = ("pooling", "self", "interactive")


class DSTN(RankingModel):
    r"""Deep Spatio-Temporal Network: what was shown just before, what the user clicked and what not, as three sets
    that are pooled each on its own.

    .. math::
        m = [e_{user}, q, x_c, x_l, x_u],\qquad logit = MLP(m)

    with :math:`q = [e_{item}, e_{category}]` and for each set, over its items :math:`x_i`, embedded alike, by variant

    ===============  ==================================================================================
    `"pooling"`      :math:`x = \sum_i x_i`
    `"self"`         :math:`x = \sum_i softmax_i(h^T ReLU(W x_i + b_1) + b_2)\, x_i`
    `"interactive"`  :math:`x = \sum_i \exp(h^T ReLU(W [q; x_i] + b_1) + b_2)\, x_i`
    ===============  ==================================================================================

    Each set has weights of its own. The contextual set are the last items of the history, liked or not; the clicked
    one are the last that the user liked, and the unclicked one the last that they did not.

    Interactive weights are not normalised, so that items with nothing to do with the target need not share a weight of
    1. They begin near one over the size of a full set, which is then its mean: beginning as a sum, which tells users
    apart before it tells items, the model learns more slowly to rank what one user sees. Nor are they bounded: sums
    are accumulated in float32, but where float16 holds the result, as under its autocast, one beyond 65504 is
    infinite. bfloat16 has the range of float32.

    Args:
        num_users, num_items, num_categories, dim: see `RankingModel`.
        variant: see above.
        contextual: how many items the contextual set has at most.
        set_size: how many items the clicked and the unclicked set have at most, each.
        attention_hidden: the widths of the hidden layers that weigh an item, where anything does.
        hidden: the widths of the hidden layers of the head, PReLU each.
        dropout: behind each hidden layer of the head.

    Raises:
        ValueError: for an id count, set or width below 1, or an option that does not exist; and for a batch without
            `history_liked`.

    Source: Ouyang et al., "Deep Spatio-Temporal Neural Networks for Click-Through Rate Prediction", KDD 2019. There
    the contextual set are the ads above the target on the same page, the target's vector holds all features of user,
    query and ad, where here it is the item's and the user's goes to the head alone, and the head is of ReLU. The
    authors' code keeps up to 5 items of each set, whose padding is zero and has a weight all the same, has one hidden
    layer of 128 to weigh them, with dropout, and a head of 512 and 256.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_categories: int,
        *,
        dim: int = 32,
        variant: str = "interactive",
        contextual: int = 10,
        set_size: int = 100,
        attention_hidden: Sequence[int] = (128,),
        hidden: Sequence[int] = (200, 80),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_users, num_items, num_categories, dim)
        check_choice("variant", variant, VARIANTS)
        for name, size in (("contextual", contextual), ("set_size", set_size)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.variant, self.contextual, self.set_size = variant, contextual, set_size
        target_matters = variant == "interactive"
        self.pools = nn.ModuleList(
            ActivationUnit(
                2 * dim,
                attention_hidden,
                activation="relu",
                features=("q", "k") if target_matters else ("k",),
                normalize="exp" if target_matters else "softmax",
            )
            for _ in range(0 if variant == "pooling" else 3)
        )
        if target_matters:
            last_bias = f"layers.{len(attention_hidden)}.bias"
            for pool, size in zip(self.pools, (contextual, set_size, set_size), strict=True):
                nn.init.constant_(pool.get_parameter(last_bias), -math.log(size))
        self.head = mlp(9 * dim, hidden, dropout=dropout)

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        target = self.embedding.items(batch.item, batch.category)
        sets = self.sets(batch)
        if self.variant == "pooling":
            pooled = [items.sum() for items in sets]
        else:
            pooled = [pool(target, items) for pool, items in zip(self.pools, sets, strict=True)]
        return self.head(torch.cat([self.embedding.user(batch.user), target, *pooled], dim=1)).squeeze(1)

    def sets(self, batch: Batch) -> tuple[Jagged, Jagged, Jagged]:
        """The contextual, the clicked and the unclicked items of each history, `[*, 2 * dim]`."""
        if batch.history_liked is None:
            raise ValueError("history_liked: expected which items were liked, got None")
        history, liked = batch.history, batch.history_liked.values

        def embedded(mask: Tensor, size: int) -> Jagged:
            rows, offsets = select_rows(history.offsets, mask, batch.size * size)
            items = self.embedding.items(history.values[rows], batch.history_category.values[rows])
            return Jagged(items, offsets)

        return (
            embedded(history.last(self.contextual), self.contextual),
            embedded(history.last(self.set_size, liked), self.set_size),
            embedded(history.last(self.set_size, ~liked), self.set_size),
        )
