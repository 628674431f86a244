"""Padded histories, as the layers of other libraries take them, through the operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn import functional
from recattn.jagged import pack, unpack
from recattn.swap.coverage import Options, Uncovered, leave_small
from recattn.swap.scorers import Scorer

MEAN, ZERO, NAN = "mean", "zero", "nan"
IN_WORDS = {MEAN: "the mean of its padding", ZERO: "0", NAN: "NaN"}


class Padded(NamedTuple):
    """A batch `keys [B, L, D]`, read in place, and which positions count, `valid [B, L]` bool; None for all."""

    keys: Tensor
    valid: Tensor | None

    def layout(self) -> dict[str, Any]:
        """`keys`, `offsets` and `rows` of an operator."""
        batch, longest = self.keys.shape[:2]
        keys, step = table_of(self.keys)
        if self.valid is not None:
            rows, offsets = pack(self.valid)
            return {"keys": keys, "offsets": offsets, "rows": in_table(rows, longest, step)}
        offsets = torch.arange(batch + 1, device=keys.device) * longest
        if step == longest:
            return {"keys": keys, "offsets": offsets, "rows": None}
        rows = torch.arange(batch * longest, device=keys.device)
        return {"keys": keys, "offsets": offsets, "rows": in_table(rows, longest, step)}

    def pooled(self, result: Tensor, empty: str) -> Tensor:
        """`[B, D]` with what an empty history has, instead of 0."""
        if (none := self._empty(empty)) is None:
            return result
        if empty == MEAN:
            padding = self.keys.mean(1)
        else:  # in those rows alone, of the gradient too
            padding = self.keys.sum(1) * torch.zeros_like(none, dtype=result.dtype).masked_fill(
                none, torch.nan
            )
        return torch.where(none, padding.to(result.dtype), result)

    def attention(self, scores: Tensor, empty: str) -> Tensor:
        """`[B, L]` of scores `[T]`, with what an empty history has, instead of 0."""
        batch, longest = self.keys.shape[:2]
        if self.valid is None:
            return scores.reshape(batch, longest)
        result = unpack(scores, self.valid)
        if (none := self._empty(empty)) is None:
            return result
        return result.masked_fill(none, 1 / longest if empty == MEAN else torch.nan)

    def any_empty(self, empty: str) -> bool:
        """Whether a history may be empty, and that matters."""
        return self._empty(empty) is not None

    def _empty(self, value: str) -> Tensor | None:
        """`[B, 1]`, which are, if it matters."""
        if value == ZERO or self.valid is None or self.keys.shape[1] == 0:
            return None
        empty = ~self.valid.any(1, keepdim=True)
        # Off the CPU it would take longer to find out.
        return None if empty.is_cpu and not torch.compiler.is_compiling() and not bool(empty.any()) else empty


class _Table(torch.autograd.Function):
    """Histories `[B, L, D]`, the first items of which are `step` rows apart, as the rows `[R, D]` from the first to the
    last. Both this and its gradient are views: what lies between two histories is in the table, and in no history."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, step: int) -> Tensor:
        batch, longest, width = ctx.shape = padded.shape
        ctx.step = step
        return padded.as_strided(((batch - 1) * step + longest, width), padded.stride()[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        row, column = grad.stride()
        return grad.as_strided(ctx.shape, (ctx.step * row, row, column)), None


def table_of(padded: Tensor) -> tuple[Tensor, int]:
    """Histories `[B, L, D]` as rows `[R, D]`, and how many rows each history begins behind the one before it. A view
    where rows are evenly spaced, as those of a slice of longer histories are."""
    batch, longest, width = padded.shape
    history, row, column = padded.stride()
    apart = 0 < longest * row < history and history % row == 0 and column == 1 and row >= width
    if batch < 2 or not apart or torch.compiler.is_compiling():
        return padded.flatten(0, 1), longest
    return _Table.apply(padded, history // row), history // row


def in_table(rows: Tensor, longest: int, step: int) -> Tensor:
    """Rows of `[B·L, D]` as rows of such a table."""
    return rows if step == longest else rows + rows.div(longest, rounding_mode="floor") * (step - longest)


def by_length(lengths: Tensor, longest: int) -> Tensor:
    """`[B, L]` bool, right padded, of lengths `[B]` of any dtype."""
    position = torch.arange(longest, device=lengths.device, dtype=lengths.dtype)
    return position < lengths.reshape(-1, 1)


def attend(
    scorer: Scorer,
    query: Tensor,
    history: Padded,
    options: Options,
    *,
    normalize: str,
    empty: str,
    scale: float = 1.0,
    return_scores: bool = False,
) -> Tensor:
    """The histories `[B, D]` pooled by what an MLP says of query `[B, D]` and items; or their attention, `[B, L]`.

    Args:
        empty: what the library has for an empty history under exact semantics, `MEAN`, `ZERO` or `NAN`.
    """
    empty = empty if options.exact else ZERO
    if scorer.needs_moments:
        leave_small(history.keys, options, "activation_unit_statistics")
        _check_moments(scorer, history, options)
    data: dict[str, Any] = {"query": query, **history.layout(), "unique_rows": True}
    everything = {**data, **Padded(history.keys, None).layout()} if options.exact else data
    if scorer.drops:
        seed = torch.empty(1, dtype=torch.int64, device=query.device).random_()
        data |= {"dropout": scorer.drops, "seed": seed}
        everything |= {"dropout": scorer.drops, "seed": seed}
    result = functional.activation_unit(
        **data,
        **scorer.network(partial(functional.activation_unit_statistics, **everything)),
        normalize=normalize,
        scale=scale,
        return_scores=return_scores,
    )
    if return_scores:
        return history.attention(result[1], empty)
    assert isinstance(result, Tensor)
    return history.pooled(result, empty)


def _check_moments(scorer: Scorer, history: Padded, options: Options) -> None:
    if options.exact and history.keys.shape[0] * history.keys.shape[1] < 2:
        raise Uncovered("statistics of a single position")
    if options.exact and history.valid is not None and scorer.drops and len(scorer.hidden) > 1:
        raise Uncovered("statistics of padding behind dropout")


def remarks(scorer: Scorer, options: Options, empty: str, *, masked: bool = True) -> Sequence[str]:
    """What the report says of a layer that scores by an MLP.

    Args:
        empty: as of `attend`.
        masked: whether the layer knows which positions are padding.
    """
    said = []
    if scorer.norms and masked:
        if not options.exact:
            said.append("batch statistics over valid positions only")
        elif scorer.dropout and len(scorer.hidden) > 1:
            said.append("in eval only: in training its statistics include padding behind dropout")
    if scorer.dropout:
        said.append("training drops other units than the library would")
    if not masked:
        said.append("without a mask, padding counts as items, as in the library")
    elif not options.exact and empty != ZERO:
        said.append(f"an empty history gives 0, not {IN_WORDS[empty]}")
    return said
