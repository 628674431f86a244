"""attentional_gru in PyTorch: sequences by descending length, a step for all that are still running.

Step t takes the first n_t of the sorted sequences, so that nothing is padded. Steps go in blocks whose rows stay in
cache: projections of the inputs, the gates that backward computes again and all its sums over rows are products
of a whole block, and only what depends on the step before is left to the loop over steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Rows of a block, by device, as far as a step does not have more.
BLOCK_ROWS = {"cpu": 2048, "cuda": 1 << 16}


class Recurrence(NamedTuple):
    """One call."""

    inputs: Tensor  # [T, I]
    offsets: Tensor  # [B + 1]
    scores: Tensor | None  # [T], with "gru" none
    weight_ih: Tensor  # [3H, I]
    weight_hh: Tensor  # [3H, H]
    bias_ih: Tensor  # [3H]
    bias_hh: Tensor  # [3H]
    initial: Tensor | None  # [B, H], zero if None
    kind: str
    update: str
    reset_after: bool

    @property
    def size(self) -> int:
        return self.weight_hh.shape[1]

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

    def steps(self) -> Iterator[slice]:
        return (slice(begin, end) for begin, end in zip(self.bounds, self.bounds[1:], strict=False))


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


@dataclass(frozen=True)
class Layer:
    """The parameters in the dtype to compute in, transposed as products of rows take them."""

    call: Recurrence
    weight_ih: Tensor  # [I, 3H]
    weight_hh: Tensor  # [H, 3H]
    bias_ih: Tensor  # [3H], with all of bias_hh but what the reset gate scales
    bias_n: Tensor | None  # [H], what the reset gate scales

    @classmethod
    def of(cls, call: Recurrence) -> Layer:
        weight_ih, weight_hh, bias_ih, bias_hh = (
            x.to(call.dtype) for x in (call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh)
        )
        bias_n = None
        if call.reset_after:
            bias_n = bias_hh[2 * call.size :]
            bias_hh = torch.cat([bias_hh[: 2 * call.size], torch.zeros_like(bias_n)])
        return cls(call, weight_ih.t(), weight_hh.t(), bias_ih + bias_hh, bias_n)

    def inputs(self, block: Block) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the products read, what came, and the attention: `[rows, I]` twice and `[rows, 1]`."""
        x = self.call.inputs.index_select(0, block.rows).to(self.call.dtype)
        if self.call.scores is None:
            return x, x, None
        a = self.call.scores.index_select(0, block.rows).to(self.call.dtype).unsqueeze(1)
        return a * x if self.call.kind == "aigru" else x, x, a

    def candidate(self, h: Tensor, r: Tensor, out: Tensor | None = None) -> Tensor:
        """What the states and the reset gate add to the candidate's pre-activation."""
        weight = self.weight_hh[:, 2 * self.call.size :]
        if self.bias_n is None:
            return torch.mm(r * h, weight, out=out)
        return torch.addmm(self.bias_n, h, weight, out=out)

    def update(self, z: Tensor, a: Tensor | None) -> Tensor:
        """How far the state moves to the candidate, from the keep gate and the attention."""
        match self.call.kind, self.call.update:
            case "agru", _:
                return a  # type: ignore[return-value]
            case "augru", "paper":
                return torch.addcmul(a, a, z, value=-1)  # type: ignore[arg-type]
            case "augru", "official":
                return torch.add((a - 1) * z, 1)  # type: ignore[operator]
        return 1 - z

    def update_slopes(self, z: Tensor, a: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """The derivatives of the update by the keep gate and by the attention."""
        match self.call.kind, self.call.update:
            case "agru", _:
                return 0.0, 1.0
            case "augru", "paper":
                return -a, 1 - z  # type: ignore[operator]
            case "augru", "official":
                return a - 1, z  # type: ignore[operator]
        return -1.0, 0.0


def forward(call: Recurrence) -> tuple[Tensor, Tensor]:
    """`states [T, H]` and `last [B, H]`, in the dtype of the inputs."""
    layer, schedule, size = Layer.of(call), Schedule.of(call.offsets), call.size
    states = call.inputs.new_zeros(call.inputs.shape[0], size)
    h = call.inputs.new_zeros(call.batch, size, dtype=call.dtype)
    if call.initial is not None:
        h.copy_(call.initial.index_select(0, schedule.order))
    last = h.clone()
    gates = 1 if call.kind == "agru" else 2  # which reads no z
    weight_gates = layer.weight_hh[:, : gates * size].contiguous()
    for block in schedule.blocks:
        x, _, a = layer.inputs(block)
        projected = torch.addmm(layer.bias_ih, x, layer.weight_ih)
        after = torch.empty_like(projected[:, :size])
        for step in block.steps():
            count = step.stop - step.start
            h = h[:count]
            gate = torch.addmm(projected[step, : gates * size], h, weight_gates).sigmoid_()
            r, z = gate[:, :size], gate[:, size:]
            n = layer.candidate(h, r)
            if call.reset_after:
                n.mul_(r)
            n.add_(projected[step, 2 * size :]).tanh_()
            attention = None if a is None else a[step]
            if call.kind in ("gru", "aigru"):
                h = torch.lerp(n, h, z, out=after[step])
            else:
                h = torch.lerp(h, n, layer.update(z, attention), out=after[step])
            last[:count] = h
        states.index_copy_(0, block.rows, after.to(states.dtype))
    result = torch.empty_like(last, dtype=states.dtype)
    result[schedule.order] = last.to(states.dtype)
    return states, result


def backward(
    call: Recurrence, states: Tensor, grad_states: Tensor | None, grad_last: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the inputs, scores, weights, biases and the initial state, in the dtype of the arithmetic.

    The gates depend on the states alone, so the gradient that a step passes on is linear in the one it gets, with
    coefficients that a block computes for all its steps at once.
    """
    layer, schedule, size = Layer.of(call), Schedule.of(call.offsets), call.size
    like = call.inputs.new_empty(0, dtype=call.dtype)
    grad_inputs = like.new_zeros(call.inputs.shape)
    grad_scores = None if call.scores is None else like.new_zeros(call.scores.shape)
    grad_ih, grad_hh = like.new_zeros(3 * size, call.inputs.shape[1]), like.new_zeros(3 * size, size)
    bias_ih, bias_hh = like.new_zeros(3 * size), like.new_zeros(3 * size)
    carry = like.new_zeros(call.batch, size)
    if grad_last is not None:
        carry.copy_(grad_last.index_select(0, schedule.order))
    weight_ih, weight_hh = call.weight_ih.to(call.dtype), call.weight_hh.to(call.dtype)
    for block in reversed(schedule.blocks):
        x, raw, a = layer.inputs(block)
        h = _states_before(call, states, schedule, block)
        gates = torch.addmm(layer.bias_ih, x, layer.weight_ih)
        gate = gates[:, : 2 * size].addmm_(h, layer.weight_hh[:, : 2 * size]).sigmoid_()
        r, z = gate[:, :size], gate[:, size:]
        hidden = layer.candidate(h, r)
        n = gates[:, 2 * size :].add_(r * hidden if call.reset_after else hidden).tanh_()
        u = layer.update(z, a)
        by_z, by_a = layer.update_slopes(z, a)
        # What a step's gradient dh is multiplied with: coefficients [rows, 3, H] of the pre-activations.
        through = torch.addcmul(u, u * n, n, value=-1) if call.kind != "agru" else u * (1 - n * n)
        factors = like.new_empty(len(block.rows), 3, size)
        slope_r = torch.addcmul(r, r, r, value=-1)
        torch.mul(through, r, out=factors[:, 2]) if call.reset_after else factors[:, 2].copy_(through)
        torch.mul(through * hidden if call.reset_after else h, slope_r, out=factors[:, 0])
        torch.mul((n - h).mul_(by_z), torch.addcmul(z, z, z, value=-1), out=factors[:, 1])
        keep = (1 - u).expand(-1, size)
        dh = like.new_zeros(len(block.rows), size)
        if grad_states is not None:
            torch.index_select(grad_states.to(call.dtype), 0, block.rows, out=dh)
        grads = torch.empty_like(factors)
        for step in reversed(list(block.steps())):
            count = step.stop - step.start
            d = dh[step].add_(carry[:count])
            if call.reset_after:
                g = torch.mul(factors[step], d.unsqueeze(1), out=grads[step]).view(count, 3 * size)
                torch.mul(d, keep[step], out=carry[:count]).addmm_(g, weight_hh)
            else:
                g = grads[step]
                torch.mul(factors[step, 1:], d.unsqueeze(1), out=g[:, 1:])
                gated = torch.mm(g[:, 2], weight_hh[2 * size :])
                torch.mul(gated, factors[step, 0], out=g[:, 0])
                torch.mul(d, keep[step], out=carry[:count]).addcmul_(gated, r[step])
                carry[:count].addmm_(g[:, :2].reshape(count, -1), weight_hh[: 2 * size])
        grad = grads.view(-1, 3 * size)
        if call.reset_after:
            grad_hh.addmm_(grad.t(), h)
            bias_hh += grad.sum(0)
            torch.mul(dh, through, out=grads[:, 2])
        else:
            grad_hh[: 2 * size].addmm_(grad[:, : 2 * size].t(), h)
            grad_hh[2 * size :].addmm_(grads[:, 2].t(), r * h)
        grad_ih.addmm_(grad.t(), x)
        bias_ih += grad.sum(0)
        grad_x = grad @ weight_ih
        if grad_scores is not None:
            if call.kind == "aigru":
                grad_a = torch.linalg.vecdot(grad_x, raw)
                grad_x *= a
            else:
                grad_a = torch.linalg.vecdot(dh * by_a, n - h)
            grad_scores.index_copy_(0, block.rows, grad_a)
        grad_inputs.index_copy_(0, block.rows, grad_x)
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
