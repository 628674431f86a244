"""What Triton compiles for a launch on a GPU that is not there, and what that needs of the GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from recattn.inspect.chips import Chip
from recattn.inspect.disassembly import Instructions, amdgcn_instructions, sass_instructions
from recattn.inspect.recording import Launch

__all__ = ["Resources", "Source", "compile_source", "source_of"]


class Source(NamedTuple):
    """What is compiled for a launch."""

    code: Any
    target: GPUTarget
    options: dict[str, Any]
    key: str  # the same for the same code


class Resources(NamedTuple):
    registers: int  # per thread
    spill_bytes: int  # that a thread stores to local memory and loads again because registers do not suffice
    shared_bytes: int  # per program
    num_warps: int
    instructions: Instructions


def source_of(launch: Launch, chip: Chip) -> Source:
    """Types, constants and alignments are found as by Triton before it compiles for a GPU that is there."""
    target = GPUTarget("hip", chip.arch, 64) if chip.hip else GPUTarget("cuda", chip.capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.kwargs, bound, specialization, options
    )
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    code = language(kernel, signature, constants, attributes)
    return Source(code, target, options.__dict__, f"{code.hash()} {target} {options.__dict__}")


def compile_source(source: Source) -> Resources:
    """Needs Triton's own log of ptxas, so nothing may be taken from a cache.

    Raises:
        whatever Triton raises.
    """
    said = StringIO()
    with redirect_stdout(said), triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source.code, target=source.target, options=source.options)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if source.target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(_last(rf"\.{name}:\s+(\d+)", text)) for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Resources(registers, 4 * spilled, shared, warps, amdgcn_instructions(text))
    log = said.getvalue()
    registers = int(_last(r"Used (\d+) registers", log))
    spilled = sum(int(_last(rf"(\d+) bytes spill {way}", log)) for way in ("stores", "loads"))
    return Resources(registers, spilled, shared, warps, sass_instructions(_sass(compiled.asm["cubin"])))


def _last(pattern: str, text: str) -> str:
    found: list[str] = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"expected {pattern} in what the assembler said, got {text[-500:]!r}")
    return found[-1]


def _sass(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
