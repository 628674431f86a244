"""The GRUs of other libraries' DIENs, through `recattn.functional.attentional_gru`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.jagged import Jagged, pack
from recattn.swap.coverage import Options, Uncovered, expect, expect_own


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
        return functional.attentional_gru(
            histories.padded.flatten(0, 1),
            histories.offsets,
            None if scores is None else scores.flatten(),
            *self[1:],
            kind=self.kind,
            rows=histories.rows,
            unique_rows=True,
            row_scores=scores is not None,
        )


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
    """A padded batch `padded [B, L, D]`, read in place, and which positions count, `valid [B, L]`."""

    padded: Tensor
    valid: Tensor

    @cached_property
    def _packed(self) -> tuple[Tensor, Tensor]:
        rows, offsets = pack(self.valid)
        return rows[: int(offsets[-1])] if rows.is_cpu else rows, offsets

    @property
    def rows(self) -> Tensor:
        """`[T]`, where they are in the flattened batch; on the CPU as many as there are, elsewhere B·L with zeros
        behind, so that nothing waits for the device."""
        return self._packed[0]

    @property
    def offsets(self) -> Tensor:
        return self._packed[1]

    @cached_property
    def inside(self) -> Tensor:
        """`[T]`, which rows there are."""
        return torch.arange(self.rows.numel(), device=self.rows.device) < self.offsets[-1]

    def pad(self, states: Tensor) -> Tensor:
        """Of `[T, D]`, `[B, L, D]` with 0 in the padding."""
        batch, longest = self.valid.shape
        places = torch.where(self.inside, self.rows, batch * longest)  # one behind the last is dropped
        flat = states.new_zeros(batch * longest + 1, states.shape[1]).index_copy(0, places, states)
        return flat[:-1].reshape(batch, longest, -1)

    def next_items(self, states: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """What an auxiliary network tells apart: each state with the item behind it, and with a negative sample for
        that, `[P, 2D]` each. Like the libraries, waits for the device for their number.

        Args:
            states: `[T, D]`.
            negatives: `[B, L, D]`.
        """
        last = Jagged(self.rows, self.offsets).last(1)
        at = (self.inside & ~last).nonzero().squeeze(1)
        state, following = states.index_select(0, at), self.rows.index_select(0, at + 1)
        return (
            torch.cat([state, self.padded.flatten(0, 1).index_select(0, following)], -1),
            torch.cat([state, negatives.flatten(0, 1).index_select(0, following)], -1),
        )


def check_auxiliary(net: nn.Module, expected: type[nn.Module]) -> None:
    """Raises unless an auxiliary network, which is called, gives for an item the same whatever the others are."""
    if type(net) is not expected:
        raise Uncovered(f"auxiliary_net: {type(net).__name__} in place of {expected.__name__}")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
        raise Uncovered("auxiliary_net: batch statistics")


def check_by(recurrence: Callable[[Any], Recurrence]) -> Callable[[Any, Options], Sequence[str]]:
    """The check of a `Swap`: whether there is a `recurrence` of the layer. There is nothing to remark on."""

    def check(layer: Any, _: Options) -> Sequence[str]:
        recurrence(layer)
        return ()

    return check
