"""Which implementation each layer of a model takes, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as modules

from recattn.nn.twin import Twin
from recattn.ops.library import Choice, explaining
from recattn.warmup import kept_buffers

__all__ = ["Explanation", "Row", "explain"]

# Histories of the calls that layers are explained by: below and above the lengths that kernels are chosen by.
LENGTHS = {"short": 8, "long": 256}


class Row(NamedTuple):
    """What one layer runs.

    Attributes:
        path: as in `named_modules`; empty for the model itself, or for a call that is of no layer.
        layer: the name of its class.
        histories: the histories that this holds for: `"short"`, `"long"`, or empty for any, or those given.
        operator: the operator it calls; empty if none.
        runs: `"kernel"`; `"composite"`, the PyTorch implementation; `"eager"`; or `"library"`, the code of the library
            whose layer `recattn.fuse` replaced.
        kernel: which of the operator's kernels; `"few rows"` for the composite of activation_unit where it keeps hidden
            units from forward to backward, if that is asked for.
        reason: the condition that decides.
    """

    path: str
    layer: str
    histories: str
    operator: str
    runs: str
    kernel: str
    reason: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """What the layers of a model run, in the order of their calls; prints as a table."""

    rows: tuple[Row, ...]
    note: str = ""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no layer that calls an operator of recattn"
        cells = [Row("path", "layer", "histories", "operator", "runs", "kernel", "because")]
        cells += [
            row._replace(path=row.path or "(model)", histories=row.histories or "any") for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([*lines, *([self.note] if self.note else [])])

    __repr__ = __str__


def explain(
    model: Callable[..., Any],
    *args: Any,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Explanation:
    """Says which implementation the layers of a model take: a fused kernel and its class, the composite PyTorch path,
    or the eager twin; and why. It asks what the operators ask when they are called.

    Args:
        model: a layer, a model, or any function that calls `recattn.functional`.
        args, kwargs: what it is called with. Without any, each layer of `recattn.nn` is called by itself, with short
            and with long histories; layers that `recattn.fuse` swapped in need a call.
        device: where the model would be; where it is if not given. It need not be there.
        dtype: of the parameters and the inputs, only without args; as the parameters are if not given.

    Nothing is compiled and no kernel is run; the call itself runs, through the composite path. What only forward
    decides is told: kernels of backward may be of another class, but of the same path.

    Raises:
        TypeError: if `model` is neither a module nor called with anything, or a dtype comes with a call.
    """
    given = bool(args or kwargs)
    if given and dtype is not None:
        raise TypeError("dtype: expected None, since the model is called with tensors")
    if not given and not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, or what to call it with, got {type(model).__name__}"
        )
    current = _device_of(model, *args, *kwargs.values())
    device = current if device is None else torch.device(device)
    on_gpu = device.type == "cuda"
    rows: list[Row] = []
    with torch.no_grad(), torch.random.fork_rng([current] if current.type == "cuda" else []):
        if given:
            kept = kept_buffers(model) if isinstance(model, nn.Module) else nullcontext()
            with kept, _watching(model, "", on_gpu, rows):
                model(*args, **kwargs)
        else:
            assert isinstance(model, nn.Module)
            for path, layer in model.named_modules():
                if isinstance(layer, Twin):
                    rows += (row for row in _of_layer(path, layer, device, dtype) if row not in rows)
    note = ""
    if on_gpu and not torch.cuda.is_available():
        note = "No GPU is here: kernels are chosen as on an A100."
    return Explanation(tuple(rows), note)


def _of_layer(path: str, layer: Twin, device: torch.device, dtype: torch.dtype | None) -> list[Row]:
    """What calls of a copy of a layer run; one row per operator if all histories take the same."""
    there = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
    copy = deepcopy(layer).to(there, dtype)
    if dtype is None:
        dtype = next((parameter.dtype for parameter in layer.parameters()), torch.get_default_dtype())
    like = torch.empty(0, dtype=dtype, device=there)
    by_length: dict[str, list[Row]] = {}
    for histories, length in LENGTHS.items():
        by_length[histories] = []
        example = copy.example(like, torch.tensor([0, length, 2 * length], device=there))
        if example is None:
            return []
        with _watching(copy, path, device.type == "cuda", by_length[histories]):
            copy(*example)
    if by_length["short"] == by_length["long"]:
        return by_length["short"]
    return [row._replace(histories=histories) for histories, rows in by_length.items() for row in rows]


@contextmanager
def _watching(model: Callable[..., Any], prefix: str, on_gpu: bool, rows: list[Row]) -> Iterator[None]:
    """Adds a row for each operator that is called, under the innermost layer of the model that calls it."""
    paths: dict[nn.Module, str] = {}
    if isinstance(model, nn.Module):
        paths = {module: ".".join(filter(None, (prefix, path))) for path, module in model.named_modules()}
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        if module in paths:
            running.append(module)
            if isinstance(module, Twin) and module.implementation == "eager" and _of_recattn(module):
                reason = 'switched by `use("eager")`'
                add(Row(paths[module], type(module).__name__, "", "", "eager", "", reason))

    def leave(module: nn.Module, *_: Any) -> None:
        if running and running[-1] is module:
            running.pop()

    def see(choice: Choice) -> None:
        path, layer = (paths[running[-1]], type(running[-1]).__name__) if running else (prefix, "")
        runs = "kernel" if choice.kernel is not None else "composite" if choice.operator else "library"
        add(Row(path, layer, "", choice.operator, runs, choice.kernel or choice.variant, choice.reason))

    def add(row: Row) -> None:
        if row not in rows:
            rows.append(row)

    hooks = [
        # For all modules: hooks of their own would be seen by what checks for such.
        modules.register_module_forward_pre_hook(enter),
        modules.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with explaining(see, on_gpu):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _of_recattn(module: Twin) -> bool:
    """Whether it is a layer over histories, not what holds such."""
    return type(module).example is not Twin.example


def _device_of(model: Any, *values: Any) -> torch.device:
    """Where a model's parameters are, or the tensors that it is called with; else the CPU."""
    if isinstance(model, nn.Module):
        values = (*model.parameters(), *model.buffers(), *values)
    return next((value.device for value in values if isinstance(value, torch.Tensor)), torch.device("cpu"))
