"""Launch settings of self_attention, by kernel and precision."""

from __future__ import annotations

from typing import Any, NamedTuple

from .settings import NARROW, WIDEST, Kernel, precision

__all__ = ["SELF_ATTENTION", "WIDEST", "AttentionLaunch", "Kernel", "kind_of", "precision", "self_attention"]


class AttentionLaunch(NamedTuple):
    block: int  # rows of a program
    step: int  # columns of a tile without a mask
    edge: int  # and of one with it
    slab: int  # widest slab of queries, keys and values
    num_warps: int
    num_stages: int


# "plain" is without bias and dropout, whose tiles need registers of their own, "rich" with both; "broad" has heads
# wider than NARROW.
SELF_ATTENTION = {
    ("plain forward", "half"): AttentionLaunch(32, 64, 32, 64, 1, 2),
    ("plain forward", "tf32"): AttentionLaunch(32, 32, 16, 32, 2, 2),
    ("plain forward", "ieee"): AttentionLaunch(32, 32, 16, 32, 2, 1),
    ("forward", "half"): AttentionLaunch(32, 32, 16, 64, 1, 2),
    ("forward", "tf32"): AttentionLaunch(32, 32, 16, 32, 2, 2),
    ("forward", "ieee"): AttentionLaunch(32, 16, 16, 32, 2, 1),
    ("queries", "half"): AttentionLaunch(32, 16, 16, 64, 1, 2),
    ("queries", "tf32"): AttentionLaunch(32, 32, 16, 32, 2, 2),
    ("queries", "ieee"): AttentionLaunch(32, 16, 16, 32, 2, 1),
    ("keys", "half"): AttentionLaunch(32, 16, 16, 64, 1, 2),
    ("keys", "tf32"): AttentionLaunch(32, 16, 16, 32, 2, 2),
    ("keys", "ieee"): AttentionLaunch(32, 16, 16, 32, 2, 1),
    ("rich keys", "half"): AttentionLaunch(32, 16, 16, 64, 2, 2),
    ("rich keys", "tf32"): AttentionLaunch(32, 16, 16, 32, 2, 2),
    ("rich keys", "ieee"): AttentionLaunch(16, 16, 16, 32, 2, 1),
    ("broad forward", "half"): AttentionLaunch(32, 16, 16, 64, 1, 2),
    ("broad keys", "half"): AttentionLaunch(32, 16, 16, 64, 2, 2),
    ("broad keys", "tf32"): AttentionLaunch(16, 16, 16, 32, 2, 2),
    ("broad forward", "ieee"): AttentionLaunch(16, 16, 16, 32, 2, 1),
    ("broad queries", "ieee"): AttentionLaunch(16, 16, 16, 32, 2, 1),
    ("broad keys", "ieee"): AttentionLaunch(16, 16, 16, 32, 2, 1),
    ("table", "half"): AttentionLaunch(32, 16, 16, 64, 1, 1),
    ("table", "tf32"): AttentionLaunch(32, 16, 16, 32, 2, 1),
    ("table", "ieee"): AttentionLaunch(32, 16, 16, 32, 2, 1),
}


def self_attention(kernel: str, call: Any) -> AttentionLaunch:
    """Settings of `"forward"`, or of the kernel for the gradients of `"queries"`, `"keys"` or `"table"`."""
    kernel = {"plain": "plain forward", "rich": "rich keys", "broad": "broad " + kernel}.get(
        kind_of(kernel, call).name, kernel
    )
    return SELF_ATTENTION[kernel, precision(call.q.dtype)]


def kind_of(kernel: str, call: Any) -> Kernel:
    """What settings of a kernel are by, besides the precision."""
    if (
        max(call.dim, call.value_dim) > NARROW
        and ("broad " + kernel, precision(call.q.dtype)) in SELF_ATTENTION
    ):
        return Kernel("broad", f"heads wider than {NARROW}")
    if kernel == "forward" and call.table is None and not call.dropout:
        return Kernel("plain", "neither bias nor dropout")
    if kernel == "keys" and call.table is not None and call.dropout:
        return Kernel("rich", "bias and dropout")
    return Kernel("general", "any bias or dropout")
