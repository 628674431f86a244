"""Launch settings of pairwise_pool, by kernel and precision."""

from __future__ import annotations

from typing import Any, NamedTuple

from .settings import multiprocessors, precision

__all__ = ["BACKWARD", "FEW_PAIRS", "FORWARD", "MOST_FIELDS", "WIDEST", "PairsLaunch", "precision"]

WIDEST = 64  # of fields and of the network
NARROW = 32
MOST_FIELDS = 256
FEW_PAIRS = 28  # of which one program makes all, in backward twice


class PairsLaunch(NamedTuple):
    rows: int  # samples of a program
    columns: int  # of all fields that a program holds at a time, which are at most 8
    num_warps: int
    num_stages: int
    programs_per_sm: int
    wide_slabs: int = 1  # of 16 units, for whose gradients a program of a wide network makes all pairs


FORWARD = {
    "half": PairsLaunch(16, 112, 1, 1, 16),
    "tf32": PairsLaunch(16, 64, 1, 1, 16),
    "ieee": PairsLaunch(16, 64, 1, 1, 16),
}
BACKWARD = {
    "half": PairsLaunch(16, 32, 1, 1, 8, 2),
    "tf32": PairsLaunch(16, 32, 1, 1, 8),
    "ieee": PairsLaunch(16, 16, 1, 1, 8),
}


def forward(call: Any) -> PairsLaunch:
    return FORWARD[precision(call.fields.dtype)]


def backward(call: Any) -> PairsLaunch:
    return BACKWARD[precision(call.fields.dtype)]


def wide(call: Any) -> bool:
    """Whether backward takes the network's gradients apart, as they do not fit into registers."""
    hidden, dim = call.weight.shape
    return max(hidden, dim) > NARROW


def group(launch: PairsLaunch, call: Any) -> int:
    """How many fields a program holds at a time: groups as equal as they can be."""
    _, count, dim = call.fields.shape
    most = max(min(launch.columns // (-(-dim // 16) * 16), 8), 1)
    groups = -(-count // most)
    return max(-(-count // groups), 1)


def shares(launch: PairsLaunch, call: Any) -> int:
    """How many programs share the pairs of a sample, where samples alone would not fill a GPU."""
    batch, count, _ = call.fields.shape
    tiles = max(-(-batch // launch.rows), 1)
    wanted = multiprocessors(call.fields.device) * launch.programs_per_sm // tiles
    return max(min(wanted, count // 8, 4), 1)


def programs(launch: PairsLaunch, call: Any) -> int:
    """How many programs of backward take turns at the samples."""
    tiles = -(-call.fields.shape[0] // launch.rows)
    return max(min(tiles, multiprocessors(call.fields.device) * launch.programs_per_sm), 1)
