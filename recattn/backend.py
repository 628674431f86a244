"""Which implementation an operator runs: asked for by name, or left to the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "triton", "torch")


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_requested = _checked(os.environ.get("RECATTN_BACKEND", "auto"), "RECATTN_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the operators called inside with one implementation.

    Args:
        name: `"triton"`, the Triton kernels; `"torch"`, the composite PyTorch implementation; `"auto"`
            (the default outside), kernels on a GPU wherever one covers the call, PyTorch otherwise.

    A backend asked for by name never falls back: a call that it cannot serve raises. The choice holds for
    the whole process, and for the backward pass of whatever ran inside. The environment variable
    `RECATTN_BACKEND` sets the initial choice.

    Raises:
        ValueError: for another name.
    """
    global _requested
    before, _requested = _requested, _checked(name, "backend")
    try:
        yield
    finally:
        _requested = before


def requested_backend() -> str:
    """The backend in force: `"auto"`, `"triton"` or `"torch"`."""
    return _requested
