"""Runs the launchers as a GPU would, on tensors that have no contents: what waits for the device cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recattn.ops import (
    activation_unit,
    activation_unit_statistics,
    attentional_gru,
    pairwise_pool,
    self_attention,
    target_attention,
)

OPERATORS = (
    activation_unit,
    activation_unit_statistics,
    attentional_gru,
    pairwise_pool,
    self_attention,
    target_attention,
)


class HostSync(AssertionError):
    """Something would wait for the device, which no CUDA graph can capture."""


class OnGPU(TorchDispatchMode):
    """Meta tensors stand for those of a GPU. Operators of ours run their own Python, every other one is refused if it
    reads contents, has a result whose shape depends on them, or makes a tensor on the host, which would be copied."""

    REFUSED = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.implementations = {
            op: run
            for module in OPERATORS
            for op, run in ((module.forward_op, module._forward), (module.backward_op, module._backward))
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.implementations:
            with self:  # what it calls is seen too
                return self.implementations[func](*args, on_gpu=True)
        name = func.overloadpacket.__name__
        if name in self.REFUSED:
            raise HostSync(f"{name} waits for the device")
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                raise HostSync(f"{name} makes a tensor on the host")
        return result


def on_meta(x: Any) -> Any:
    """A stand-in for a tensor of a GPU."""
    return x.to("meta") if isinstance(x, Tensor) else x
