"""Launch settings, by what a kernel is and the precision that it computes in: no lengths, no batch sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    block: int  # rows per tile
    num_warps: int
    num_stages: int
    slab: int  # widest slab of a hidden layer that another one reads
    last_slab: tuple[int, int]  # widest and narrowest slab of the last hidden layer
    dim_slab: int  # widest slab of keys and values
    least_rows: int  # fewest rows worth a program
    programs_per_sm: int


WIDEST = 128  # of keys, values and hidden layers

# By the width of keys and values, and by precision: "split" is fp32 at its full accuracy by tf32 and bfloat16 parts,
# "ieee" by plain FMAs. Slabs of keys wider than 128 bytes make the compiler keep an address for each of their rows.
FORWARD = {
    ("narrow", "half"): Launch(32, 1, 2, 64, (32, 8), 64, 256, 8),
    ("narrow", "tf32"): Launch(32, 1, 2, 32, (32, 8), 32, 256, 8),
    ("narrow", "split"): Launch(32, 2, 1, 32, (32, 8), 64, 256, 4),
    ("narrow", "ieee"): Launch(16, 2, 1, 16, (32, 8), 64, 256, 4),
    ("broad", "half"): Launch(16, 1, 2, 64, (32, 8), 64, 256, 8),
    ("broad", "tf32"): Launch(32, 1, 2, 16, (32, 8), 32, 256, 4),
    ("broad", "split"): Launch(32, 2, 1, 16, (32, 8), 32, 256, 4),
    ("broad", "ieee"): Launch(16, 2, 1, 16, (32, 8), 64, 256, 4),
}
NARROW = 64

# "split" is "ieee" where products of float32 are made of several narrower ones.
BACKWARD_TOKENS = {
    "half": Launch(32, 2, 1, 16, (16, 16), 64, 512, 4),
    "tf32": Launch(32, 2, 1, 16, (16, 16), 64, 512, 4),
    "ieee": Launch(32, 4, 1, 64, (32, 16), 64, 512, 2),
    "split": Launch(32, 2, 1, 16, (16, 16), 64, 512, 4),
}
BACKWARD_WEIGHTS = {
    "half": Launch(32, 2, 1, 64, (32, 8), 64, 512, 4),
    "tf32": Launch(32, 2, 1, 64, (32, 8), 64, 512, 4),
    "ieee": Launch(32, 2, 1, 64, (32, 8), 64, 512, 4),
    "split": Launch(32, 2, 1, 64, (32, 8), 64, 512, 4),
}
SPLIT_TOKENS, SPLIT_WEIGHTS = "bf16x6", "tf32x3"  # as tl.dot knows them


def precision(dtype: torch.dtype) -> str:
    """`"half"`, `"tf32"` or `"ieee"`, the last two as PyTorch's own products of float32 are set."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def forward(precision: str, width: int, hidden: Sequence[int], device: torch.device) -> tuple[Launch, bool]:
    """Settings for keys and values up to `width` wide, and whether operands are split."""
    size = "narrow" if width <= NARROW else "broad"
    split = FORWARD[size, "split"]
    if precision == "ieee" and torch.version.hip is None and _fits(split, width, hidden, device):
        return split, True
    return FORWARD[size, precision], False


def _fits(launch: Launch, width: int, hidden: Sequence[int], device: torch.device) -> bool:
    """Whether shared memory holds two tf32 parts of the first layer's weight, three bfloat16 parts of the others, and
    a tile of keys."""
    width, hidden = _round_up(width, 16), [_round_up(n, 16) for n in hidden]
    later = sum(rows * columns for rows, columns in itertools.pairwise(hidden))
    return 8 * width * hidden[0] + 6 * later + 4 * width * launch.block <= _shared_memory(device)


def _shared_memory(device: torch.device) -> int:
    """How much of it a program can have; where there is no GPU to ask, as on an A100."""
    if device.type != "cuda":
        return 160 << 10
    # The least that an NVIDIA GPU of compute capability 8.0 and up has, if PyTorch does not tell.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def can_split(dim: int, hidden: tuple[int, ...], device: torch.device) -> bool:
    """Whether backward can make its float32 products of several narrower ones each, exact but for the last
    bits. Shared memory has to hold three bfloat16 parts of all weights, in two layouts, and of a tile's keys and
    gradients."""
    if torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    weights = dim * hidden[0] + sum(m * n for m, n in itertools.pairwise(hidden))
    needed = 12 * weights + 32 * (12 * dim + 6 * hidden[0])
    return needed <= _shared_memory(device)


def programs(launch: Launch, rows: int, device: torch.device) -> int:
    """How many programs share `rows` rows."""
    multiprocessors = 1 << 10  # where there is none to fill, enough not to matter
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-rows // launch.least_rows), multiprocessors * launch.programs_per_sm))


# ------------------------------------------------------------------------------------------------ target_attention


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


def multiprocessors(device: torch.device) -> int:
    """Where there is none to fill, enough not to matter."""
    if device.type != "cuda":
        return 1 << 10
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


WIDEST_HEAD = 256
SHORT = 48  # mean length below which histories share a tile

# One query per history, by the width that a program takes and by precision; "ieee" is by parts where it can be.
# Wider tiles, or larger ones, would keep more than 255 words in a thread's registers.
QUERY_NARROW = 64
QUERY_FORWARD = {
    ("narrow", "half"): Tiles(32, 16, 1, 2, 64, 256, 12),
    ("narrow", "tf32"): Tiles(32, 16, 1, 2, 64, 256, 12),
    ("narrow", "ieee"): Tiles(32, 16, 1, 2, 64, 256, 12),
    ("broad", "half"): Tiles(16, 16, 1, 2, 64, 256, 12),
    ("broad", "tf32"): Tiles(16, 16, 1, 2, 64, 256, 12),
    ("broad", "ieee"): Tiles(16, 16, 1, 2, 64, 256, 12),
}
QUERY_BACKWARD = {
    ("narrow", "half"): Tiles(32, 16, 1, 2, 64, 256, 8),
    ("narrow", "tf32"): Tiles(16, 16, 1, 2, 64, 256, 8),
    ("narrow", "ieee"): Tiles(16, 16, 1, 2, 64, 256, 8),
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
