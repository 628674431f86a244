"""What a layer of another library must be like for a fused operator to compute the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recattn.backend import backend, requested_backend
from recattn.ops.library import on_cpu, report_library

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OPTIONS = "_recattn"  # the attribute that `fuse` adds to a layer
# By operator, how many positions, padding included, a batch on a CPU has before the fused layer takes less time than
# the library's: measured with histories of 20 and 50, a fifth of them items, of widths 16 to 64. Of pairwise_pool it is
# pairs of fields: 7 to 39 fields of 16 and 32.
SMALL = {
    "activation_unit": 2000,
    "activation_unit_statistics": 5000,
    "target_attention": 4000,
    "pairwise_pool": 40_000,
}
UNITS = {"pairwise_pool": "pairs"}


class Uncovered(Exception):
    """Why no fused operator computes what a layer computes."""


class Options(NamedTuple):
    """What `fuse` was asked for."""

    backend: str = "auto"
    semantics: str = "exact"

    @classmethod
    def of(cls, layer: nn.Module) -> Options:
        options: Options = vars(layer).get(OPTIONS, cls())
        return options

    @property
    def exact(self) -> bool:
        return self.semantics == "exact"


class Swap(NamedTuple):
    """A library's layer and the fused one that takes its place."""

    original: type[nn.Module]
    fused: type[nn.Module]  # a subclass that overrides methods and adds no state
    # Of a layer and the options what to remark on. Raises Uncovered.
    check: Callable[[Any, Options], Sequence[str]]
    operator: str = ""  # what batches are small for, a key of `SMALL`; empty if none is


def leave_small(x: Tensor, options: Options, operator: str, count: int | None = None) -> None:
    """Raises Uncovered where the library's own code takes less time, and may run.

    Args:
        x: what the layer is called with, `[B, L, ...]`.
        count: what `SMALL` counts; positions if not given.
    """
    if not options.exact or requested_backend() != "auto" or torch.compiler.is_compiling():
        return
    count = x.shape[:2].numel() if count is None else count
    if count < SMALL[operator] and on_cpu(x):
        raise Uncovered(f"{count} {unit_of(operator)}, fewer than {SMALL[operator]} on a CPU")


def unit_of(operator: str) -> str:
    return UNITS.get(operator, "positions")


def instead_of(own: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function a method of a fused layer, with the library's `own` for whatever it does not cover.

    What records or compiles a model gets the library's method: torch.fx, `torch.jit.trace`, `torch.export` and ONNX by
    running it, TorchScript by reading its source, for which the new method passes as it.
    """

    def decorate(fused: Callable[..., Any]) -> Any:
        def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if _exporting((*args, *kwargs.values())):
                return own(layer, *args, **kwargs)
            options = Options.of(layer)
            with nullcontext() if options.backend == "auto" else backend(options.backend):
                try:
                    return fused(layer, *args, **kwargs)
                except Uncovered as reason:
                    if requested_backend() == "triton":
                        raise NotImplementedError(f'backend "triton": {reason}') from None
                    report_library(str(reason))
                return own(layer, *args, **kwargs)

        def method(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run(layer, *args, **kwargs)

        # TorchScript looks up the names in the library's source among the globals of the method.
        twin = FunctionType(method.__code__, own.__globals__, closure=method.__closure__)
        functools.update_wrapper(twin, own)
        twin.__doc__, twin.__module__ = fused.__doc__, fused.__module__
        twin.__qualname__ = fused.__qualname__
        return twin

    return decorate


def _exporting(arguments: Iterable[Any]) -> bool:
    """Whether a call is to be recorded; ONNX is made of `jit.trace` or `torch.export`."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or any(map(_is_proxy, arguments))


def _is_proxy(argument: Any) -> bool:
    """Whether it stands for a tensor while torch.fx traces."""
    if isinstance(argument, list | tuple):
        return any(map(_is_proxy, argument))
    return isinstance(argument, torch.fx.Proxy)


def expect(name: str, module: nn.Module, *classes: type[nn.Module]) -> None:
    """Raises unless a call of `module` does what one of `classes` says, and nothing else.

    A fused layer reads the parameters of the modules inside it and never calls them.
    """
    if type(module) not in classes:
        expected = " or ".join(cls.__name__ for cls in classes)
        raise Uncovered(f"{name}: {type(module).__name__} in place of {expected}")
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise Uncovered(f"{name}: its hooks would not run")
    expect_own("forward", module, name)


def expect_own(method: str, module: nn.Module, name: str = "") -> None:
    """Raises if an instance has a method of its own, in place of that of its class."""
    if method in vars(module):
        raise Uncovered(f"{name}: its {method} is replaced" if name else f"its {method} is replaced")
