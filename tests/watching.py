"""What a stretch of code does that its results do not tell: waiting for the device, and the memory it takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class NoSync(TorchDispatchMode):
    """Refuses what copies to the host, or whose shape depends on contents. It does not see into our operators."""

    REFUSED = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the device"
        return func(*args, **kwargs or {})


def largest_allocation(run: Callable[[], object]) -> int:
    """The bytes of the largest tensor that a call makes on the CPU, within operators or outside."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each profile is announced on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")
