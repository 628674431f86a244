"""A log of who rated what and when, and the training examples that it holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recattn.data.examples import Examples

HISTORIES = ("all", "positive")


@dataclass(frozen=True, eq=False)
class Interactions:
    """N interactions, sorted by user and then time. Ids are dense and begin at 0.

    Args:
        user: `[N]` int64.
        item: `[N]` int64.
        rating: `[N]` float.
        timestamp: `[N]` int64, in seconds.
        item_category: `[num_items]` int64.

    Raises:
        ValueError: for columns of different lengths, no rows, or rows out of order.
    """

    user: Tensor
    item: Tensor
    rating: Tensor
    timestamp: Tensor
    item_category: Tensor

    def __post_init__(self) -> None:
        if self.user.dim() != 1 or self.user.numel() == 0:
            raise ValueError(f"user: expected [N] with at least one row, got {list(self.user.shape)}")
        for name in ("item", "rating", "timestamp"):
            shape = getattr(self, name).shape
            if shape != self.user.shape:
                raise ValueError(f"{name}: expected {list(self.user.shape)}, as user, got {list(shape)}")
        backwards = (self.user.diff() == 0) & (self.timestamp.diff() < 0)
        if bool(((self.user.diff() < 0) | backwards).any()):
            raise ValueError("user, timestamp: expected rows sorted by user and then time; see from_log")

    @staticmethod
    def from_log(
        user: Tensor, item: Tensor, rating: Tensor, timestamp: Tensor, item_category: Tensor
    ) -> Interactions:
        """From rows in any order; those of one user at one time keep the order that they have."""
        order = torch.argsort(timestamp, stable=True)
        order = order[torch.argsort(user[order], stable=True)]
        return Interactions(user[order], item[order], rating[order], timestamp[order], item_category)

    def __len__(self) -> int:
        return self.user.numel()

    @property
    def num_users(self) -> int:
        return int(self.user[-1]) + 1

    @property
    def num_items(self) -> int:
        return self.item_category.numel()

    @property
    def num_categories(self) -> int:
        return int(self.item_category.max()) + 1

    def examples(
        self, *, positive: float = 4.0, history: str = "all", max_history: int | None = None
    ) -> Examples:
        """One example per interaction: would the user like this item, given what came before?

        The history is what the user did strictly before the target's timestamp. Interactions at that same
        timestamp are not part of it: logs stamp several at once (three out of four share theirs in
        MovieLens-100K), in no order that means anything, and whoever has to predict one has not seen the
        others.

        Args:
            positive: ratings of at least this are labelled 1, the others 0, as in DIN's MovieLens experiment.
            history: `"all"`, every earlier interaction, liked or not: what the user chose to watch is
                behaviour, as a click is; or `"positive"`, the liked ones only.
            max_history: keeps the most recent; None keeps all.

        Raises:
            ValueError: for another `history`, or a `max_history` below 1.
        """
        if history not in HISTORIES:
            raise ValueError(f"history: expected one of {', '.join(HISTORIES)}, got {history!r}")
        if max_history is not None and max_history < 1:
            raise ValueError(f"max_history: expected at least 1, or None, got {max_history}")
        liked = self.rating >= positive
        kept = torch.ones_like(liked) if history == "all" else liked
        # How many kept rows come before each row, and so where a run of rows begins among the kept ones.
        before = kept.cumsum(0) - kept.to(torch.int64)
        begin = before[_run_starts(self.user)]
        end = before[_run_starts(self.user, self.timestamp)]
        if max_history is not None:
            begin = torch.maximum(begin, end - max_history)
        return Examples(
            user=self.user,
            item=self.item,
            category=self.item_category[self.item],
            label=liked.to(torch.float32),
            timestamp=self.timestamp,
            begin=begin,
            end=end,
            history_item=self.item[kept],
            history_category=self.item_category[self.item[kept]],
            history_timestamp=self.timestamp[kept],
            history_liked=liked[kept],
        )

    def history_lengths(self, max_history: int | None = None) -> Tensor:
        """`[N]` int64: the length of the history of each interaction, as `examples` makes them."""
        return self.examples(max_history=max_history).history_lengths()


def _run_starts(*columns: Tensor) -> Tensor:
    """`[N]`: the first row of the run of rows, equal in all columns, that each row is in."""
    row = torch.arange(columns[0].numel())
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = torch.stack([column.diff() != 0 for column in columns]).any(0)
    return torch.where(begins, row, 0).cummax(0).values
