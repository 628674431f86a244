"""How large the largest tensor is that anything makes: what a peak of memory cannot be told by is the allocator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recattn.ops import activation_unit, attentional_gru, self_attention, target_attention

OPERATORS = (activation_unit, attentional_gru, self_attention, target_attention)


class LargestTensor(TorchDispatchMode):
    """`elements` is the size of the largest storage that an operator of PyTorch returned and that was not given to it.

    Of our operators PyTorch shows a mode only the outside: `watching` puts one inside of them too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        def inside(choose: Any) -> Any:
            def watched(*arguments: Any) -> Any:
                with self:
                    return choose(*arguments)

            return watched

        patches = [mock.patch.object(module, "choose", inside(module.choose)) for module in OPERATORS]
        for patch in patches:
            patch.start()
        try:
            with self:
                yield
        finally:
            for patch in patches:
                patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and _address(x) not in given:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
