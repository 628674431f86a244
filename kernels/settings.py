"""Launch settings, by what a kernel is, the precision that it computes in, and the class of a GPU where it makes a
difference: no lengths, no batch sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

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
    fresh: bool = False  # whether a tile reads vectors over the units again, as registers do not hold them


class Kernel(NamedTuple):
    """Which kernels a call runs, and because of what."""

    name: str
    reason: str


WIDEST = 128  # of keys, values and hidden layers, but for the wide kernels
WIDEST_DIM, WIDEST_HIDDEN = 256, 512  # of these

# The classes of GPUs that settings differ by, a name each for `row "half cdna"` to be the exception to row "half".
AMPERE, HOPPER, BLACKWELL, GEFORCE, CDNA = "ampere", "hopper", "blackwell", "geforce", "cdna"
# By the major compute capability. Ada is as Ampere; what is sold as GeForce since 12.0 has no matrix unit for groups.
NVIDIA = {8: AMPERE, 9: HOPPER, 10: BLACKWELL, 11: BLACKWELL, 12: GEFORCE}
GROUP = "group"  # the classes whose matrix unit is one for groups of warps, see matrix_unit
CLASSES = (*dict.fromkeys(NVIDIA.values()), CDNA, GROUP)

Table = dict[str, Launch]

# Exceptions are what leaves no local memory in the loops of a kernel, with as few instructions as that takes.

# By the width of keys and values, and by precision: "split" is fp32 at its full accuracy by tf32 and bfloat16 parts,
# "ieee" by plain FMAs. Slabs of keys wider than 128 bytes make the compiler keep an address for each of their rows.
FORWARD: Table = {
    "narrow half": Launch(32, 1, 2, 64, (32, 8), 64, 256, 8),
    "narrow half blackwell": Launch(32, 1, 2, 64, (32, 8), 64, 256, 8, fresh=True),
    "narrow half geforce": Launch(32, 1, 2, 64, (32, 8), 64, 256, 8, fresh=True),
    "narrow half cdna": Launch(64, 4, 2, 64, (32, 8), 64, 256, 4),
    "narrow tf32": Launch(32, 1, 2, 32, (32, 8), 32, 256, 8),
    "narrow split": Launch(32, 2, 1, 32, (32, 8), 64, 256, 4),
    "narrow ieee": Launch(16, 2, 1, 16, (32, 8), 64, 256, 4),
    "broad half": Launch(16, 1, 2, 64, (32, 8), 64, 256, 8),
    "broad tf32": Launch(32, 1, 2, 16, (32, 8), 32, 256, 4),
    "broad split": Launch(32, 2, 1, 16, (32, 8), 32, 256, 4),
    "broad ieee": Launch(16, 2, 1, 16, (32, 8), 64, 256, 4),
}
NARROW = 64

CANDIDATES = 2  # that share a tile of keys: with 4 it is 7 % fewer instructions, and local memory in the loop
CANDIDATES_FORWARD: Table = {
    "half": Launch(32, 1, 1, 64, (32, 8), 64, 256, 4),
    "half hopper": Launch(32, 1, 1, 64, (32, 8), 32, 256, 4),
    "half blackwell": Launch(32, 2, 1, 32, (32, 8), 64, 256, 4),
    "half geforce": Launch(32, 2, 1, 32, (32, 8), 64, 256, 4),
    "half cdna": Launch(64, 4, 1, 64, (32, 8), 64, 256, 2),
}

# Of kernels whose tiles have tokens of several sequences.
PACKED_FORWARD: Table = {
    "half": Launch(32, 1, 1, 16, (32, 8), 16, 256, 8),
    "half geforce": Launch(32, 1, 1, 16, (16, 8), 16, 256, 8),
    "tf32": Launch(32, 2, 1, 32, (32, 8), 32, 256, 8),
}
PACKED_BACKWARD: Table = {
    "half": Launch(32, 2, 1, 32, (32, 16), 32, 512, 4),
    "half cdna": Launch(64, 4, 1, 16, (16, 16), 64, 512, 2),
}
PACKED_WEIGHTS: Table = {
    "half": Launch(64, 4, 1, 64, (64, 16), 64, 2048, 2),
    "half ampere": Launch(32, 4, 1, 64, (64, 16), 64, 2048, 2),
}
SHORT_BACKWARD = 70
SHORT_FORWARD = 50  # rows per sequence below which they pay

# Of the wide kernels `slab` is of the first layer, `last_slab` of all others.
WIDE_SCORES: Table = {
    "half": Launch(64, 4, 2, 32, (256, 16), 128, 0, 0),
    "half group": Launch(128, 8, 2, 32, (256, 16), 128, 0, 0),
    "tf32": Launch(64, 4, 2, 32, (256, 16), 64, 0, 0),
    "ieee": Launch(32, 4, 1, 16, (64, 16), 32, 0, 0),
}
WIDE_BACKWARD: Table = {
    "half": Launch(64, 4, 2, 32, (64, 16), 128, 0, 2),
    "half group": Launch(128, 8, 2, 32, (256, 16), 128, 0, 1),
    "tf32": Launch(32, 4, 2, 32, (256, 16), 64, 0, 1),
    "tf32 group": Launch(32, 4, 2, 32, (256, 16), 64, 0, 2),
    "ieee": Launch(32, 4, 1, 16, (64, 16), 32, 0, 2),
}
WIDE_HISTORIES = Launch(8, 4, 2, 256, (256, 16), 128, 256, 0)

# "split" is "ieee" where products of float32 are made of several narrower ones.
BACKWARD_TOKENS: Table = {
    "half": Launch(32, 2, 1, 16, (16, 16), 32, 512, 4),
    "half cdna": Launch(32, 4, 1, 16, (16, 16), 32, 512, 2),
    "tf32": Launch(32, 2, 1, 16, (16, 16), 64, 512, 4),
    "ieee": Launch(32, 4, 1, 64, (32, 16), 64, 512, 2),
    "split": Launch(32, 2, 1, 16, (16, 16), 64, 512, 4),
}
BACKWARD_WEIGHTS: Table = {
    "half": Launch(32, 2, 1, 64, (32, 8), 64, 512, 4),
    "half cdna": Launch(64, 4, 1, 16, (16, 16), 64, 512, 2),
    "gate half": Launch(32, 2, 1, 32, (32, 8), 64, 512, 4),  # of several params per unit
    "tf32": Launch(32, 2, 1, 64, (32, 8), 32, 512, 4),
    "ieee": Launch(32, 2, 1, 64, (32, 8), 64, 512, 4),
    "split": Launch(32, 2, 1, 64, (32, 8), 64, 512, 4),
}
SPLIT_TOKENS, SPLIT_WEIGHTS, SPLIT_WIDE = "bf16x6", "tf32x3", "tf32x3"  # as tl.dot knows them


Row = TypeVar("Row")


def choose(table: Mapping[str, Row], row: str, device: torch.device) -> Row:
    """The row of a table, or the exception to it for what the device is."""
    for kind in (architecture(device), matrix_unit(device)):
        if f"{row} {kind}" in table:
            return table[f"{row} {kind}"]
    return table[row]


def precision(dtype: torch.dtype) -> str:
    """`"half"`, `"tf32"` or `"ieee"`, the last two as PyTorch's own products of float32 are set."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def forward(precision: str, width: int, hidden: Sequence[int], device: torch.device) -> tuple[Launch, bool]:
    """Settings for keys and values up to `width` wide, and whether operands are split."""
    size = "narrow" if width <= NARROW else "broad"
    split = choose(FORWARD, f"{size} split", device)
    if precision == "ieee" and torch.version.hip is None and _fits(split, width, hidden, device):
        return split, True
    return choose(FORWARD, f"{size} {precision}", device), False


def share_tiles(precision: str, width: int, unit: Any) -> bool:
    """Whether several candidates share a tile: where there are enough of each history, going by their mean."""
    if unit.candidates is None or precision != "half" or width > NARROW:
        return False
    if _assumed_short is not None:
        return _assumed_short
    histories = unit.candidates.queries.numel() - 1
    return unit.query.shape[0] >= 2 * CANDIDATES * histories


def packs_forward(precision: str, width: int, unit: Any) -> bool:
    """Whether sequences are so short that the packed kernel pays."""
    return width <= NARROW and precision in PACKED_FORWARD and _shorter(SHORT_FORWARD, unit)


def packs_backward(precision: str, width: int, unit: Any) -> bool:
    """Whether sequences are so short that the packed kernels pay."""
    return width <= NARROW and precision in PACKED_BACKWARD and _shorter(SHORT_BACKWARD, unit)


def _shorter(length: int, unit: Any) -> bool:
    """Whether sequences that share no history are shorter than this, going by their mean with slack counted in."""
    if unit.candidates is not None or _assumed_short is not None:
        return unit.candidates is None and bool(_assumed_short)
    return unit.positions < length * unit.query.shape[0]


@contextmanager
def assuming(short: bool) -> Iterator[None]:
    """Takes histories to be short, or shared by many candidates, or takes them to be neither, whatever shapes say. All
    kernels of a call are launched, also those that a small batch does not need."""
    global _assumed_short
    before, _assumed_short = _assumed_short, short
    try:
        yield
    finally:
        _assumed_short = before


_assumed_short: bool | None = None


def is_wide(dim: int, hidden: Sequence[int]) -> bool:
    """Whether keys, values or layers are wider than a program can keep the weights of."""
    return max(dim, *hidden) > WIDEST


def wide(
    table: Table,
    precision: str,
    dim: int,
    hidden: Sequence[int],
    device: torch.device,
    twice: bool = False,
) -> Launch:
    """Settings of a wide kernel: those of its table, but smaller tiles where registers do not hold the second layer of
    a tile, twice if asked for, and shared memory not what it reads."""
    unit, launch = matrix_unit(device), choose(table, precision, device)
    if len(hidden) > 2 or max(hidden[1:], default=0) * (1 + twice) > WIDEST_HIDDEN // 2:
        launch = launch._replace(block=launch.block // 2)
    if len(hidden) > 2:
        launch = launch._replace(last_slab=(64, 16))
    changes: list[dict[str, Any]] = [{"num_stages": 1}, {"slab": 16}, {"block": 32}, {"block": 16}]
    for change in changes:
        if _wide_fits(launch, unit, precision, dim, hidden, device):
            break
        launch = launch._replace(**change)
    return launch


def wide_products(precision: str) -> str:
    """What tl.dot is to make products of wide kernels of."""
    if precision == "ieee":
        return "ieee" if torch.version.hip is not None else SPLIT_WIDE
    return "tf32"


def wide_fits(precision: str, dim: int, hidden: Sequence[int], device: torch.device) -> bool:
    """Whether shared memory holds the least tile of all wide kernels."""
    unit = matrix_unit(device)
    return all(
        _wide_fits(wide(table, precision, dim, hidden, device, True), unit, precision, dim, hidden, device)
        for table in (WIDE_SCORES, WIDE_BACKWARD)
    )


class Gpu(NamedTuple):
    """What settings ask of one."""

    hip: bool
    capability: int  # the major one; 0 with hip
    shared_memory: int  # that a program can have


@contextmanager
def choosing_for(gpu: Gpu) -> Iterator[None]:
    """Chooses settings, and forms of kernels, for a GPU that need not be there."""
    global _absent_gpu
    before = _absent_gpu, torch.version.hip
    _absent_gpu, torch.version.hip = gpu, "6.4" if gpu.hip else None
    try:
        yield
    finally:
        _absent_gpu, torch.version.hip = before


_absent_gpu: Gpu | None = None


def architecture(device: torch.device) -> str:
    """The class of a GPU, one of `CLASSES`; where there is none, that of an A100."""
    if torch.version.hip is not None:
        return CDNA
    if _absent_gpu is not None:
        return NVIDIA.get(_absent_gpu.capability, AMPERE)
    if device.type != "cuda":
        return AMPERE
    return NVIDIA.get(torch.cuda.get_device_capability(device)[0], AMPERE)


def matrix_unit(device: torch.device) -> str:
    """What makes a product: a `"warp"`, from registers, or a `"group"` of four, from shared memory, which wants tiles
    twice as high."""
    return GROUP if architecture(device) in (HOPPER, BLACKWELL) else "warp"


def _wide_fits(
    launch: Launch, unit: str, precision: str, dim: int, hidden: Sequence[int], device: torch.device
) -> bool:
    """Whether shared memory holds k and q*k of a tile, the weights of a slab of units as often as they are in flight,
    and the slab on its way from one product to the next."""
    itemsize = 2 if precision == "half" else 4
    dim, second = _round_up(dim, 16), _round_up(hidden[1], 16) if len(hidden) > 1 else 0
    in_flight = launch.num_stages if unit == GROUP else max(launch.num_stages - 1, 1)
    weights = launch.slab * (2 * dim + second)
    tile = launch.block * (2 * dim * itemsize + launch.slab * (4 + itemsize))
    return tile + in_flight * weights * itemsize + (4 << 10) <= _shared_memory(device)


def _fits(launch: Launch, width: int, hidden: Sequence[int], device: torch.device) -> bool:
    """Whether shared memory holds two tf32 parts of the first layer's weight, three bfloat16 parts of the others, and
    a tile of keys."""
    width, hidden = _round_up(width, 16), [_round_up(n, 16) for n in hidden]
    later = sum(rows * columns for rows, columns in itertools.pairwise(hidden))
    return 8 * width * hidden[0] + 6 * later + 4 * width * launch.block <= _shared_memory(device)


def _shared_memory(device: torch.device) -> int:
    """How much of it a program can have; where there is no GPU to ask, as on an A100."""
    if _absent_gpu is not None:
        return _absent_gpu.shared_memory
    if torch.version.hip is not None:
        return 64 << 10
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
    least = 1 if _assumed_short is None else 2  # so that what joins their parts is launched
    return max(least, min(-(-rows // launch.least_rows), multiprocessors(device) * launch.programs_per_sm))


def chunk_rows(launch: Launch, light: Launch, device: torch.device) -> int:
    """The rows of a chunk of wide backward: a tile for each program that runs at once, rounded up to whole programs of
    the `light` launch, whose rows are a multiple of a tile's."""
    return _round_up(multiprocessors(device) * launch.programs_per_sm * launch.block, light.least_rows)


def all_registers() -> dict[str, int]:
    """An option for launches of one warp. Left to itself, NVIDIA's assembler at times stops at 168 registers a thread,
    so that twelve programs fit into a multiprocessor, and spills."""
    return {} if torch.version.hip is not None else {"maxnreg": 255}


def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 << 10  # where there is none to fill, enough not to matter
