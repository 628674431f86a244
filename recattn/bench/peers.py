"""Imports other libraries, without what some of them do on the side."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

INSTALL = 'pip install "recattn[peers]" and pip install --no-deps --requirement peers.txt bring it'

# What providers import, where it is not of their name.
MODULES = {"fbgemm": "fbgemm_gpu", "torch_easy_rec": "tzrec"}
PROVIDERS = ("fbgemm", "deepctr_torch", "fuxictr", "recbole", "torch_rechub", "torch_easy_rec")


def is_missing(provider: str) -> bool:
    """Whether a provider is of another library and that is not installed; nothing is imported to find out."""
    module = MODULES.get(provider, provider)
    return provider in PROVIDERS and module not in sys.modules and importlib.util.find_spec(module) is None


def import_peer(name: str) -> Any:
    """A module of another library.

    Raises:
        ModuleNotFoundError: where that, or something that it needs, is not installed.
    """
    if name in sys.modules:
        return sys.modules[name]
    top = name.partition(".")[0]
    anomaly = torch.is_anomaly_enabled()
    try:
        with _without_side_effects(top):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; {INSTALL}", name=error.name) from error
    finally:
        if top == "recbole":  # which turns it on for the whole process
            torch.autograd.set_detect_anomaly(anomaly)


@contextmanager
def _without_side_effects(top: str) -> Iterator[None]:
    if top == "deepctr_torch" and top not in sys.modules:
        # Its version check is a thread that asks the network.
        silent: Any = ModuleType("deepctr_torch.utils")
        silent.check_version = lambda _: None
        sys.modules[silent.__name__] = silent
        try:
            yield
        finally:
            del sys.modules[silent.__name__]
    elif top == "tzrec" and top not in sys.modules:
        # Its package imports the whole framework, which needs what is on no index: `pyfg`.
        spec = importlib.machinery.PathFinder.find_spec(top)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
        package = ModuleType(top)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[top] = package
        yield
    else:
        yield
