"""Launches in Triton's interpreter with guard zones around every tensor, and every access checked.

Each launch works on copies of its tensors' storages, far apart and surrounded by bytes that are NaN in any floating
dtype. A load, store or atomic that a mask lets through must hit an element of a tensor that the kernel was given: not
the guard zone, not what lies between the rows of a view, not another view of the same storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

GUARD = 1 << 13  # bytes on each side
CANARY = 0xFF


@dataclass
class Storage:
    """A copy of a storage between two guard zones."""

    original: torch.UntypedStorage
    bytes: Any = field(init=False)
    begin: int = field(init=False)  # its address
    touchable: Any = field(init=False)  # per byte, whether it belongs to an element of a tensor

    def __post_init__(self) -> None:
        size = self.original.nbytes()
        self.bytes = np.full(size + 2 * GUARD, CANARY, dtype=np.uint8)
        self.begin = self.bytes.ctypes.data
        self.bytes[GUARD : GUARD + size] = self.contents()
        self.touchable = np.zeros(size + 2 * GUARD, dtype=bool)

    def contents(self) -> Any:
        return torch.empty(0, dtype=torch.uint8).set_(self.original).numpy()

    def admit(self, tensor: Tensor) -> Tensor:
        """The tensor as a view of the copy."""
        size = tensor.element_size()
        offset = GUARD // size + tensor.storage_offset()
        strides = [stride * size for stride in tensor.stride()]
        if tensor.numel():
            elements = np.ndarray((*tensor.shape, size), bool, self.touchable, offset * size, (*strides, 1))
            elements[...] = True
        storage = torch.from_numpy(self.bytes).untyped_storage()
        return tensor.new_empty(0).set_(storage, offset, tensor.size(), tensor.stride())

    def give_back(self) -> None:
        self.contents()[...] = self.bytes[GUARD : len(self.bytes) - GUARD]

    def intact(self) -> bool:
        return bool((self.bytes[:GUARD] == CANARY).all() and (self.bytes[-GUARD:] == CANARY).all())


class Launch:
    """The memory that the kernel running now may touch."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.storages: dict[int, Storage] = {}

    def guarded(self, argument: Any) -> Any:
        """An argument of the kernel, its tensors moved between guard zones."""
        if isinstance(argument, tuple):
            return interpreter._tuple_create(argument, map(self.guarded, argument))
        if not isinstance(argument, Tensor):
            return argument
        storage = argument.untyped_storage()
        key = storage.data_ptr() if storage.nbytes() else -id(storage)
        if key not in self.storages:
            self.storages[key] = Storage(storage)
        return self.storages[key].admit(argument)

    def check(self, what: str, pointers: Any, mask: Any, size: int) -> None:
        addresses = np.broadcast_to(pointers, np.shape(mask))[np.asarray(mask, dtype=bool)].astype(np.int64)
        left = addresses
        for storage in self.storages.values():
            if not left.size:
                return
            place = left - storage.begin
            near = (place >= 0) & (place <= len(storage.bytes) - size)
            place = np.where(near, place, 0)
            left = left[~(near & storage.touchable[place] & storage.touchable[place + size - 1])]
        if left.size:
            message = f"{self.kernel}: {what} outside every tensor, {left.size} of {addresses.size} addresses"
            raise MemoryError(message)

    def finish(self) -> None:
        for storage in self.storages.values():
            assert storage.intact(), f"{self.kernel} wrote to a guard zone"
            storage.give_back()


class Checked:
    """Stands in for the interpreter's memory."""

    def __init__(self, memory: Any, guards: Guards) -> None:
        self.memory, self.guards = memory, guards

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.guards.check("a load", pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.guards.check("a store", pointers, mask, value.dtype.itemsize)
        return self.memory.store(pointers, value, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, semantics: Any) -> Any:
        self.guards.check("an atomic", pointers, mask, value.dtype.itemsize)
        return self.memory.atomic_rmw(operation, pointers, value, mask, semantics)

    def atomic_cas(self, pointers: Any, expected: Any, value: Any, semantics: Any) -> Any:
        self.guards.check("an atomic", pointers, np.ones(pointers.shape, dtype=bool), value.dtype.itemsize)
        return self.memory.atomic_cas(pointers, expected, value, semantics)


class Guards:
    """Counts what was checked, so that a test can tell that something was."""

    def __init__(self) -> None:
        self.launch: Launch | None = None
        self.kernels: set[str] = set()
        self.accesses = 0

    def check(self, *access: Any) -> None:
        assert self.launch is not None
        self.launch.check(*access)
        self.accesses += 1

    def enter(self, executor: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        self.launch = Launch(executor.fn.__name__)
        self.kernels.add(self.launch.kernel)
        given = [self.launch.guarded(argument) for argument in args]
        return given, {name: self.launch.guarded(argument) for name, argument in kwargs.items()}

    def leave(self, *_: Any) -> None:
        assert self.launch is not None
        self.launch.finish()
        self.launch = None


@contextmanager
def guarded_memory() -> Iterator[Guards]:
    """Guards every launch inside."""
    guards = Guards()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", Checked(interpreter._interpreter, guards))
        patch.setattr(
            interpreter.GridExecutor, "_init_args_hst", lambda executor, *args: guards.enter(executor, *args)
        )
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda executor, *args: guards.leave())
        yield guards
