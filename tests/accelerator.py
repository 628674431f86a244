"""What the CPU does otherwise than an accelerator, done as there."""

import torch
from torch import Tensor

from recattn.jagged import offsets_of, pack


def select_rows_with_slack(offsets: Tensor, mask: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """`recattn.jagged.select_rows` where the rows cannot be counted."""
    mask = mask & (torch.arange(mask.shape[0]) < offsets[-1])
    return pack(mask[None])[0][:most], offsets_of(mask)[offsets.to(torch.int64)].to(offsets.dtype)
