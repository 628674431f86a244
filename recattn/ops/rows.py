"""Gradients of a table whose rows are read by index."""

from __future__ import annotations

import torch
from torch import Tensor


def table_gradient(gradient: Tensor, rows: Tensor, end: Tensor, count: int, sparse: bool) -> Tensor:
    """The gradient of a table of `count` rows, `[count, D]`, from those of what was read at each position, `[T, D]`.

    Contributions to a row are added in a fixed order. `rows [T]` counts before position `end`; the gradient is zero
    from there on.
    """
    valid = torch.arange(rows.numel(), device=rows.device) < end
    rows = torch.where(valid, rows, 0).to(torch.int64)
    if sparse:
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0), gradient, (count, gradient.shape[1]), check_invariants=False
        )
    return torch.ops.aten.embedding_dense_backward(gradient, rows, count, -1, False)
