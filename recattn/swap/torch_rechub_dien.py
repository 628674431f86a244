"""torch-rechub: the AUGRU of its DIEN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_rechub.models.ranking.dien import AUGRU, AUGRU_Cell

from recattn.swap.coverage import Swap, Uncovered, expect, expect_own, instead_of
from recattn.swap.recurrences import Histories, Recurrence, check_by

__all__ = ["SWAPS", "FusedAUGRU"]


class FusedAUGRU(AUGRU):
    r"""`AUGRU` over the items that count, without a loop over steps in Python.

    .. math:: a = softmax(x_t^T W_a\, item) = softmax(x_t \cdot (W_a\, item))

    As in the library, where a mask leaves nothing of a history, all of its positions count alike.
    """

    @instead_of(AUGRU.forward)
    def forward(self, x: Tensor, item: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs over the histories `x [B, T, D]` by `item [B, D]`; `mask [B, T]` is True where an item counts.

        Returns:
            The states `[B, T, D]`, in the padding that of the last item before it, and the last, `[B, D]`.
        """
        recurrence = _recurrence(self)
        batch, longest, width = x.shape
        if item.shape != (batch, width) or longest == 0:
            raise Uncovered(f"x, item: {tuple(x.shape)}, {tuple(item.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, longest)):
            raise Uncovered(f"mask: {mask.dtype}, {tuple(mask.shape)}")
        scores = torch.bmm(x, (item @ self.Wa.t()).unsqueeze(2)).squeeze(2)
        if mask is None:
            valid, attention = scores.new_ones(scores.shape, dtype=torch.bool), scores.softmax(1)
        else:
            empty = ~mask.any(1, keepdim=True)
            valid = mask | empty
            attention = scores.masked_fill(~valid, -torch.inf).softmax(1)
            attention = torch.where(empty, 1 / longest, attention)
        states, last = recurrence.run(Histories(x, valid), attention)
        # A position has as many items behind it as there are up to it; one without any has the state 0.
        before = valid.flatten().cumsum(0).reshape(valid.shape)
        started = valid.cumsum(1) > 0
        padded = states.index_select(0, (before - 1).clamp_min(0).flatten()).reshape(batch, longest, -1)
        return padded.masked_fill(~started.unsqueeze(2), 0), last


def _recurrence(layer: AUGRU) -> Recurrence:
    """Its products are with weights that are not transposed, and the candidate has one bias."""
    expect_own("forward", layer)
    cell = layer.augru_cell
    expect("augru_cell", cell, AUGRU_Cell)
    return Recurrence(
        "augru",
        torch.cat([cell.Wr.t(), -cell.Wu.t(), cell.Wh.t()]),
        torch.cat([cell.Ur.t(), -cell.Uu.t(), cell.Uh.t()]),
        torch.cat([cell.br, -cell.bu, cell.bh], 1).squeeze(0),
        cell.br.new_zeros(3 * layer.embed_dim),
    )


SWAPS = (Swap(AUGRU, FusedAUGRU, check_by(_recurrence)),)
