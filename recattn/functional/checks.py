"""Checks that the operators share. Each says what was expected of which argument, and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Whether to read and check the contents of offsets, which synchronises with the device.
VALIDATE = os.environ.get("RECATTN_VALIDATE", "0") not in ("", "0")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def autocast(device: torch.device, *tensors: Any) -> tuple[Any, ...]:
    """Casts as PyTorch's own operators under autocast do: floating tensors but those of float64."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def expect_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a tensor of layout torch.strided, got {tensor.layout}")


def expect_sequence(name: str, items: Any, what: str) -> None:
    """Raises unless `items` is a list or the like."""
    if isinstance(items, str | Tensor) or not hasattr(items, "__len__"):
        raise TypeError(f"{name}: expected a sequence of {what}, got {type(items).__name__}")


def check_number(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number that the host knows."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_dropout(dropout: Any) -> None:
    """Raises unless `dropout` is a probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, float | int) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability below 1, got {dropout!r}")


def check_flags(**flags: Any) -> None:
    """Raises unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    like: Tensor,
    or_float32: bool = False,
    of: str = "keys",
) -> None:
    """Raises unless `tensor` has this shape, where a string names a size that is free, and the dtype and device
    of `like`, which are those of the argument called `of`. With `or_float32` it may be of float32 where `like` is
    narrower."""
    expect_tensor(name, tensor)
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=False)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if or_float32 and tensor.dtype == torch.float32 == torch.promote_types(like.dtype, torch.float32):
        pass
    elif tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, as the {of}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, as the {of}, got {tensor.device}")


def check_rows(rows: Any, like: Tensor, of: str) -> None:
    """Of the rows `[T]` of `like`, called `of`, that are read by index."""
    expect_tensor("rows", rows)
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows: expected int32 or int64, got {rows.dtype}")
    if rows.dim() != 1:
        raise ValueError(f"rows: expected shape [T], got {list(rows.shape)}")
    if rows.device != like.device:
        raise ValueError(f"rows: expected device {like.device}, as the {of}, got {rows.device}")


def validate_rows(rows: Tensor, count: int) -> None:
    """Checks that there are such, out of `count`, which waits for the device."""
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(f"rows: expected 0 to {count - 1}, got {int(rows.min())} to {int(rows.max())}")
