"""attentional_gru in PyTorch: sequences by descending length, a step for all that are still running.

Step t takes the first n_t of the sorted sequences, so that nothing is padded. Steps go in blocks whose rows stay in
cache: projections of the inputs, the gates that backward computes again and all its sums over rows are products
of a whole block, and only what depends on the step before is left to the loop over steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Rows of a block, by device, as far as a step does not have more.
BLOCK_ROWS = {"cpu": 2048, "cuda": 1 << 16}


class Recurrence(NamedTuple):
    """One call."""

    inputs: Tensor  # [R, I]
    offsets: Tensor  # [B + 1]
    scores: Tensor | None  # [T], or [R]; with "gru" none
    weight_ih: Tensor  # [3H, I]
    weight_hh: Tensor  # [3H, H]
    bias_ih: Tensor  # [3H]
    bias_hh: Tensor  # [3H]
    initial: Tensor | None  # [B, H], zero if None
    rows: Tensor | None  # [T], of each position its row of the inputs, where it is not the same
    unique_rows: bool  # whether gradients go to these rows, which are all different, else to the positions
    row_scores: bool  # whether the scores are in these rows too
    kind: str
    update: str
    reset_after: bool

    @property
    def size(self) -> int:
        return self.weight_hh.shape[1]

    @property
    def positions(self) -> int:
        """T."""
        return self.inputs.shape[0] if self.rows is None else self.rows.numel()

    @property
    def batch(self) -> int:
        return self.offsets.numel() - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.promote_types(self.inputs.dtype, torch.float32)


@dataclass(frozen=True)
class Block:
    """Some steps: `rows` of the inputs, a step's one after the other, by descending length of their sequences.

    `before` has the rows of the states that they start from, -1 for a first one. Step i of the block are the rows from
    `bounds[i]` to `bounds[i + 1]`, of the first sequences in the order.
    """

    rows: Tensor
    before: Tensor
    bounds: list[int]

    @cached_property
    def counts(self) -> list[int]:
        """The rows of each step."""
        return [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]

    def steps(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Of tensors `[rows, ...]` the rows of each step."""
        return list(zip(*(x.split(self.counts) for x in tensors), strict=True))


@dataclass(frozen=True)
class Schedule:
    """The sequences `order [B]`, longest first, and the blocks of steps."""

    order: Tensor
    blocks: list[Block]

    @classmethod
    def of(cls, offsets: Tensor) -> Schedule:
        host = offsets.to("cpu", torch.int64).numpy()
        lengths = np.diff(host)
        order = np.argsort(-lengths, kind="stable")
        first = host[:-1][order]
        longest = int(lengths.max(initial=0))
        # How many sequences have a step t.
        running = np.searchsorted(-lengths[order], -np.arange(longest), side="left")
        ends = np.cumsum(running)
        size = BLOCK_ROWS.get(offsets.device.type, BLOCK_ROWS["cuda"])
        blocks, step = [], 0
        while step < longest:
            done = ends[step] - running[step]
            stop = max(int(np.searchsorted(ends, done + size, side="right")), step + 1)
            counts = running[step:stop]
            bounds = np.concatenate(([0], np.cumsum(counts)))
            t = np.repeat(np.arange(step, stop), counts)
            rank = np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)
            rows = torch.from_numpy(first[rank] + t)
            before = torch.where(torch.from_numpy(t) > 0, rows - 1, -1)
            blocks.append(Block(rows.to(offsets.device), before.to(offsets.device), bounds.tolist()))
            step = stop
        return cls(torch.from_numpy(order).to(offsets.device), blocks)


class Layer:
    """The parameters in the dtype to compute in, transposed as products of rows take them.

    Pre-activations of a row are those of the gates, r and z or only r; what the reset gate scales, if it scales a
    product; and the candidate's.
    """

    def __init__(self, call: Recurrence) -> None:
        weight_ih, weight_hh, bias_ih, bias_hh = (
            x.to(call.dtype) for x in (call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh)
        )
        size = call.size
        self.call = call
        self.gates = size if call.kind == "agru" else 2 * size  # columns; agru reads no z
        self.hidden = 2 * size + self.gates if call.reset_after else self.gates + size
        rows = [slice(0, self.gates), slice(2 * size, 3 * size)]
        zero = weight_ih.new_zeros(size if call.reset_after else 0, weight_ih.shape[1])
        gate, candidate = (weight_ih[r] for r in rows)
        self.weight_ih = torch.cat([gate, zero, candidate]).t()
        self.weight_gates, self.weight_n = (weight_hh[r].t() for r in rows)
        self.weight_hh = torch.cat([weight_hh[r] for r in rows]).t()
        gate, inner, outer = (bias_ih + bias_hh)[rows[0]], bias_hh[rows[1]], bias_ih[rows[1]]
        self.bias = torch.cat([gate, inner, outer] if call.reset_after else [gate, inner + outer])

    def inputs(self, block: Block) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the products read, what came, and the attention: `[rows, I]` twice and `[rows, 1]`."""
        call, at = self.call, self.sources(block)
        x = call.inputs.index_select(0, at).to(call.dtype)
        if call.scores is None:
            return x, x, None
        a = call.scores.index_select(0, at if call.row_scores else block.rows).to(call.dtype).unsqueeze(1)
        return a * x if call.kind == "aigru" else x, x, a

    def sources(self, block: Block) -> Tensor:
        """The rows of the inputs."""
        rows = self.call.rows
        return block.rows if rows is None else rows.index_select(0, block.rows).to(torch.int64)

    def project(self, x: Tensor) -> Tensor:
        """The inputs' part of the pre-activations."""
        return torch.addmm(self.bias, x, self.weight_ih)

    def split(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pre-activations of what a product with the state completes, of the gates, and of the candidate."""
        products = self.gates + self.call.size if self.call.reset_after else self.gates
        return pre[:, :products], pre[:, : self.gates], pre[:, -self.call.size :]

    def complete(
        self, products: Tensor, gates: Tensor, candidate: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds the state's part to pre-activations in place: the gates r and z, where there is no z r again, what the
        reset gate scales, and the candidate."""
        size = self.call.size
        if self.call.reset_after:
            products.addmm_(h, self.weight_hh)
            hidden = products[:, self.gates :]
        else:
            products.addmm_(h, self.weight_gates)
            hidden = h
        gates.sigmoid_()
        r, z = gates[:, :size], gates[:, -size:]
        if self.call.reset_after:
            candidate.addcmul_(r, hidden).tanh_()
        else:
            candidate.addmm_(r * h, self.weight_n).tanh_()
        return r, z, hidden, candidate

    def update(self, z: Tensor, a: Any) -> Tensor:
        """How far the state moves to the candidate, from the keep gate and the attention."""
        match self.call.kind, self.call.update:
            case "agru", _:
                return a
            case "augru", "paper":
                return torch.addcmul(a, a, z, value=-1)
            case "augru", "official":
                return torch.addcmul(z.new_ones(()), a - 1, z)
        return 1 - z

    def slopes(self, z: Tensor, n: Tensor, move: Tensor, a: Any, out: Tensor) -> tuple[Tensor, Tensor]:
        """Of a step's gradient, what reaches the candidate's pre-activation and what the state before keeps. What
        reaches the keep gate's goes to `out`."""
        u = self.update(z, a)
        through = torch.addcmul(u, u * n, n, value=-1)
        match self.call.kind, self.call.update:
            case "agru", _:
                out.zero_()
                return through, (1 - u).expand_as(n)
            case "augru", "paper":
                by_z = -a
            case "augru", "official":
                by_z = a - 1
            case _:
                by_z = -1
        torch.addcmul(z, z, z, value=-1, out=out).mul_(move).mul_(by_z)
        return through, 1 - u

    def score_gradient(self, z: Tensor, move: Tensor, dh: Tensor) -> Tensor:
        """Of what attention does to the update."""
        match self.call.kind, self.call.update:
            case "augru", "paper":
                move = torch.addcmul(move, move, z, value=-1)
            case "augru", "official":
                move = move * z
        return torch.linalg.vecdot(dh, move)


def forward(call: Recurrence) -> tuple[Tensor, Tensor]:
    """`states [T, H]` and `last [B, H]`, in the dtype of the inputs."""
    layer, schedule = Layer(call), Schedule.of(call.offsets)
    states = call.inputs.new_zeros(call.positions, call.size)
    h = call.inputs.new_zeros(call.batch, call.size) if call.initial is None else call.initial
    last = h.clone()
    h = h.index_select(0, schedule.order).to(call.dtype)
    for block in schedule.blocks:
        x, _, attention = layer.inputs(block)
        after = x.new_empty(len(block.rows), call.size)
        a = after if attention is None else attention
        for products, gates, candidate, a_step, out in block.steps(*layer.split(layer.project(x)), a, after):
            h = h[: len(out)]
            _, z, _, n = layer.complete(products, gates, candidate, h)
            if call.kind in ("gru", "aigru"):
                h = torch.lerp(n, h, z, out=out)
            else:
                h = torch.lerp(h, n, layer.update(z, a_step), out=out)
        states.index_copy_(0, block.rows, after.to(states.dtype))
    if schedule.blocks:
        ended = states.index_select(0, (call.offsets[1:] - 1).clamp_min(0))
        last = torch.where(call.offsets.diff().unsqueeze(1) > 0, ended, last)
    return states, last


def backward(
    call: Recurrence, states: Tensor, grad_states: Tensor | None, grad_last: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the inputs, scores, weights, biases and the initial state, in the dtype of the arithmetic. Those of
    inputs read by index, and scores beside them, are of these rows if they are unique, else of positions.

    The gates depend on the states alone, so the gradient that a step passes on is linear in the one it gets, with
    coefficients that a block computes for all its steps at once.
    """
    layer, schedule, size = Layer(call), Schedule.of(call.offsets), call.size
    like = call.inputs.new_empty(0, dtype=call.dtype)
    grad_inputs = like.new_zeros(
        call.inputs.shape[0] if call.unique_rows else call.positions, call.inputs.shape[1]
    )
    by_row = call.unique_rows and call.row_scores
    grad_scores = None
    if call.scores is not None:
        grad_scores = like.new_zeros(call.scores.shape[0] if by_row else call.positions)
    grad_ih, grad_hh = like.new_zeros(3 * size, call.inputs.shape[1]), like.new_zeros(3 * size, size)
    bias_ih, bias_hh = like.new_zeros(3 * size), like.new_zeros(3 * size)
    carry = like.new_zeros(call.batch, size)
    if grad_last is not None:
        carry.copy_(grad_last.index_select(0, schedule.order))
    weight_ih, weight_hh = call.weight_ih.to(call.dtype), call.weight_hh.to(call.dtype)
    weight_gates, weight_n = weight_hh[: 2 * size], weight_hh[2 * size :]
    for block in reversed(schedule.blocks):
        x, raw, a = layer.inputs(block)
        h = _states_before(call, states, schedule, block)
        r, z, hidden, n = layer.complete(*layer.split(layer.project(x)), h)
        move = n - h
        # Of a step's gradient dh, what reaches the pre-activations of r, z and n, and what h without them.
        factors = x.new_empty(len(x), 3, size)
        through, keep = layer.slopes(z, n, move, a, factors[:, 1])
        torch.mul(torch.addcmul(r, r, r, value=-1), hidden, out=factors[:, 0])
        if call.reset_after:
            factors[:, 0].mul_(through)
            torch.mul(through, r, out=factors[:, 2])
        else:
            factors[:, 2] = through
        dh = x.new_zeros(len(x), size)
        if grad_states is not None:
            torch.index_select(grad_states.to(call.dtype), 0, block.rows, out=dh)
        grads = torch.empty_like(factors)
        flat = grads.view(-1, 3 * size)
        for d, factor, grad, product, keep_step, r_step in reversed(
            block.steps(dh, factors, grads, flat, keep, r)
        ):
            passed = carry[: len(d)]
            d += passed
            if call.reset_after:
                torch.mul(factor, d.unsqueeze(1), out=grad)
                torch.mul(d, keep_step, out=passed).addmm_(product, weight_hh)
            else:
                torch.mul(factor[:, 1:], d.unsqueeze(1), out=grad[:, 1:])
                reset = torch.mm(grad[:, 2], weight_n)
                torch.mul(reset, factor[:, 0], out=grad[:, 0])
                torch.mul(d, keep_step, out=passed).addcmul_(reset, r_step)
                passed.addmm_(product[:, : 2 * size], weight_gates)
        if call.reset_after:
            grad_hh.addmm_(flat.t(), h)
            bias_hh += flat.sum(0)
            torch.mul(dh, through, out=grads[:, 2])
        else:
            grad_hh[: 2 * size].addmm_(flat[:, : 2 * size].t(), h)
            grad_hh[2 * size :].addmm_(grads[:, 2].t(), r * h)
        grad_ih.addmm_(flat.t(), x)
        bias_ih += flat.sum(0)
        grad_x = flat @ weight_ih
        to = layer.sources(block) if call.unique_rows else block.rows
        if grad_scores is not None:
            if call.kind == "aigru":
                grad_a = torch.linalg.vecdot(grad_x, raw)
                grad_x *= a  # type: ignore[arg-type]
            else:
                grad_a = layer.score_gradient(z, move, dh)
            grad_scores.index_copy_(0, to if by_row else block.rows, grad_a)
        grad_inputs.index_copy_(0, to, grad_x)
    if not call.reset_after:
        bias_hh = bias_ih.clone()
    initial = None
    if call.initial is not None:
        initial = torch.empty_like(carry)
        initial[schedule.order] = carry
    return grad_inputs, grad_scores, grad_ih, grad_hh, bias_ih, bias_hh, initial


def _states_before(call: Recurrence, states: Tensor, schedule: Schedule, block: Block) -> Tensor:
    """The states that the rows of a block start from, `[rows, H]`."""
    first = block.bounds[1] if block.before.numel() else 0
    h = states.index_select(0, block.before.clamp_min(0)).to(call.dtype)
    if schedule.blocks[0] is block:  # whose first step is the first of all
        h[:first] = 0 if call.initial is None else call.initial[schedule.order[:first]].to(call.dtype)
    return h
