"""A GRU over histories, with attention in it or without, as a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.jagged import Jagged
from recattn.nn.histories import Histories, expect_sequences
from recattn.nn.twin import Twin
from recattn.reference import attentional_gru_padded


class AttentionalGRU(Twin):
    r"""Runs over each history; attention may decide how far an item moves the state.

    .. math::
        h_t = (1 - u_t) \odot h_{t-1} + u_t \odot n_t

    with the candidate n and, for z the gate of what is kept and a the attention, u = 1 - z (`"gru"`, and `"aigru"`
    over inputs scaled by a), a (`"agru"`) or a(1 - z) (`"augru"`).

    Args:
        input_size, hidden_size: the widths of items and states.
        kind, update, reset_after: see `recattn.functional.attentional_gru`.
        device, dtype: of the parameters.

    Parameters are named, laid out and initialised as those of `torch.nn.GRU` with one layer, whose `state_dict` loads.

    Source: Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction", AAAI 2019.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        kind: str = "augru",
        update: str = "paper",
        reset_after: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(
                f"input_size, hidden_size: expected positive widths, got {input_size} and {hidden_size}"
            )
        functional.check_choice("kind", kind, functional.KINDS)
        functional.check_choice("update", update, functional.UPDATES)

        def parameter(*shape: int) -> nn.Parameter:
            bound = hidden_size**-0.5
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound))

        self.weight_ih_l0 = parameter(3 * hidden_size, input_size)
        self.weight_hh_l0 = parameter(3 * hidden_size, hidden_size)
        self.bias_ih_l0 = parameter(3 * hidden_size)
        self.bias_hh_l0 = parameter(3 * hidden_size)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.kind, self.update, self.reset_after = kind, update, reset_after

    def forward(
        self,
        items: Jagged | Tensor,
        scores: Jagged | Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        table: Tensor | None = None,
        h0: Tensor | None = None,
    ) -> tuple[Jagged, Tensor]:
        """Runs over the histories.

        Args:
            items: a `Jagged` of `[T, I]`; a nested tensor (layout torch.jagged) `[B, *, I]`; or padded, `[B, L, I]`,
                together with
            lengths: `[B]` integers, for right padding, or
            mask: `[B, L]`, bool or integers, non-zero where an item counts, in any pattern.
            scores: the attention, in the layout of the items but for their last dimension; not for `"gru"`.
            table: `[R, I]`, such as the weight of an embedding. Then `items` has ids of its rows, without the last
                dimension.
            h0: `[B, H]`, the states to start from; zero without it.

        Returns:
            The state after each item, as Jagged `[T, H]`, and the last of each history, `[B, H]`: for an empty one
            what it started from.

        Raises:
            TypeError, ValueError: as `recattn.functional.attentional_gru`, and if lengths or a mask come with items
                that are not padded, or neither with items that are.

        Padded batches and tables are read in place.
        """
        history, attention = _histories(items, scores, lengths, mask, table)
        read = history.keys
        if read.dim() != 2 or read.shape[1] != self.input_size:
            name = "items" if table is None else "table"
            raise ValueError(f"{name}: expected a width of {self.input_size}, got {list(read.shape)}")
        if self.implementation == "eager":
            return self._eager(history, attention, h0)
        states, last = functional.attentional_gru(
            read,
            history.offsets,
            attention,
            *self._parameters_in_order(),
            h0=h0,
            rows=history.rows,
            unique_rows=history.unique_rows,
            row_scores=history.unique_rows and attention is not None,
            **self._options(),
        )
        return Jagged(states, history.offsets), last

    def _eager(
        self, histories: Histories, attention: Tensor | None, h0: Tensor | None
    ) -> tuple[Jagged, Tensor]:
        if attention is not None and histories.unique_rows:
            history, column = replace(histories, values=attention.unsqueeze(1)).packed()
            attention = None if column is None else column.squeeze(1)
        else:
            history, _ = histories.packed()
        padded = history.to_padded()
        mask = torch.arange(padded.shape[1], device=padded.device) < history.lengths[:, None]
        a = None if attention is None else history.with_values(attention).to_padded(padded.shape[1])
        states, last = attentional_gru_padded(
            padded, mask, a, *self._parameters_in_order(), h0=h0, **self._options()
        )
        total = history.values.shape[0]
        return Jagged.from_padded(states, mask=mask, total=total), last

    def _parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0

    def _options(self) -> dict[str, Any]:
        return {"kind": self.kind, "update": self.update, "reset_after": self.reset_after}

    def example(self, like: Tensor, offsets: Tensor) -> tuple[Any, ...]:
        items = Jagged(like.new_zeros(int(offsets[-1]), self.input_size), offsets)
        scores = None if self.kind == "gru" else items.with_values(items.values[:, 0])
        return items, scores

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, kind={self.kind!r}, update={self.update!r},"
            f" reset_after={self.reset_after}"
        )


def _histories(
    items: Jagged | Tensor,
    scores: Jagged | Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    table: Tensor | None,
) -> tuple[Histories, Tensor | None]:
    """The histories where they are, and their attention: `[R]` beside the items of a padded batch, else `[T]`."""
    expect_sequences("items", items)
    if scores is not None and type(scores) is not type(items):
        raise TypeError(f"scores: expected {type(items).__name__}, as the items, got {type(scores).__name__}")
    history = Histories.of(items, None, lengths, mask, table, name="items")
    if history.rows is not None and history.rows.is_cpu:  # where counting rows waits for nothing
        history = replace(history, rows=history.rows[: int(history.offsets[-1])])
    if isinstance(scores, Jagged):
        return history, scores.values
    if scores is None or scores.is_nested:
        return history, None if scores is None else Jagged.from_nested(scores).values
    assert isinstance(items, Tensor)
    if scores.shape != items.shape[:2]:
        raise ValueError(f"scores: expected {list(items.shape[:2])}, as the items, got {list(scores.shape)}")
    if table is None:
        return history, scores.flatten()
    return history, Jagged.from_padded(scores, mask=history.valid).values
