"""Which hidden units dropout keeps: a function of the seed, the row, the layer and the unit.

So whoever computes a unit again, in whatever order, keeps the same, and no mask is stored. A row counts along the
histories of all queries. A word of 32 bits decides for two neighbouring units, by 16 bits each:

    r = mix(row ^ key)      s = mix(r ^ γ) | 1
    word = (r + γ·(65537·layer + unit // 2)) · (s ^ E1·(unit // 2 % 4) ^ E2·(8193·layer + unit // 8))

So r and s are of a row, and units cost an addition, an exclusive or and a product: a thread that has the units 2t and
2t + 1 of every eight, as tensor cores leave them, finds all else in constants. E1 and E2 are even, so one factor is odd
and all words are equally likely. A unit is kept if the upper half of the word, for an odd unit of 65537·word, is at
least a threshold as a signed integer; the latter is the sum of both halves. Everything wraps in 32 bits.
`kernels/dropout.py` is the same in Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAMMA, M1, M2 = 0x9E3779B9, 0x21F0AAAD, 0xD35A2D97
E1, E2 = 0x43E1555A, 0xA6B45B2E


class Dropout(NamedTuple):
    """Of one call."""

    key: Tensor  # [1], int32, what the seed is mixed to
    dropped: int  # of 2^16 values of a half, as many drop a unit

    @classmethod
    def of(cls, probability: float, seed: Tensor | None) -> Dropout | None:
        """The probability is rounded to a multiple of 2^-16; of 0, None."""
        dropped = min(round(probability * 65536), 65535)
        if dropped == 0:
            return None
        assert seed is not None
        low, high = _words(seed.reshape(1))
        return cls(_mix(low ^ _mix(high ^ _signed(GAMMA))), dropped)

    @property
    def gain(self) -> float:
        """What kept units are multiplied by, so that the mean stays."""
        return 65536 / (65536 - self.dropped)

    @property
    def threshold(self) -> int:
        """The least signed half that keeps a unit."""
        return self.dropped - 32768

    def kept(self, rows: Tensor, layer: int, width: int) -> Tensor:
        """`rows [n]`, int64, to `[n, width]`, bool."""
        low, high = _words(rows)
        r = _mix(low ^ self.key) + high * _signed(GAMMA)
        s = _mix(r ^ _signed(GAMMA)) | 1
        pairs = (width + 1) // 2
        pair = torch.arange(pairs, device=rows.device, dtype=torch.int32)
        add = (pair + 65537 * layer) * _signed(GAMMA)
        turn = (pair & 3) * _signed(E1) ^ ((pair >> 2) + 8193 * layer) * _signed(E2)
        x = (r.unsqueeze(1) + add).mul_(s.unsqueeze(1) ^ turn)
        halves = torch.stack((x, x * 65537), 2).view(rows.numel(), 2 * pairs)[:, :width]
        return halves >= self.threshold << 16  # what is below the upper halves decides nothing


def _mix(x: Tensor) -> Tensor:
    x = _xor_shift(x, 16) * _signed(M1)
    x = _xor_shift(x, 15) * _signed(M2)
    return _xor_shift(x, 15)


def _xor_shift(x: Tensor, by: int) -> Tensor:
    """`x ^ (x >> by)`, shifting in zeros."""
    return x ^ ((x >> by) & ((1 << (32 - by)) - 1))


def _words(x: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the higher 32 bits of int64."""
    return x.to(torch.int32), (x >> 32).to(torch.int32)


def _signed(x: int) -> int:
    """The int32 of the same bits."""
    return x - (1 << 32) if x >= 1 << 31 else x
