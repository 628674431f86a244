"""The GPUs that kernels are inspected for: what limits a program on one, and how fast it is at best.

The chips are the usual ones of their architecture: NVIDIA A100 80GB SXM, GA102 (GeForce RTX 3090), L40S, H100 SXM5, HGX
B200, GeForce RTX 5090, AMD Instinct MI300X. Rates are dense, by data sheets and architecture white papers.

- Limits per multiprocessor (warps, programs, shared memory, registers) are those of NVIDIA's own `cuda::arch_traits`
  in libcu++, all of which were compared; AMD's are of its GPU specifications (64 KiB of LDS, 304 units) and of LLVM's
  occupancy (8 waves a SIMD unit, 512 registers). `max_programs` of gfx942 is not confirmed.
- H100, L40S, RTX 5090 and MI300X were compared with figures that cite the makers' papers. Matrix rates agree with units
  times clock: H100 132 x 4096 x 1.83 GHz, MI300X 304 x 2048 x 2.1 GHz. H100's 67 Tflop/s of fp32 are at 1.98 GHz. That
  RTX 5090 halves its 419 Tflop/s of fp16 where sums are fp32 is not confirmed.
- B200: 2250 Tflop/s are confirmed. The same source has 80 of fp32, 1100 of tf32 and up to 8 TB/s for HGX; what stands
  here is a few percent off that, and not confirmed, as are its 148 multiprocessors and 1.965 GHz.
- A100 and RTX 3090 were not compared again, nor 16 special functions per clock with a table of sm_100 or sm_120.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CHIPS", "Chip"]


class Chip(NamedTuple):
    """Rates are in units of 10¹² a second."""

    arch: str
    name: str
    multiprocessors: int
    clock_ghz: float
    bandwidth: float  # bytes of memory
    half: float  # flops of matrix products of fp16 or bf16 with sums in fp32
    tf32: float  # of float32 rounded to tf32, or xf32
    fma: float  # flops of fp32 outside the matrix units
    special_per_clock: int  # exp2, tanh, ... per multiprocessor
    max_warps: int  # per multiprocessor
    max_programs: int
    shared_memory: int  # bytes per multiprocessor
    program_shared_memory: int  # bytes that one program can have
    memory_gib: int
    registers: int = 65536  # of 32 bits per multiprocessor; with hip, per lane of a SIMD unit
    reserved_shared_memory: int = 1024  # per program
    threads_per_warp: int = 32

    @property
    def hip(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> int:
        """As Triton names the target of NVIDIA's compiler, 80 for 8.0; 0 with hip."""
        return 0 if self.hip else int(self.arch.removeprefix("sm_"))

    @property
    def special(self) -> float:
        return self.multiprocessors * self.special_per_clock * self.clock_ghz / 1e3

    def products(self, dtype: str) -> float:
        """Flops of matrix products; those of fp32 at full accuracy are three of tf32, or are made elsewhere."""
        if dtype in ("bf16", "fp16"):
            return self.half
        if dtype == "tf32":
            return self.tf32
        return max(self.fma, self.tf32 / 3)

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int) -> float:
        """The part of a multiprocessor's warps that can be resident, if a program has so many of everything."""
        if self.hip:
            # Four SIMD units with 512 registers a lane, given out by eights; a workgroup's waves are spread over them.
            waves = 4 * min(self.max_warps // 4, self.registers // max(_up(registers, 8), 8))
        else:
            # A quarter of the registers for each of four schedulers, given out by 256 a warp.
            waves = 4 * (self.registers // 4 // max(_up(registers, 8) * 32, 256))
        programs = min(min(waves, self.max_warps) // num_warps, self.max_programs)
        shared = _up(shared_bytes, 128) + self.reserved_shared_memory
        if shared:
            programs = min(programs, self.shared_memory // shared)
        return programs * num_warps / self.max_warps


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


K = 1 << 10
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", "A100", 108, 1.41, 2.039, 312, 156, 19.5, 16, 64, 32, 164 * K, 163 * K, 80),
        Chip("sm_86", "RTX 3090", 82, 1.695, 0.936, 71, 35.6, 35.6, 16, 48, 16, 100 * K, 99 * K, 24),
        Chip("sm_89", "L40S", 142, 2.52, 0.864, 362, 183, 91.6, 16, 48, 24, 100 * K, 99 * K, 48),
        Chip("sm_90", "H100", 132, 1.83, 3.35, 989, 495, 67, 16, 64, 32, 228 * K, 227 * K, 80),
        Chip("sm_100", "B200", 148, 1.965, 7.7, 2250, 1125, 74.4, 16, 64, 32, 228 * K, 227 * K, 180),
        Chip("sm_120", "RTX 5090", 170, 2.407, 1.792, 209.5, 104.8, 104.8, 16, 48, 24, 100 * K, 99 * K, 32),
        Chip(
            "gfx942",
            "MI300X",
            304,
            2.1,
            5.3,
            1307,
            654,
            163.4,
            16,
            32,
            32,
            64 * K,
            64 * K,
            192,
            registers=512,
            reserved_shared_memory=0,
            threads_per_warp=64,
        ),
    )
}
