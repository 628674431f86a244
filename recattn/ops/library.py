"""The `recattn::` namespace, and how an implementation is chosen within a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch

LIBRARY = torch.library.Library("recattn", "DEF")


class Choice(NamedTuple):
    """What an operator runs, and because of what."""

    operator: str
    kernel: str | None  # which kernels; None for the composite
    reason: str
    variant: str = ""  # of the composite, where it has some


class Variant(NamedTuple):
    """Which way a composite goes on the CPU, and because of what."""

    name: str
    reason: str


def choose(
    operator: str,
    call: Any,
    backend: str,
    on_gpu: bool,
    triton: Callable[[], Any],
    composite: Callable[[], Any],
    variant: Variant | Callable[[], Variant | None] | None = None,
) -> Any:
    """Runs one of two implementations: the backend named, or else kernels on a GPU where they cover the call. `variant`
    says what the composite does on the CPU, if it depends on the call; a function is asked where it is reported."""
    if _explaining is not None:
        variant = variant() if callable(variant) else variant
        _explaining.seen(choice(operator, call, backend, _explaining.on_gpu, variant))
        return composite()
    reason = _reason_for_composite(operator, call, backend, on_gpu)
    if reason is None:
        return triton()
    if backend == "triton":
        raise NotImplementedError(f'backend "triton": {reason}')
    return composite()


def choice(operator: str, call: Any, backend: str, on_gpu: bool, variant: Variant | None = None) -> Choice:
    """What `choose` runs."""
    reason = _reason_for_composite(operator, call, backend, on_gpu)
    if reason is not None and (on_gpu or variant is None):
        return Choice(operator, None, reason)
    if reason is not None and variant is not None:
        return Choice(operator, None, f"{reason}; {variant.reason}", variant.name)
    return Choice(operator, *_kernels(operator).kernel_of(call))


@contextmanager
def explaining(seen: Callable[[Choice], None], on_gpu: bool) -> Iterator[None]:
    """Reports what calls would run, on a GPU or not. Composites run, so that nothing is compiled."""
    global _explaining
    before, _explaining = _explaining, _Explaining(seen, on_gpu)
    try:
        yield
    finally:
        _explaining = before


def report_library(reason: str) -> None:
    """Reports, if calls are, that no operator runs, but the code of the library whose layer was to be replaced."""
    if _explaining is not None:
        _explaining.seen(Choice("", None, reason))


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a call with a tensor is one on a CPU, and not reported as one on a GPU."""
    return tensor.is_cpu and not (_explaining is not None and _explaining.on_gpu)


class _Explaining(NamedTuple):
    seen: Callable[[Choice], None]
    on_gpu: bool


_explaining: _Explaining | None = None


def _reason_for_composite(operator: str, call: Any, backend: str, on_gpu: bool) -> str | None:
    """Why kernels do not run, or None if they do."""
    if backend == "torch":
        return 'backend "torch" is asked for'
    if backend == "auto" and not on_gpu:
        return "not on a GPU"
    try:
        kernels = _kernels(operator)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return "Triton cannot be imported"
    return kernels.uncovered(call)


def _kernels(operator: str) -> Any:
    """The module of an operator's kernels, which imports Triton."""
    return import_module(f"recattn.kernels.{operator}")


def implement(name: str, run: Callable[..., Any]) -> None:
    """Binds `run(*arguments, on_gpu)` to an operator on CPUs and on GPUs."""
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation(run, key.lower()), key)


def implementation(run: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """What an operator does with tensors on one kind of device."""

    def on_device(*arguments: Any) -> Any:
        with surroundings(device_type, arguments):
            return run(*arguments, on_gpu=device_type == "cuda")

    return on_device


def differentiable_once(name: str) -> None:
    """Makes the backward of an operator say so where a second derivative is asked for."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"{name}: a second derivative was asked for, and only the first is built")

    torch.library.register_autograd(f"recattn::{name}_backward", refuse, lib=LIBRARY)


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
