"""What the launchers of kernels would launch, without launching it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import recattn.kernels

__all__ = ["Launch", "modules", "recorded_launches"]


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]  # constants of the kernel, and options such as num_warps


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


def modules() -> list[ModuleType]:
    """All that is in `recattn.kernels`."""
    names = [module.name for module in pkgutil.iter_modules(recattn.kernels.__path__)]
    return [importlib.import_module(f"recattn.kernels.{name}") for name in names]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Records the launches inside, which then do nothing."""
    launches: list[Launch] = []
    kept = [
        (module, name, value)
        for module in modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]
    for module, name, value in kept:
        setattr(module, name, Recorder(value, launches))
    try:
        yield launches
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
