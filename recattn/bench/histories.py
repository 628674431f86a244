"""Histories of the cases: of drawn lengths, or out of a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recattn.bench.task import Case, Setting
from recattn.data import Batch, Interactions, sample_lengths
from recattn.jagged import Jagged

FROM_LOG = "log"
SCALED_LOG = "scaled log"


@dataclass(frozen=True)
class HistoryCase(Case):
    """A case over B histories.

    Args:
        batch: B.
        max_length: L, what a padded batch is padded to; histories of a log are cut to their last L. None takes whole
            histories, padded to the longest of the batch.
        lengths: a distribution of `recattn.data.sample_lengths`; or `"log"`, the histories of a log; or
            `"scaled log"`, the lengths of a log's histories, scaled so that the longest possible is L.
        fill: mean length over L, where the distribution has one to choose.
    """

    batch: int = 256
    max_length: int | None = 100
    lengths: str = "lognormal"
    fill: float = 0.2

    @property
    def needs_log(self) -> bool:
        return self.lengths in (FROM_LOG, SCALED_LOG)

    def describe(self, history: Jagged) -> str:
        """The part of the description that is about histories."""
        longest = longest_of(self, history)
        fill = history.values.shape[0] / max(history.batch_size * longest, 1)
        length = f"L={longest}" if self.max_length else f"whole histories, longest {longest}"
        return f"B={self.batch}, {length} ({self.lengths}, {fill:.0%} full)"


def longest_of(case: HistoryCase, history: Jagged) -> int:
    """L."""
    return case.max_length or int(history.lengths.max())


def valid(history: Jagged, longest: int) -> Tensor:
    """The mask `[B, L]` of a padded batch."""
    return torch.arange(longest, device=history.device) < history.lengths[:, None]


def unpadding(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Packs `[B, L, ...]` to `[T, ...]`."""
    return lambda padded: padded[mask]


def draw_lengths(case: HistoryCase, setting: Setting) -> Tensor:
    """`[B]`, of a distribution or like those of a log."""
    if case.max_length is None:
        raise ValueError(f"max_length: expected a length for lengths {case.lengths!r}, got None")
    if case.lengths != SCALED_LOG:
        return sample_lengths(case.lengths, case.batch, case.max_length, fill=case.fill, seed=setting.seed)
    lengths = _log(case, setting).history_lengths()
    generator = torch.Generator().manual_seed(setting.seed)
    rows = torch.randint(len(lengths), (case.batch,), generator=generator)
    return (lengths[rows] * case.max_length / lengths.max()).ceil().to(torch.int64)


def draw_histories(
    case: HistoryCase, width: int, setting: Setting, generator: torch.Generator
) -> tuple[Tensor, Jagged]:
    """Targets `[B, width]` and histories `[T, width]` in float32 on the CPU: N(0, 1), those of a log looked up by item
    in one random table."""
    if case.lengths == FROM_LOG:
        batch = draw_batch(case, setting, generator)
        table = torch.randn(_log(case, setting).num_items, width, generator=generator)
        return table[batch.item], batch.history.with_values(table[batch.history.values])
    lengths = draw_lengths(case, setting)
    query = torch.randn(case.batch, width, generator=generator)
    values = torch.randn(int(lengths.sum()), width, generator=generator)
    return query, Jagged.from_lengths(values, lengths)


def draw_batch(case: HistoryCase, setting: Setting, generator: torch.Generator) -> Batch:
    """Ids, of examples drawn from all of the log."""
    examples = _log(case, setting).examples(max_history=case.max_length)
    return examples.batch(torch.randint(len(examples), (case.batch,), generator=generator))


def _log(case: HistoryCase, setting: Setting) -> Interactions:
    if setting.log is None:
        raise ValueError(f"log: expected the interactions that case {case.name!r} is made from, got None")
    return setting.log
