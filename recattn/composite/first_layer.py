"""The folded first layer over blocks of rows, and its gradients.

Runs of sequences of one length are multiplied with each sequence's own W_eff(q), `[D, H1]`. Others use the
form with two blocks, `key k + product (q*k)`, whose weights all sequences share.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from recattn.composite.blocks import Block, Workspace
from recattn.ops.fold import Folded


class FirstLayer:
    """`z1 = W_eff(q) k + c(q)`.

    Args:
        query: `[B, D]`, in the dtype to compute in.
        workspace: where blocks are computed; what a call leaves there, its backward uses.
    """

    def __init__(self, folded: Folded, query: Tensor, workspace: Workspace) -> None:
        self.query, self.bias, self.workspace = query, folded.bias, workspace
        self.key, self.product = folded.key.t().contiguous(), folded.product.t().contiguous()  # [D, H1]
        self._effective = self.key.new_empty(0)

    def __call__(self, block: Block, keys: Tensor) -> Tensor:
        """Rows of keys, `[n, D]`, to `z1 [n, H1]`."""
        rows, (dim, width) = keys.shape[0], self.key.shape
        z = self.workspace("hidden 0", rows, width)
        if block.sequence is None:
            effective = self.effective(block)
            torch.addcmul(self.key, self.product, self.query[block.owners].unsqueeze(2), out=effective)
            torch.baddbmm(block.take(self.bias), block.split(keys), effective, out=block.split(z))
            return z
        block.take(self.bias, out=z)
        z.addmm_(keys, self.key)  # first, as it hides best that keys come from memory
        query, products = (self.workspace(name, rows, dim) for name in ("query", "products"))
        block.take(self.query, out=query)
        return z.addmm_(torch.mul(query, keys, out=products), self.product)

    def effective(self, block: Block) -> Tensor:
        """Room for the W_eff of each sequence of a block, `[m, D, H1]`."""
        count = block.owners.stop - block.owners.start
        if self._effective.shape[0] < count:
            self._effective = self.key.new_empty(count, *self.key.shape)
        return self._effective[:count]


class FirstLayerGradients:
    """What `add` sums over the blocks.

    Attributes:
        query: `[B, D]`, but for its way through c(q).
        bias: of c(q), `[B, H1]`.
        folded: of the key and the product part, `[D, 2, H1]`.
    """

    def __init__(self, layer: FirstLayer) -> None:
        self.layer = layer
        self.query, self.bias = torch.zeros_like(layer.query), torch.zeros_like(layer.bias)
        dim, width = layer.key.shape
        self.folded = layer.key.new_zeros(dim, 2, width)

    @cached_property
    def _factors(self) -> Tensor:
        """Of k and of q*k in W_eff(q) k, `[D, 2, B]`."""
        query = self.layer.query.t()
        return torch.stack((torch.ones_like(query), query), 1)

    def add(self, block: Block, keys: Tensor, grad: Tensor, grad_keys: Tensor) -> None:
        """From `dL/dz1 [n, H1]`, after the layer's call for the same block; overwrites `grad_keys [n, D]`."""
        layer, owners = self.layer, block.owners
        self.bias[owners].add_(block.sum(grad))
        if block.sequence is None:
            grad, effective = block.split(grad), layer.effective(block)
            torch.bmm(grad, effective.mT, out=block.split(grad_keys))
            outer = torch.bmm(block.split(keys).mT, grad, out=effective)  # [m, D, H1]
            self.folded.baddbmm_(self._factors[:, :, owners], outer.transpose(0, 1))
            self.query[owners].add_(outer.mul_(layer.product).sum(2))
            return
        query, products = (layer.workspace(name, *keys.shape) for name in ("query", "products"))
        self.folded[:, 0].addmm_(keys.t(), grad)
        self.folded[:, 1].addmm_(products.t(), grad)
        through = torch.mm(grad, layer.product.t(), out=products)
        torch.mm(grad, layer.key.t(), out=grad_keys).addcmul_(through, query)
        self.query[owners].add_(block.sum(through.mul_(keys)))
