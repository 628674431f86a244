"""Puts fused layers into models built with other libraries.

A layer stays the object that it is, with its parameters, buffers, hooks and names; only its class changes,
to a subclass with another `forward`. Whatever refers to the layer or to what it holds is none the wiser:
optimizers, `state_dict`, wrappers, `deepcopy`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TypeVar

from torch import nn

from recattn.backend import BACKENDS
from recattn.functional.checks import check_choice
from recattn.swap.coverage import OPTIONS, SMALL, Options, Swap, Uncovered, unit_of
from recattn.swap.report import Report, Row

__all__ = ["SEMANTICS", "Report", "Row", "fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)

SEMANTICS = ("exact", "valid")
# Our module for a peer library, by the module of the peer that defines its layers. Ours is imported only once
# the peer's is, so that no peer is ever imported from here: hence one for each that can be loaded alone.
PEERS = {
    "deepctr_torch.layers.sequence": "recattn.swap.deepctr_torch",
    "deepctr_torch.models.dien": "recattn.swap.deepctr_torch_dien",
    "deepctr_torch.layers.interaction": "recattn.swap.deepctr_torch_afm",
    "fuxictr.pytorch.layers.attentions.target_attention": "recattn.swap.fuxictr",
    "model_zoo.LongCTR.DIEN.DIEN": "recattn.swap.fuxictr_dien",
    "recbole.model.layers": "recattn.swap.recbole",
    "recbole.model.sequential_recommender.dien": "recattn.swap.recbole_dien",
    "recbole.model.context_aware_recommender.afm": "recattn.swap.recbole_afm",
    "torch_rechub.models.ranking.din": "recattn.swap.torch_rechub",
    "torch_rechub.models.ranking.dien": "recattn.swap.torch_rechub_dien",
    "tzrec.modules.sequence": "recattn.swap.torch_easy_rec",
}


def fuse(model: nn.Module, *, backend: str = "auto", semantics: str = "exact") -> Report:
    """Replaces the layers of a model that a fused operator computes, in place.

    Of DeepCTR-Torch, FuxiCTR, RecBole, torch-rechub and TorchEasyRec. Parameters are shared, the keys and shapes of
    `state_dict` stay, and the layer's hooks, `train`/`eval`, `to`, `deepcopy` and pickling work as before (a model
    pickled whole needs recattn to load). Fused layers have no second derivatives, and NaN in the padding, which spoils
    the output of most libraries, does nothing to theirs.

    Export and tracing (torch.fx, TorchScript, `torch.export`, ONNX) see the library's own layers. Small batches on a
    CPU run these too, which takes less time; but not under other than exact semantics, nor where a backend is asked for
    by name. The report says how small.

    Args:
        model: any module; it may itself be such a layer.
        backend: what the layers run with, see `recattn.backend`; `"auto"` leaves that to the context of each call.
        semantics: `"exact"`: outputs and gradients equal the library's up to rounding, its value for an empty history
            included; statistics of batch norm and Dice in training go over the padding as they do there.
            `"valid"`: attention and statistics over the positions that count and no others, 0 for an empty history.

    Returns:
        What was replaced and in what it differs, and what was left and why; print it. A layer that is fused already
        is given the new options.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: for another backend or semantics.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("semantics", semantics, SEMANTICS)
    options = Options(backend, semantics)
    swaps = list(_swaps(model))
    rows, notes = [], {}
    for path, module in model.named_modules():
        for swap in swaps:
            if isinstance(module, swap.original):
                rows.append(Row(path, swap.original.__name__, *_swapped(module, swap, options)))
                if rows[-1].swapped and swap.operator and options == Options():
                    notes[swap.original.__name__] = swap.operator
    return Report(tuple(rows), tuple(itertools.starmap(_note, notes.items())))


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
            vars(module).pop(OPTIONS, None)
    return model


def _swaps(model: nn.Module) -> Iterator[Swap]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for peer, ours in PEERS.items():
        if sys.modules.get(peer) is not None:
            yield from import_module(ours).SWAPS


def _note(layer: str, operator: str) -> str:
    """What the report says of the small batches of a layer."""
    training = SMALL.get(f"{operator}_statistics")
    few = f"{SMALL[operator]} {unit_of(operator)}"
    more = f" ({training} in training with batch norm or Dice)" if training else ""
    return f"{layer}: batches of fewer than {few}{more} on a CPU run the library's own code"


def _swapped(module: nn.Module, swap: Swap, options: Options) -> tuple[bool, str]:
    """Whether a layer is fused now, and what to say about it."""
    if type(module) not in (swap.original, swap.fused):
        return False, f"a subclass, {type(module).__name__}, which may compute something else"
    try:
        remarks = swap.check(module, options)
    except Uncovered as reason:
        module.__class__ = swap.original
        return False, str(reason)
    module.__class__ = swap.fused
    vars(module)[OPTIONS] = options
    return True, "; ".join(remarks)
