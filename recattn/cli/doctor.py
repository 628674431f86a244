"""`recattn doctor`: what is installed here, what runs on it, and what is wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from recattn import __version__
from recattn.backend import requested_backend
from recattn.explain import Row, explain
from recattn.nn import ActivationUnit, AttentionalGRU, PairwisePool, SelfAttention, TargetAttention

TORCH, TRITON = (2, 8), ((3, 6), (3, 10))  # from, and below
OPTIONAL = {
    "bench": ("matplotlib", "rich", "scikit-learn"),
    "peers": ("deepctr-torch", "fuxictr", "recbole", "torch-rechub", "tzrec-sekai"),
    "jagged tensors": ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"),
}


class Finding(NamedTuple):
    """One line of the report; `cure` says what to do about a fault."""

    name: str
    found: str
    cure: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reports versions, devices and which implementation operators take on each. The exit status is 1 if"
        " something is wrong; what to do about it stands below."
    )


def run(args: argparse.Namespace) -> int:  # noqa: ARG001 (it has none)
    findings = [*versions(), *devices(), *settings()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'FAULT' if finding.cure else 'ok':6}{finding.name:{width + 2}}{finding.found}")
    faults = [finding for finding in findings if finding.cure]
    for finding in faults:
        print(f"\n{finding.name}: {finding.cure}")
    return int(bool(faults))


def versions() -> Iterator[Finding]:
    """Of Python, PyTorch, Triton and what is optional."""
    yield Finding("recattn", __version__)
    yield Finding("python", platform.python_version())
    old = _release(torch.__version__) < TORCH
    yield Finding(
        "torch", torch.__version__, f"expected at least {_dotted(TORCH)}; upgrade it" if old else None
    )
    yield _triton()
    for extra, names in OPTIONAL.items():
        have = [f"{name} {version}" for name in names if (version := _version(name))]
        yield Finding(extra, ", ".join(have) or "none")


def _triton() -> Finding:
    version = _version("triton") or _version("pytorch-triton-rocm") or _version("pytorch-triton")
    if version is None:
        cure = "kernels need it; pip install triton" if torch.cuda.is_available() else None
        return Finding("triton", "none: PyTorch operations only", cure)
    low, high = TRITON
    if not low <= _release(version) < high:
        cure = f"expected {_dotted(low)} or later, below {_dotted(high)}: install one that goes with PyTorch"
        return Finding("triton", version, cure)
    numpy = _version("numpy") or "0"
    if _interpreted() and _release(version) < (3, 7) and _release(numpy) >= (2, 4):
        return Finding(
            "triton",
            version,
            f"its interpreter breaks on numpy {numpy}; pip install 'numpy<2.4', or triton 3.7",
        )
    return Finding("triton", version)


def devices() -> Iterator[Finding]:
    """Each device, and what operators run on it."""
    implementation = {
        "auto": "PyTorch operations",
        "torch": "PyTorch operations",
        "triton": "kernels in Triton's interpreter" if _interpreted() else "kernels (none can run here)",
    }[requested_backend()]
    cure = None
    if requested_backend() == "triton" and not _interpreted() and not torch.cuda.is_available():
        cure = "RECATTN_BACKEND=triton asks for kernels, which need a GPU or TRITON_INTERPRET=1; unset it"
    yield Finding("cpu", f"{torch.get_num_threads()} of {os.cpu_count()} threads; {implementation}", cure)
    if cure is None:
        yield from operators("cpu")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        kernels = (
            "PyTorch operations" if requested_backend() == "torch" else "kernels where they cover the call"
        )
        fault = _gpu_fault(properties)
        yield Finding(f"cuda:{index}", f"{name}; {kernels}", fault)
        if fault is None:
            yield from operators(f"cuda:{index}")
    if not torch.cuda.is_available():
        hardware = [path for path in ("/dev/nvidia0", "/dev/kfd") if Path(path).exists()]
        cure = None
        if hardware:
            cure = "the machine has one, but PyTorch cannot use it: install a build for CUDA or ROCm, check the driver"
        yield Finding(
            "gpu", f"none that PyTorch sees{' (' + hardware[0] + ' exists)' if hardware else ''}", cure
        )


def operators(device: str) -> Iterator[Finding]:
    """What each operator runs there, called as by its layer with the usual sizes; on a GPU by precision."""
    layers = (
        ActivationUnit(64),
        TargetAttention(64),
        SelfAttention(64),
        AttentionalGRU(64, 64),
        PairwisePool(16),
    )
    for layer in layers:
        for dtype in (torch.float32, torch.bfloat16) if device != "cpu" else (torch.float32,):
            rows = explain(layer, device=device, dtype=dtype)
            name = f"{rows.rows[0].operator}" + (
                f", {str(dtype).removeprefix('torch.')}" if device != "cpu" else ""
            )
            yield Finding(f"  {name}", "; ".join(_in_words(row) for row in rows))


def _in_words(row: Row) -> str:
    histories = f"{row.histories} histories: " if row.histories else ""
    runs = f"the {row.kernel} kernels" if row.runs == "kernel" else "PyTorch operations"
    return f"{histories}{runs} ({row.reason})"


def _gpu_fault(properties: object) -> str | None:
    if torch.version.hip is None and (properties.major, properties.minor) < (8, 0):  # type: ignore[attr-defined]
        return "expected compute capability 8.0 or later for the kernels; use backend('torch') on this one"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))) and "CC" not in os.environ:
        return "Triton compiles a launcher with a C compiler, and there is none: install gcc, or set CC"
    return None


def settings() -> Iterator[Finding]:
    """What the environment asks for."""
    yield Finding("RECATTN_BACKEND", requested_backend())
    interpreted = None
    if _interpreted() and torch.cuda.is_available():
        interpreted = "kernels run in Python, thousands of times slower than on the GPU; unset it"
    yield Finding("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "unset"), interpreted)
    precision = torch.get_float32_matmul_precision()
    meaning = "IEEE accuracy" if precision == "highest" else "tf32 where the GPU has it, which is faster"
    yield Finding("float32 products", f"{precision}: {meaning}")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
