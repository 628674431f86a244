"""Which elements dropout keeps: a function of a seed and of where an element lies, so that nothing is stored.

A row's two keys are hashes of the seed and the row. An element is hashed from its column by multiplications and
shifts of 32 bits, with one key added before and the other between. All 32-bit numbers are held in int64, as PyTorch has
no arithmetic for uint32; `kernels/score_dropout.py` computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_FIRST, _SECOND = 0x85EBCA6B, 0xC2B2AE35


def draw_seed(device: torch.device) -> Tensor:
    """`[1]` int64 from PyTorch's generator of the device."""
    return torch.randint(1 << 62, (1,), device=device)


def kept(seed: Tensor, row: Tensor, column: Tensor, dropout: float) -> Tensor:
    """Whether the element at (row, column) is kept: bool, of the shape that the two broadcast to."""
    low, high = seed & _MASK, seed >> 32
    first = _mix(_mix((row & _MASK) ^ low, high), row >> 32)
    second = _mix(first + _GOLDEN & _MASK, low)
    return _mix(column * _GOLDEN + first & _MASK, second) >= threshold(dropout)


def threshold(dropout: float) -> int:
    """What a hash is at least where an element is kept."""
    return min(round(dropout * (1 << 32)), _MASK)


def _mix(x: Tensor, key: Tensor) -> Tensor:
    x = (x ^ x >> 16) * _FIRST & _MASK
    x = (x ^ x >> 13 ^ key) * _SECOND & _MASK
    return x ^ x >> 16
