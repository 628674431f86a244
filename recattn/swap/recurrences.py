"""The GRUs of other libraries' DIENs, through `recattn.functional.attentional_gru`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.jagged import offsets_of
from recattn.swap.coverage import Uncovered, expect, expect_own


class Recurrence(NamedTuple):
    """A GRU with its parameters as `attentional_gru` takes them, by `kind`."""

    kind: str
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    @classmethod
    def of_gru(cls, name: str, gru: nn.Module, kind: str = "gru") -> Recurrence:
        """Of an `nn.GRU` of one layer and one direction."""
        expect(name, gru, nn.GRU)
        assert isinstance(gru, nn.GRU)
        if gru.num_layers != 1 or gru.bidirectional or not gru.batch_first:
            raise Uncovered(f"{name}: {gru}")
        weight_ih, weight_hh, *biases = (getattr(gru, p) for p in gru._flat_weights_names)
        return cls(kind, weight_ih, weight_hh, *_biases(weight_hh, *biases))

    @classmethod
    def of_cell(cls, name: str, cell: Any, kind: str) -> Recurrence:
        """Of a cell with `weight_ih`, ... in the order of reset gate, update gate, candidate; its update gate is of
        what is taken over, ours of what is kept. The biases may be one tensor."""
        expect_own("forward", cell, name)
        expect(name, cell, type(cell))
        biases = [b for b in (cell.bias_ih, cell.bias_hh) if b is not None]
        parts = (cell.weight_ih, cell.weight_hh, *_biases(cell.weight_hh, *biases))
        return cls(kind, *(_keeping(*part.chunk(3)) for part in parts))

    def run(self, histories: Histories, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States `[T, H]` and the last of each history, `[B, H]`, 0 for an empty one.

        Args:
            scores: `[B, L]`, the attention.
        """
        a = None if scores is None else scores.flatten().index_select(0, histories.rows)
        return functional.attentional_gru(histories.values, histories.offsets, a, *self[1:], kind=self.kind)


def _biases(weight: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
    if biases:
        bias_ih, bias_hh = biases
        return bias_ih, bias_hh
    zero = weight.new_zeros(weight.shape[0])
    return zero, zero


def _keeping(reset: Tensor, update: Tensor, candidate: Tensor) -> Tensor:
    """1 - sigmoid(x) is sigmoid(-x)."""
    return torch.cat([reset, -update, candidate])


@dataclass(frozen=True)
class Histories:
    """A padded batch `padded [B, L, D]`, and which positions count, `valid [B, L]`.

    Like the libraries, waits for the device for the number of these.
    """

    padded: Tensor
    valid: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """`[T]`, where they are in the flattened batch."""
        return self.valid.flatten().nonzero().squeeze(1)

    @cached_property
    def offsets(self) -> Tensor:
        return offsets_of(self.valid.sum(1))

    @cached_property
    def values(self) -> Tensor:
        """`[T, D]`, end to end."""
        return self.pack(self.padded)

    def pack(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.rows)

    def pad(self, values: Tensor) -> Tensor:
        """Of `[T, D]`, `[B, L, D]` with 0 in the padding."""
        batch, longest = self.valid.shape
        flat = values.new_zeros(batch * longest, values.shape[1])
        return flat.index_copy(0, self.rows, values).reshape(batch, longest, -1)

    def next_items(self, states: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """What an auxiliary network tells apart: each state with the item behind it, and with a negative sample for
        that, `[P, 2D]` each.

        Args:
            states: `[T, D]`.
            negatives: `[B, L, D]`.
        """
        ends = torch.zeros(len(self.rows), dtype=torch.bool, device=states.device)
        ends[self.offsets[1:][self.offsets.diff() > 0] - 1] = True
        at = (~ends).nonzero().squeeze(1)
        state = states.index_select(0, at)
        return (
            torch.cat([state, self.values.index_select(0, at + 1)], -1),
            torch.cat([state, self.pack(negatives).index_select(0, at + 1)], -1),
        )
