"""Launch settings, by what a kernel is and the precision that it computes in: no lengths, no batch sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch


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

FORWARD = {
    "half": Launch(32, 1, 2, 64, (32, 8), 64, 256, 8),
    "tf32": Launch(32, 1, 2, 32, (32, 8), 32, 256, 8),
    "ieee": Launch(16, 1, 1, 32, (32, 8), 64, 256, 8),
}

BACKWARD_TOKENS = {
    "half": Launch(64, 4, 1, 64, (32, 16), 64, 512, 2),
    "tf32": Launch(32, 4, 1, 64, (32, 16), 64, 512, 2),
    "ieee": Launch(32, 4, 1, 64, (32, 16), 64, 512, 2),
}
BACKWARD_WEIGHTS = {
    "half": Launch(64, 4, 1, 64, (32, 16), 64, 512, 2),
    "tf32": Launch(32, 4, 1, 64, (32, 16), 64, 512, 2),
    "ieee": Launch(32, 4, 1, 64, (32, 16), 64, 512, 2),
}


def precision(dtype: torch.dtype) -> str:
    """`"half"`, `"tf32"` or `"ieee"`, the last two as PyTorch's own products of float32 are set."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def programs(launch: Launch, rows: int, device: torch.device) -> int:
    """How many programs share `rows` rows."""
    multiprocessors = 1 << 10  # where there is none to fill, enough not to matter
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-rows // launch.least_rows), multiprocessors * launch.programs_per_sm))
