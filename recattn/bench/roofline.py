"""The least time that a device needs for a pass, from what it has to move and to compute."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from recattn.bench.task import Work
from recattn.bench.timing import Meter, meter_for

COPIED = 64 << 20  # bytes; more than caches hold, on most machines
TRIES = 15  # of which the best counts: others may use the machine too
SIDE = {"cpu": 768, "cuda": 4096}  # of the product that rates are taken from


class Peaks(NamedTuple):
    """What a device can do at best.

    Args:
        bandwidth: bytes a second.
        rate: flops a second, of matrix products in the precision at hand.
        source: where the figures are from.
    """

    bandwidth: float
    rate: float
    source: str

    def ms(self, work: Work) -> float:
        """The least time: all bytes or all flops, whatever takes longer."""
        return max(work.bytes / self.bandwidth, work.flops / self.rate) * 1e3

    def share(self, work: Work, ms: float) -> float:
        """How much of the roofline a time is, 1 for all of it. Of a working set that stays in a cache it can be
        more."""
        return self.ms(work) / ms

    def describe(self) -> str:
        return f"{self.bandwidth / 1e9:.3g} GB/s, {self.rate / 1e9:.4g} Gflop/s ({self.source})"


def peaks_of(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Of a GPU whose data sheet is known, by that; of any other device by a copy and a matrix product, once."""
    return _peaks(device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


@lru_cache
def _peaks(device: torch.device, dtype: torch.dtype, threads: int, precision: str) -> Peaks:  # noqa: ARG001 (the key)
    if device.type == "cuda":
        chip = chip_of(torch.cuda.get_device_properties(device))
        if chip is not None:
            narrow = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
            rate = chip.products(narrow or ("fp32" if precision == "highest" else "tf32"))
            return Peaks(chip.bandwidth * 1e12, rate * 1e12, f"data sheet of {chip.name}")
    return measured_peaks(meter_for(device), device, dtype)


def chip_of(properties: Any) -> Any:
    """Of `recattn.inspect.chips`, that which a device is; None for another build of it, as with fewer multiprocessors
    or another memory, whose rates differ."""
    if importlib.util.find_spec("recattn.inspect") is None:
        return None
    chips = importlib.import_module("recattn.inspect.chips").CHIPS
    for chip in chips.values():
        if (
            chip.name.lower() in properties.name.lower()
            and chip.multiprocessors == properties.multi_processor_count
            and abs(properties.total_memory / (chip.memory_gib << 30) - 1) < 0.12  # some of it is reserved
        ):
            return chip
    return None


def measured_peaks(meter: Meter, device: torch.device, dtype: torch.dtype) -> Peaks:
    """The best of a few copies, whose bytes are read and written, and of a few square matrix products."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = SIDE[device.type]
    factor = torch.ones(side, side, dtype=dtype, device=device)
    product = torch.empty_like(factor)

    def best(run: Any) -> float:
        run()
        return min(meter.milliseconds(run) for _ in range(TRIES)) / 1e3

    seconds = best(lambda: target.copy_(source)), best(lambda: torch.mm(factor, factor, out=product))
    return Peaks(2 * COPIED / seconds[0], 2 * side**3 / seconds[1], "measured")
