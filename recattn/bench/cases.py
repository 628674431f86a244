"""What is timed: sizes and lengths of real settings, and the tensors made for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recattn.data import Examples, Interactions, sample_lengths
from recattn.jagged import Jagged

FROM_LOG = "log"
SCALED_LOG = "scaled log"


@dataclass(frozen=True)
class Case:
    """One call of `activation_unit`.

    Args:
        name: of the setting.
        batch: B.
        max_length: L, what a padded batch is padded to; histories are cut to their last L. None takes whole
            histories, padded to the longest of the batch.
        dim: D.
        hidden: widths of the hidden layers.
        activation, normalize: as in `recattn.functional.activation_unit`.
        lengths: a distribution of `recattn.data.sample_lengths`; or `"log"`, the histories of a log; or
            `"scaled log"`, the lengths of a log's histories, scaled so that the longest possible is L.
        fill: mean length over L, where the distribution has one to choose.
        quick: whether a quick run includes it.
    """

    name: str
    batch: int
    max_length: int | None
    dim: int
    hidden: tuple[int, ...] = (80, 40)
    activation: str = "sigmoid"
    normalize: str = "softmax"
    lengths: str = "lognormal"
    fill: float = 0.2
    quick: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the operator and its reference take by keyword."""
        return {"activation": self.activation, "normalize": self.normalize}

    def describe(self, fill: float) -> str:
        """One line, with how full a padded batch of it is."""
        length = "whole histories" if self.max_length is None else f"L={self.max_length}"
        return (
            f"B={self.batch}, {length} ({self.lengths}, {fill:.0%} full), D={self.dim}, hidden"
            f" ({', '.join(map(str, self.hidden))}), {self.activation}, {self.normalize}"
        )


CASES = (
    Case("classic", 512, 100, 64, quick=True),
    Case("classic-full", 512, 100, 64, lengths="equal"),
    Case("narrow", 1024, 50, 32),
    Case("long", 64, 1000, 64, quick=True),
    Case("small", 256, 20, 16, quick=True),
    # The attention of the public leaderboards' best DINs.
    Case("wide", 1024, 100, 128, hidden=(512, 256), activation="relu"),
    Case("log-last-100", 512, 100, 64, lengths=FROM_LOG, quick=True),
    Case("log-last-50", 1024, 50, 32, lengths=FROM_LOG),
    Case("log-whole", 256, None, 64, lengths=FROM_LOG, quick=True),
)


def select_cases(names: Sequence[str] | None, *, from_log: bool, quick: bool) -> list[Case]:
    """The cases by name, or else all those that take their lengths from a log, or all those that do not.

    Raises:
        ValueError: for a name that does not exist, or that needs a log when there is none.
    """
    if names is None:
        return [c for c in CASES if (c.lengths == FROM_LOG) == from_log and (c.quick or not quick)]
    by_name = {case.name: case for case in CASES}
    for name in names:
        if name not in by_name:
            raise ValueError(f"case: expected some of {', '.join(by_name)}, got {name!r}")
        if by_name[name].lengths == FROM_LOG and not from_log:
            raise ValueError(
                f"case: {name!r} takes its histories from a log, expected data other than synthetic"
            )
    return [by_name[name] for name in names]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a case, leaves without gradients.

    Args:
        query: `[B, D]`.
        keys: the histories, `[T, D]`.
        max_length: L, what `padded` is padded to.
        weights, biases: as in `nn.Linear`, `[H1, 4·D]`, ..., `[1, Hn]` and `[H1]`, ..., `[1]`.
        grad: dL/dout, `[B, D]`.
    """

    query: Tensor
    keys: Jagged
    max_length: int
    weights: list[Tensor]
    biases: list[Tensor]
    grad: Tensor

    @cached_property
    def padded(self) -> Tensor:
        """`[B, L, D]`, zero behind the end of a history."""
        return self.keys.to_padded(self.max_length)

    @cached_property
    def mask(self) -> Tensor:
        """`[B, L]` bool."""
        return torch.arange(self.max_length, device=self.query.device) < self.keys.lengths[:, None]

    @property
    def fill(self) -> float:
        """How much of the padded batch is no padding."""
        return self.keys.values.shape[0] / max(self.keys.batch_size * self.max_length, 1)


def make_inputs(
    case: Case, device: torch.device, dtype: torch.dtype, *, log: Interactions | None = None, seed: int = 0
) -> Inputs:
    """The tensors of a case; the same for the same seed, up to their dtype.

    Embeddings are N(0, 1), those of a log's histories looked up by item in one random table; the examples are
    drawn from all of the log. Layers are initialised as `nn.Linear` is.

    Raises:
        ValueError: for a case whose histories come from a log, without one.
    """
    generator = torch.Generator().manual_seed(seed)
    if case.lengths == FROM_LOG:
        if log is None:
            raise ValueError(f"log: expected the interactions that case {case.name!r} is made from, got None")
        query, keys = _from_log(case, log.examples(max_history=case.max_length), log.num_items, generator)
    else:
        if case.max_length is None:
            raise ValueError(f"max_length: expected a length for lengths {case.lengths!r}, got None")
        lengths = draw_lengths(case, case.max_length, log, seed)
        query = torch.randn(case.batch, case.dim, generator=generator)
        keys = Jagged.from_lengths(torch.randn(int(lengths.sum()), case.dim, generator=generator), lengths)
    longest = int(keys.lengths.max()) if case.max_length is None else case.max_length
    layers = _layers([4 * case.dim, *case.hidden, 1], seed)
    grad = torch.randn(case.batch, case.dim, generator=generator)
    return Inputs(
        query=query.to(device, dtype),
        keys=keys.to(device, dtype),
        max_length=longest,
        weights=[layer.weight.detach().to(device, dtype) for layer in layers],
        biases=[layer.bias.detach().to(device, dtype) for layer in layers],
        grad=grad.to(device, dtype),
    )


def draw_lengths(case: Case, max_length: int, log: Interactions | None, seed: int) -> Tensor:
    """`[B]`, of a distribution or like those of a log."""
    if case.lengths != SCALED_LOG:
        return sample_lengths(case.lengths, case.batch, max_length, fill=case.fill, seed=seed)
    if log is None:
        raise ValueError(
            f"log: expected the interactions that case {case.name!r} takes its lengths from, got None"
        )
    lengths = log.history_lengths()
    rows = torch.randint(len(lengths), (case.batch,), generator=torch.Generator().manual_seed(seed))
    return (lengths[rows] * max_length / lengths.max()).ceil().to(torch.int64)


def _from_log(
    case: Case, examples: Examples, num_items: int, generator: torch.Generator
) -> tuple[Tensor, Jagged]:
    rows = torch.randint(len(examples), (case.batch,), generator=generator)
    batch = examples.batch(rows)
    table = torch.randn(num_items, case.dim, generator=generator)
    return table[batch.item], batch.history.with_values(table[batch.history.values])


def _layers(sizes: Sequence[int], seed: int) -> list[nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [nn.Linear(n, m) for n, m in pairwise(sizes)]
