"""Training examples over a log: targets, and for each the run of rows that is its history."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from recattn.data.batch import Batch
from recattn.jagged import Jagged, offsets_of

_SHARED = ("history_item", "history_category", "history_timestamp", "history_liked")


@dataclass(frozen=True, eq=False)
class Examples:
    """E targets with their histories. That of example i is `history_item[begin[i]:end[i]]`, oldest first: a
    run of the log, so no history is ever copied until a batch needs it.

    Args:
        user, item, category: `[E]` int64, the target's.
        label: `[E]` float32, 0 or 1.
        timestamp: `[E]` int64.
        begin, end: `[E]` int64, into
        history_item, history_category, history_timestamp: `[S]` int64, sorted by user and then time.
        history_liked: `[S]` bool.
    """

    user: Tensor
    item: Tensor
    category: Tensor
    label: Tensor
    timestamp: Tensor
    begin: Tensor
    end: Tensor
    history_item: Tensor
    history_category: Tensor
    history_timestamp: Tensor
    history_liked: Tensor

    def __len__(self) -> int:
        return self.user.numel()

    def __getitem__(self, rows: Tensor) -> Examples:
        """Some of the examples, by index or mask."""
        names = [field.name for field in fields(self) if field.name not in _SHARED]
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def history_lengths(self) -> Tensor:
        """`[E]` int64."""
        return self.end - self.begin

    def split(self, test_fraction: float = 0.2) -> tuple[Examples, Examples]:
        """Training and test examples, cut at one point in time for all users.

        A model in use has seen nothing of the future of anyone. A cut per user, or a random one, would train
        it on what other users do after the test examples, which moves item popularity from the future into
        the score. The test part is the most recent `test_fraction`, with everything at the timestamp of the
        cut; a test example's history reaches back over the cut, as it would in use.

        Raises:
            ValueError: if the fraction is not in (0, 1), or leaves either part empty.
        """
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction: expected a fraction in (0, 1), got {test_fraction}")
        ordered = self.timestamp.sort().values
        cut = ordered[min(round(len(self) * (1 - test_fraction)), len(self) - 1)]
        test = self.timestamp >= cut
        if bool(test.all()):
            raise ValueError(
                f"test_fraction: expected a training part, but no timestamp of {len(self)} examples is before"
                f" the cut of {test_fraction}"
            )
        return self[~test], self[test]

    def batch(self, rows: Tensor) -> Batch:
        """The examples at these indices, `[B]` int64, in this order."""
        begin, lengths = self.begin[rows], self.end[rows] - self.begin[rows]
        offsets = offsets_of(lengths)
        total = int(offsets[-1])
        source = torch.arange(total) + torch.repeat_interleave(
            begin - offsets[:-1], lengths, output_size=total
        )
        history = Jagged(self.history_item[source], offsets)
        return Batch(
            user=self.user[rows],
            item=self.item[rows],
            category=self.category[rows],
            history=history,
            history_category=history.with_values(self.history_category[source]),
            label=self.label[rows],
            timestamp=self.timestamp[rows],
            history_timestamp=history.with_values(self.history_timestamp[source]),
            history_liked=history.with_values(self.history_liked[source]),
        )

    def batches(
        self, batch_size: int, *, seed: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """All examples once, `batch_size` at a time, the last batch with what remains.

        Args:
            seed: shuffles, each seed in its own way; None keeps the order of the log.
            device: where the batches go.

        Raises:
            ValueError: for a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if seed is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return (self.batch(rows).to(device) for rows in order.split(batch_size))
