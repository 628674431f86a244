"""Kernels run in Triton's interpreter, and memory that nobody has written yet holds NaN."""

from __future__ import annotations

import os
import random

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports the kernels

from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from recattn.composite import activation_unit_few
from recattn.swap.coverage import SMALL

_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_to_nearest(self: Any, src: Any, dst_type: Any) -> Any:
    """The interpreter's conversion, but to bfloat16 it rounds to nearest even, as every GPU does."""
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, src, dst_type)
    bits = np.ascontiguousarray(src.data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(src.data), 0x7FC0, rounded)
    return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest

_patch_lang = interpreter._patch_lang
_patched: set[bool] = set()


class _Scope(interpreter._LangPatchScope):
    """What a launch has to undo."""

    def restore(self) -> None:
        super().restore()
        _patched.clear()


def _patch_lang_once(fn: Any) -> Any:
    """The interpreter changes triton.language for each call of a jit function, nested ones too, though what a launch
    has changed holds until it ends. Doing it once takes a quarter off the tests."""
    sees_core = any(value is tl.core for value in fn.__globals__.values())
    scope = _Scope()
    if sees_core not in _patched:
        _patched.add(sees_core)
        scope._changes = _patch_lang(fn)._changes
    return scope


interpreter._patch_lang = _patch_lang_once


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what `torch.empty` and its like return with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_batch_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets layers of other libraries that `recattn.fuse` replaced run fused, however small the batch."""
    monkeypatch.setattr("recattn.swap.coverage.SMALL", dict.fromkeys(SMALL, 0))


@pytest.fixture(params=["few rows", "many rows"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """activation_unit on the CPU as it goes with few rows, and as with many."""
    monkeypatch.setattr(activation_unit_few, "KEPT_BYTES", 1 << 30 if request.param == "few rows" else 0)


# How many random calls tests/test_fuzz.py makes. `make verify` takes the second, with a seed of its own.
hypothesis.settings.register_profile("ci", max_examples=100)
hypothesis.settings.register_profile("verify", max_examples=2500)
hypothesis.settings.register_profile("long", max_examples=50_000)
hypothesis.settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Chooses hypothesis's seed here, so that it can be told; workers of xdist take it over."""
    if config.option.hypothesis_seed is None:
        verify = config.option.hypothesis_profile in ("verify", "long")
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32) if verify else 0)


def pytest_report_header(config: pytest.Config) -> str:
    return f"hypothesis seed: {config.option.hypothesis_seed} (--hypothesis-seed)"


PRECISIONS = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}


@pytest.fixture(params=["fp32", "tf32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def precision(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A dtype, with PyTorch's products of float32 as it wants them. fp16 takes the way of bf16 almost everywhere."""
    dtype, products = PRECISIONS[request.param]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    yield dtype
    torch.set_float32_matmul_precision(before)
