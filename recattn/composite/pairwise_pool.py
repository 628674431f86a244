"""pairwise_pool in PyTorch: samples in blocks, each with its pairs by distance around a ring.

Of F fields on a ring, field j with field j + s, for s from 1 to (F-1)/2, makes every pair once, and if F is even,
s = F/2 makes the rest from half of the fields. So the products of a block are those of the fields with windows of the
fields written twice: no index, no gather, and gradients go back the same way. A block's products are gone with the
block; backward makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.composite.score_dropout import kept

# Bytes of a block's products, by device.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}


class Call(NamedTuple):
    fields: Tensor  # [B, F, K]
    weight: Tensor  # [A, K]
    bias: Tensor  # [A]
    projection: Tensor  # [A]
    seed: Tensor | None  # [1], of dropout
    dropout: float
    return_weights: bool

    @property
    def dtype(self) -> torch.dtype:
        """To compute in."""
        return torch.promote_types(self.fields.dtype, torch.float32)

    @property
    def field_count(self) -> int:
        return self.fields.shape[1]

    @property
    def pairs(self) -> int:
        return self.field_count * (self.field_count - 1) // 2

    def blocks(self) -> Iterator[slice]:
        width = max(self.fields.shape[2], self.weight.shape[0])
        room = BLOCK_BYTES.get(self.fields.device.type, BLOCK_BYTES["cuda"])
        size = max(room // (self.dtype.itemsize * self.pairs * width), 1)
        for begin in range(0, self.fields.shape[0], size):
            yield slice(begin, min(begin + size, self.fields.shape[0]))


class Ring:
    """The pairs of a block of n samples.

    Attributes:
        products: `[P, n, K]`, by distance.
    """

    def __init__(self, fields: Tensor) -> None:
        own = fields.transpose(0, 1)  # [F, n, K]
        self.count = own.shape[0]
        self.half = self.count // 2 if self.count % 2 == 0 else 0
        self.own = own.contiguous()
        self.twice = torch.cat((self.own, self.own))
        self.products = own.new_empty(self.count * (self.count - 1) // 2, *own.shape[1:])
        for place, first, second in self.distances():
            torch.mul(self.own[first], self.twice[second], out=self.products[place])

    def distances(self) -> Iterator[tuple[slice, slice, slice]]:
        """Of each distance: where its pairs lie, their first fields, and their second ones, written twice."""
        place = 0
        for distance in range(1, self.count // 2 + 1):
            fields = self.half if distance == self.half else self.count
            yield slice(place, place + fields), slice(0, fields), slice(distance, distance + fields)
            place += fields

    def gradient(self, products: Tensor) -> Tensor:
        """`[F, n, K]`, that of the fields from that of the products."""
        grad = torch.zeros_like(self.twice)
        for place, first, second in self.distances():
            grad[first].addcmul_(products[place], self.twice[second])
            grad[second].addcmul_(products[place], self.own[first])
        return grad[: self.count].add_(grad[self.count :])


def pair_places(count: int, device: torch.device) -> Tensor:
    """`[P]`: of each pair of a ring, its place among the pairs i < j in the order of (i, j)."""
    place = torch.arange(count * (count - 1) // 2, device=device)
    one = place % count
    other = (one + place // count + 1) % count
    i, j = torch.minimum(one, other), torch.maximum(one, other)
    return i * (2 * count - i - 1) // 2 + j - i - 1


class _Block:
    """What forward and backward both compute of a block: `hidden [P·n, A]` after its ReLU and `scores [P, n]`."""

    def __init__(self, call: Call, rows: slice) -> None:
        self.ring = Ring(call.fields[rows].to(call.dtype))
        weight, bias, projection = (x.to(call.dtype) for x in (call.weight, call.bias, call.projection))
        products = self.ring.products
        self.flat = products.view(-1, products.shape[2])
        self.hidden = torch.addmm(bias, self.flat, weight.t()).relu_()
        self.scores = torch.mv(self.hidden, projection).view(products.shape[:2])


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, K]`, of the softmax maximum and sum `[B, 2]`, the weights `[B, P]` if wanted; all in the dtype to
    compute in."""
    batch, _, width = call.fields.shape
    out = call.fields.new_zeros(batch, width, dtype=call.dtype)
    peak_mass = out.new_zeros(batch, 2)
    weights = out.new_empty(batch, call.pairs if call.return_weights else 0)
    if not call.pairs:
        return out, peak_mass, weights
    places = _places(call)
    for rows in call.blocks():
        block = _Block(call, rows)
        torch.amax(block.scores, 0, out=peak_mass[rows, 0])
        attention = block.scores.sub_(peak_mass[rows, 0]).exp_()
        torch.sum(attention, 0, out=peak_mass[rows, 1])
        attention.div_(peak_mass[rows, 1])
        keep = _keep(call, rows, places)
        if keep is not None:
            attention.mul_(keep)
        torch.sum(block.ring.products.mul_(attention.unsqueeze(2)), 0, out=out[rows])
        if call.return_weights:
            weights[rows] = weights.new_empty(attention.t().shape).index_copy_(1, places, attention.t())
    return out, peak_mass, weights


def backward(
    call: Call, grad_out: Tensor, grad_weights: Tensor | None, peak_mass: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of fields, weight, bias and projection."""
    fields = torch.zeros_like(call.fields, memory_format=torch.contiguous_format)
    weight, bias, projection = (
        torch.zeros_like(x, dtype=call.dtype) for x in (call.weight, call.bias, call.projection)
    )
    if not call.pairs:
        return fields, weight, bias, projection
    places = _places(call)
    back = call.projection.to(call.dtype)[:, None] * call.weight.to(call.dtype)
    for rows in call.blocks():
        block = _Block(call, rows)
        upstream = grad_out[rows].to(call.dtype)
        attention = block.scores.sub_(peak_mass[rows, 0]).exp_().div_(peak_mass[rows, 1])
        grad = torch.bmm(block.ring.products.transpose(0, 1), upstream.unsqueeze(2)).squeeze(2).t()
        if grad_weights is not None:
            grad = grad + grad_weights[rows].to(call.dtype).index_select(1, places).t()
        keep = _keep(call, rows, places)
        pooled = attention
        if keep is not None:
            grad, pooled = grad * keep, attention * keep
        # What dL/da is compared with is a sum of the same numbers: of `out`, it would be off for all pairs alike.
        delta = torch.linalg.vecdot(attention, grad, dim=0)
        grad = (grad - delta).mul_(attention).reshape(-1)  # dL/ds
        projection += torch.mv(block.hidden.t(), grad)
        through = block.hidden.sign_().mul_(grad.unsqueeze(1))  # dL/dz over the projection
        bias += through.sum(0)
        weight += torch.mm(through.t(), block.flat)
        products = torch.mm(through, back).view_as(block.ring.products)
        products.addcmul_(pooled.unsqueeze(2), upstream)
        fields[rows] = block.ring.gradient(products).transpose(0, 1)
    bias *= call.projection
    weight *= call.projection[:, None]
    return fields, weight, bias, projection


def weights_of(call: Call, scores: Tensor, peak_mass: Tensor) -> Tensor:
    """The weights from all scores `[B, P]`, in base 2 as their maximum."""
    weights = torch.exp2(scores - peak_mass[:, :1]).div_(peak_mass[:, 1:])
    if call.seed is None:
        return weights
    row, column = (torch.arange(n, device=weights.device) for n in weights.shape)
    return weights * kept(call.seed, row[:, None], column, call.dropout) / (1 - call.dropout)


def _places(call: Call) -> Tensor:
    return pair_places(call.field_count, call.fields.device)


def _keep(call: Call, rows: slice, places: Tensor) -> Tensor | None:
    """`[P, n]`: 0 where a weight is dropped, what the others grow by elsewhere; None without dropout."""
    if call.seed is None:
        return None
    row = torch.arange(rows.start, rows.stop, device=places.device)
    return kept(call.seed, row, places[:, None], call.dropout).to(call.dtype).div_(1 - call.dropout)
