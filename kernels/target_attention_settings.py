"""Launch settings of target_attention, by the number of queries per history, widths and precision."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .settings import Kernel as Kernel
from .settings import all_registers as all_registers
from .settings import multiprocessors
from .settings import precision as precision


class Tiles(NamedTuple):
    block: int  # tokens per tile
    tail: int  # tokens per tile where a history ends
    num_warps: int
    num_stages: int
    dim_slab: int  # widest slab of keys and values
    least_rows: int  # fewest rows worth a program
    programs_per_sm: int

    def programs(self, rows: int, device: torch.device) -> int:
        """How many programs share `rows` rows."""
        return max(1, min(-(-rows // self.least_rows), multiprocessors(device) * self.programs_per_sm))


WIDEST_HEAD = 256
SHORT = 48  # mean length below which histories share a tile

# One query per history, by the width that a program takes and by precision; "ieee" is by parts where it can be.
# Wider tiles, or larger ones, would keep more than 255 words in a thread's registers.
QUERY_NARROW = 64
QUERY_FORWARD = {
    ("narrow", "half"): Tiles(32, 16, 1, 2, 32, 256, 12),
    ("narrow", "tf32"): Tiles(32, 16, 1, 2, 64, 256, 12),
    ("narrow", "ieee"): Tiles(32, 16, 1, 2, 64, 256, 12),
    ("broad", "half"): Tiles(16, 16, 1, 2, 64, 256, 12),
    ("broad", "tf32"): Tiles(16, 16, 1, 2, 64, 256, 12),
    ("broad", "ieee"): Tiles(16, 16, 1, 2, 64, 256, 12),
}
QUERY_BACKWARD = {
    ("narrow", "half"): Tiles(32, 16, 1, 2, 64, 256, 8),
    ("narrow", "tf32"): Tiles(16, 16, 1, 2, 64, 256, 8),
    ("narrow", "ieee"): Tiles(16, 16, 1, 1, 64, 256, 8),
    ("broad", "half"): Tiles(16, 16, 1, 2, 64, 256, 8),
    ("broad", "tf32"): Tiles(16, 16, 1, 2, 64, 256, 8),
    ("broad", "ieee"): Tiles(16, 16, 1, 2, 64, 256, 8),
}
# What heads fill side by side at most.
QUERY_FORWARD_WIDEST = {"half": 256, "tf32": 128, "ieee": 128}
QUERY_BACKWARD_WIDEST = {"half": 128, "tf32": 64, "ieee": 64}


def query_forward(precision: str, width: int) -> Tiles:
    return QUERY_FORWARD["narrow" if width <= QUERY_NARROW else "broad", precision]


def query_backward(precision: str, width: int) -> Tiles:
    return QUERY_BACKWARD["narrow" if width <= QUERY_NARROW else "broad", precision]


class Pairs(NamedTuple):
    candidates: int  # per block
    block: int  # tokens per tile
    tail: int  # tokens per tile where a history ends, 0 for as many
    num_warps: int
    num_stages: int
    dim_slab: int  # widest slab of keys and values
    share: int  # fewest tokens, or candidates, worth a program of their own

    def splits(self, programs: int, length: int, device: torch.device) -> int:
        """How many programs share what is `length` long on average, where there are `programs` without."""
        wanted = 4 * multiprocessors(device) // max(programs, 1)
        return max(1, min(wanted, length // self.share, MOST_SPLITS))


MOST_SPLITS = 32

# Candidates that share a history, by how many they are, the width of a head, and precision.
CANDIDATES_FORWARD = {
    ("many", "narrow", "half"): Pairs(64, 64, 16, 4, 2, 64, 1024),
    ("many", "broad", "half"): Pairs(64, 32, 16, 2, 2, 128, 1024),
    ("many", "narrow", "tf32"): Pairs(64, 32, 16, 2, 2, 64, 1024),
    ("many", "broad", "tf32"): Pairs(64, 32, 16, 4, 2, 128, 1024),
    ("many", "narrow", "ieee"): Pairs(64, 32, 16, 4, 1, 64, 1024),
    ("many", "broad", "ieee"): Pairs(32, 32, 16, 4, 1, 64, 1024),
    ("few", "narrow", "half"): Pairs(16, 32, 16, 1, 2, 64, 512),
    ("few", "broad", "half"): Pairs(16, 32, 16, 1, 2, 128, 512),
    ("few", "narrow", "tf32"): Pairs(16, 32, 16, 1, 2, 64, 512),
    ("few", "broad", "tf32"): Pairs(16, 16, 16, 1, 2, 128, 512),
    ("few", "narrow", "ieee"): Pairs(16, 32, 16, 1, 1, 64, 512),
    ("few", "broad", "ieee"): Pairs(16, 16, 16, 1, 1, 64, 512),
}
CANDIDATES_BACKWARD = {
    ("many", "narrow", "half"): Pairs(64, 64, 0, 4, 1, 64, 128),
    ("many", "broad", "half"): Pairs(64, 32, 0, 4, 1, 128, 128),
    ("many", "narrow", "tf32"): Pairs(32, 32, 0, 4, 1, 64, 128),
    ("many", "broad", "tf32"): Pairs(32, 32, 0, 4, 1, 128, 128),
    ("many", "narrow", "ieee"): Pairs(32, 32, 0, 4, 1, 64, 128),
    ("many", "broad", "ieee"): Pairs(16, 32, 0, 4, 1, 64, 128),
    ("few", "narrow", "half"): Pairs(16, 16, 0, 1, 1, 64, 32),
    ("few", "broad", "half"): Pairs(16, 32, 0, 1, 1, 128, 32),
    ("few", "narrow", "tf32"): Pairs(16, 16, 0, 1, 1, 64, 32),
    ("few", "broad", "tf32"): Pairs(16, 16, 0, 1, 1, 128, 32),
    ("few", "narrow", "ieee"): Pairs(16, 16, 0, 1, 1, 64, 32),
    ("few", "broad", "ieee"): Pairs(16, 16, 0, 1, 1, 64, 32),
}
MANY = 24


def candidates_forward(precision: str, dim: int, mean: float) -> Pairs:
    return CANDIDATES_FORWARD[_count(dim, mean), _width(dim), precision]


def candidates_backward(precision: str, dim: int, mean: float) -> Pairs:
    return CANDIDATES_BACKWARD[_count(dim, mean), _width(dim), precision]


def _count(dim: int, mean: float) -> str:
    return "many" if mean >= MANY and dim <= 128 else "few"


def _width(dim: int) -> str:
    return "narrow" if dim <= 64 else "broad"
