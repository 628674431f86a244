"""Dot-product attention of targets in other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from recattn.bench.peers import import_peer
from recattn.bench.task import Prepared

if TYPE_CHECKING:
    from recattn.bench.tasks.target_attention import Inputs


def fuxictr(inputs: Inputs) -> Prepared:
    """FuxiCTR's `ScaledDotProductAttention`, which its `MultiHeadTargetAttention` has inside."""
    layer = import_peer("fuxictr.pytorch.layers.attentions.dot_product_attention").ScaledDotProductAttention()
    leaves, heads, count = inputs.padded(), inputs.case.heads, inputs.case.candidates
    mask = inputs.mask[:, None, None].expand(-1, heads, count, -1)

    def forward() -> Tensor:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in leaves)
        return layer(q, k, v, scale=inputs.case.dim**0.5, mask=mask)[0].transpose(1, 2).flatten(2)

    return inputs.of_padded(forward, leaves)


LAYERS: dict[str, Callable[[Inputs], Prepared]] = {"fuxictr": fuxictr}
