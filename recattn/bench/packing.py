"""Padded batches as `PackedSequence`s, which recurrent layers take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from recattn.bench.histories import unpadding
from recattn.bench.task import Prepared, comparing

if TYPE_CHECKING:
    from recattn.bench.tasks.attentional_gru import Inputs


class Packing:
    """A padded batch, as an embedding gives it, packed in the call for what takes `PackedSequence`s; and the way back
    from its order, time by time. Sequences without items, which cannot be packed, are left out.

    Attributes:
        rows: which row each place is.
        sizes: how many places there are of each time.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.some = inputs.items.lengths > 0
        self.lengths = inputs.items.lengths[self.some].cpu()
        rows = inputs.padded(torch.arange(inputs.grad.shape[0], device=inputs.grad.device)[:, None].double())
        packed = self._pack(rows)
        self.rows = packed.data.squeeze(1).long()
        self.sizes: list[int] = packed.batch_sizes.tolist()

    def _pack(self, padded: Tensor) -> PackedSequence:
        kept = padded if bool(self.some.all()) else padded[self.some]
        return pack_padded_sequence(kept, self.lengths, batch_first=True, enforce_sorted=False)

    def prepared(self, call: Callable[..., Tensor], parameters: list[Tensor]) -> Prepared:
        """`call` of the packed inputs gives the packed states."""
        inputs = self.inputs
        leaves = inputs.padded_leaves()
        unpad = comparing(inputs.inputs, unpadding(inputs.mask), range(1, 1 + inputs.inputs))

        def forward() -> Tensor:
            return call(*(self._pack(x if x.dim() == 3 else x.unsqueeze(2)) for x in leaves))

        def comparable(result: Sequence[Tensor]) -> list[Tensor]:
            states = torch.zeros_like(inputs.grad).index_copy(0, self.rows, result[0])
            return unpad([states, *result[1:]])

        return Prepared(forward, [*leaves, *parameters], inputs.grad[self.rows], comparable)
