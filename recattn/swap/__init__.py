"""Puts fused layers into models built with other libraries.

A layer stays the object that it is, with its parameters, buffers, hooks and names; only its class changes,
to a subclass with another `forward`. Whatever refers to the layer or to what it holds is none the wiser:
optimizers, `state_dict`, wrappers, `deepcopy`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TypeVar

from torch import nn

from recattn.swap.coverage import Swap, Uncovered
from recattn.swap.report import Report, Row

__all__ = ["Report", "Row", "fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)

# Our module for a peer library, by the module of the peer that defines its layers. Ours is imported only once
# the peer's is, so that no peer is ever imported from here.
PEERS = {"deepctr_torch.layers.sequence": "recattn.swap.deepctr_torch"}


def fuse(model: nn.Module) -> Report:
    """Replaces the layers of a model that a fused operator computes exactly, in place.

    Goes by exact class, of the libraries that the process has loaded: DeepCTR-Torch's
    `AttentionSequencePoolingLayer`. Parameters are shared, the keys and shapes of `state_dict` stay, and the
    layer's hooks, `train`/`eval`, `to`, `deepcopy` and pickling work as before (a model pickled whole needs
    recattn to load). Outputs and gradients equal the library's up to rounding; there are no second
    derivatives, and NaN in the padding, which spoils the library's output, does nothing.

    Args:
        model: any module; it may itself be such a layer.

    Returns:
        What was replaced, and what was left and why; print it.

    Raises:
        TypeError: if `model` is not a module.
    """
    swaps = list(_swaps(model))
    rows = []
    for path, module in model.named_modules():
        for swap in swaps:
            if isinstance(module, swap.original):
                reason = _reason_to_leave(module, swap)
                if reason is None:
                    module.__class__ = swap.fused
                rows.append(Row(path, swap.original.__name__, reason is None, reason or ""))
    return Report(tuple(rows))


def unfuse(model: Model) -> Model:
    """Gives the layers that `fuse` replaced back their own class, in place.

    Returns:
        The model itself, so that `torch.save(unfuse(deepcopy(model)), path)` writes what loads without
        recattn.

    Raises:
        TypeError: if `model` is not a module.
    """
    originals = {swap.fused: swap.original for swap in _swaps(model)}
    for module in model.modules():
        if type(module) in originals:
            module.__class__ = originals[type(module)]
    return model


def _swaps(model: nn.Module) -> Iterator[Swap]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for peer, ours in PEERS.items():
        if sys.modules.get(peer) is not None:
            yield from import_module(ours).SWAPS


def _reason_to_leave(module: nn.Module, swap: Swap) -> str | None:
    if type(module) is swap.fused:
        return "fused already"
    if type(module) is not swap.original:
        return f"a subclass, {type(module).__name__}, which may compute something else"
    try:
        swap.check(module)
    except Uncovered as reason:
        return str(reason)
    return None
