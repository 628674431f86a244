"""Before the first request: compile what a module needs, and on request measure which launch settings suit the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["autotune", "warmup"]


def warmup(module: nn.Module, *args: Any, backward: bool | None = None, **kwargs: Any) -> None:
    """Compiles every kernel that a module may need for calls like this one, so that no request waits for a compiler.

    No kernel is compiled for lengths or batch sizes, so one small batch stands for all: what matters are the dtypes,
    the layout and the options of the call. Kernels for short and for long histories, between which a call chooses by
    its shapes, are compiled both. Nothing is left behind: no gradients, no updated statistics, no drawn random numbers.

    Args:
        module: a layer or a model; in the mode, training or not, that it will be used in.
        args, kwargs: what it is called with.
        backward: whether gradients will be needed; if not given, as in the module's mode.
    """
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    gpus = [device for device in devices if device.type == "cuda"]
    with (
        torch.random.fork_rng(devices=gpus),
        kept_buffers(module),
        torch.set_grad_enabled(_wants(module, backward)),
    ):
        for short in (False, True):
            with _histories(short):
                _run(module, args, kwargs)
    for device in gpus:
        torch.cuda.synchronize(device)


def autotune(
    module: nn.Module,
    *args: Any,
    backward: bool | None = None,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Measures the launch settings of each kernel that a module's call launches, and keeps the fastest on disk.

    Later processes take them with the environment variable `RECATTN_AUTOTUNE=1`. They are kept for kinds of calls: a
    kernel, a precision, widths rounded up to powers of two; never for lengths or batch sizes. Give a batch as large as
    those that will come.

    Args:
        module, args, kwargs, backward: as in `warmup`.
        timer: what a call takes; on a GPU `triton.testing.do_bench` if not given.

    Returns:
        One `recattn.kernels.tuning.Tuned` per kernel: settings and times, default and found, and what failed and why.

    Raises:
        ImportError: without Triton.
    """
    from recattn.kernels import tuning

    device = next(
        (tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu")
    )

    def measure(call: Callable[[], Any]) -> float:
        return tuning.milliseconds(call, device) if timer is None else timer(call)

    gpus = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=gpus),
        kept_buffers(module),
        torch.set_grad_enabled(_wants(module, backward)),
    ):
        return tuning.autotune(lambda: _run(module, args, kwargs), device, measure)


def _wants(module: nn.Module, backward: bool | None) -> bool:
    return module.training if backward is None else backward


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    result = module(*args, **kwargs)
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]
    inputs: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    inputs += [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    outputs = [x for x in outputs if x.requires_grad]
    if outputs and inputs:
        torch.autograd.grad([x.sum() for x in outputs], inputs, allow_unused=True)


@contextmanager
def _histories(short: bool) -> Iterator[None]:
    """Takes histories to be short or long, whatever their mean length, where Triton is there at all."""
    try:
        from recattn.kernels import settings
    except ImportError:
        yield
        return
    with settings.assuming(short=short):
        yield


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(kept[name])
