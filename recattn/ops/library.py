"""The `recattn::` namespace, and how an implementation is chosen within a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

LIBRARY = torch.library.Library("recattn", "DEF")


def choose(
    backend: str,
    on_gpu: bool,
    uncovered: Callable[[], str | None],
    triton: Callable[[], Any],
    composite: Callable[[], Any],
) -> Any:
    """Runs one of two implementations: the backend named, or else kernels on a GPU where they cover the call.

    Args:
        uncovered: why no kernel covers the call, or None if one does.
    """
    if backend == "torch" or (backend == "auto" and not on_gpu):
        return composite()
    reason = uncovered()
    if reason is None:
        return triton()
    if backend == "auto":
        return composite()
    raise NotImplementedError(f'backend "triton": {reason}')


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Keeps autocast, where it is on, out of an implementation, which chooses its own dtypes."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def surroundings(device_type: str, arguments: Sequence[Any]) -> Iterator[None]:
    """What an implementation runs in: without autocast, and where there are several GPUs with that of its tensors as
    the current one, on which Triton launches."""
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    on_its_device = torch.cuda.device(device) if device_type == "cuda" else nullcontext()
    with without_autocast(device_type), on_its_device:
        yield
