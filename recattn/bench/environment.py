"""Where figures come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import recattn
from recattn.bench.task import name_of


def environment(device: torch.device, dtype: torch.dtype) -> str:
    """In one line."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{machine(device)}{threads}, {name_of(dtype)}, PyTorch {torch.__version__}"


def machine(device: torch.device) -> str:
    """The name of the hardware that computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def details(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Hardware, driver, versions and clocks, as far as they can be found out."""
    found = {
        "device": machine(device),
        "driver, clock now, highest clock": _driver(device) if device.type == "cuda" else None,
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "CPU clock now": _cpu_clock(),
        "load average": ", ".join(f"{x:.1f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA or ROCm": torch.version.cuda or torch.version.hip,
        "Triton": _version("triton"),
        "NumPy": _version("numpy"),
        "recattn": recattn.__version__ + (f", commit {revision}" if (revision := commit()) else ""),
        "dtype": f"{name_of(dtype)}, float32 products: {torch.get_float32_matmul_precision()}",
    }
    return {name: value for name, value in found.items() if value is not None}


def command_line(argv: Sequence[str]) -> str:
    """What to type to do it again."""
    return shlex.join(["recattn", *argv])


def commit() -> str | None:
    """Of the checkout that recattn runs from, `-dirty` with changes in it; None elsewhere."""
    folder = Path(recattn.__file__).parent
    described = _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*")
    inside = _output("git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py")
    return described if inside else None


def _driver(device: torch.device) -> str | None:
    index = str(device.index or 0)
    if torch.version.hip is not None:
        table = _output("rocm-smi", "-d", index, "--showdriverversion", "--showclocks", "--csv")
        return None if table is None else "; ".join(line for line in table.splitlines() if line)
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm"
    return _output("nvidia-smi", "-i", index, query, "--format=csv,noheader")


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_clock() -> str | None:
    megahertz = _cpuinfo("cpu MHz")
    return None if megahertz is None else f"{float(megahertz) / 1e3:.2f} GHz"


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return None
