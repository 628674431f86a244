"""The calls of the operators that are inspected: at the widths of published models, in every form that has kernels of
its own; and what each has to move and to compute at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from recattn import functional
from recattn.jagged import offsets_of

__all__ = ["CALLS", "Call", "Work", "select_calls"]

RECORDED = 16  # histories; what is launched does not depend on how many there are


class Work(NamedTuple):
    """Of one pass of an operator, whatever computes it. Weights, read once, are not counted."""

    bytes: float  # of memory
    products: float  # flops that matrix units can do
    flops: float  # others
    special: float  # exponentials and the like

    def __add__(self, other: Any) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Call:
    """Forward and backward of one operator, on B histories of length L."""

    op: ClassVar[str]
    B: int = 1024

    def run(self, new: Callable[..., Tensor], offsets: Callable[[int], Tensor]) -> Sequence[Tensor]:
        """The outputs for `RECORDED` histories.

        Args:
            new: makes a tensor of a shape, that needs a gradient.
            offsets: makes those of histories so long each.
        """
        raise NotImplementedError

    def work(self, itemsize: int) -> tuple[Work, Work]:
        """Forward, backward."""
        raise NotImplementedError

    def launch(self, dtype: torch.dtype, then: Callable[[], Any]) -> None:
        """Runs forward, `then`, and backward."""

        def new(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype).requires_grad_()

        def offsets(length: int) -> Tensor:
            return offsets_of(torch.full((RECORDED,), length)).to(torch.int32)

        outputs = [x for x in self.run(new, offsets) if x.requires_grad]
        then()
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    @property
    def shape(self) -> str:
        """Every size and option, as `--shape` takes them."""
        return ",".join(f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self))


@dataclass(frozen=True)
class ActivationUnit(Call):
    op = "activation_unit"
    L: int = 200
    D: int = 64
    hidden: tuple[int, ...] = (80, 40)
    candidates: int = 1  # per history

    def run(self, new: Callable[..., Tensor], offsets: Callable[[int], Tensor]) -> Sequence[Tensor]:
        sizes = [4 * self.D, *self.hidden, 1]
        out = functional.activation_unit(
            new(RECORDED * self.candidates, self.D),
            new(RECORDED * self.L, self.D),
            offsets(self.L),
            [new(m, n) for n, m in pairwise(sizes)],
            [new(m) for m in sizes[1:]],
            query_offsets=offsets(self.candidates) if self.candidates > 1 else None,
        )
        return [out] if isinstance(out, Tensor) else out

    def work(self, itemsize: int) -> tuple[Work, Work]:
        queries, rows = self.B * self.candidates, self.B * self.L
        per_pair = 2.0 * sum(n * m for n, m in pairwise((self.D, *self.hidden)))
        special = sum(self.hidden) + 1.0
        pairs = rows * self.candidates
        small = 2.0 * (self.D + self.hidden[-1])  # score and pooling
        io = (rows + 2.0 * queries) * self.D * itemsize
        forward = Work(io, pairs * per_pair, pairs * small, pairs * special)
        backward = Work(2 * io, 3 * pairs * per_pair, 3 * pairs * small, pairs * special)
        return forward, backward


@dataclass(frozen=True)
class ActivationUnitStatistics(Call):
    op = "activation_unit_statistics"
    L: int = 200
    D: int = 64
    hidden: tuple[int, ...] = (80, 40)

    def run(self, new: Callable[..., Tensor], offsets: Callable[[int], Tensor]) -> Sequence[Tensor]:
        sizes = [4 * self.D, *self.hidden]
        mean, variance, _ = functional.activation_unit_statistics(
            new(RECORDED, self.D),
            new(RECORDED * self.L, self.D),
            offsets(self.L),
            [new(m, n) for n, m in pairwise(sizes)],
            [new(m) for m in sizes[1:]],
            activation="dice",
            activation_params=[(new(1), new(1), new(1)) for _ in self.hidden[:-1]],
            dropout=0.2,
            seed=torch.tensor([1]),
        )
        return mean, variance

    def work(self, itemsize: int) -> tuple[Work, Work]:
        rows = self.B * self.L
        io = (rows + self.B) * self.D * itemsize
        products = 2.0 * rows * sum(n * m for n, m in pairwise((self.D, *self.hidden)))
        special = float(rows * sum(self.hidden[:-1]))
        small = 4.0 * rows * self.hidden[-1]
        return Work(io, products, small, special), Work(2 * io, 3 * products, small, special)


@dataclass(frozen=True)
class TargetAttention(Call):
    op = "target_attention"
    L: int = 200
    D: int = 64  # of a head
    heads: int = 1
    candidates: int = 1  # per history
    bias: bool = False

    def run(self, new: Callable[..., Tensor], offsets: Callable[[int], Tensor]) -> Sequence[Tensor]:
        rows, width = RECORDED * self.L, self.heads * self.D
        out = functional.target_attention(
            new(RECORDED * self.candidates, width),
            new(rows, width),
            new(rows, width),
            offsets(self.L),
            num_heads=self.heads,
            bias=new(rows) if self.bias else None,
            query_offsets=offsets(self.candidates) if self.candidates > 1 else None,
        )
        return [out] if isinstance(out, Tensor) else out

    def work(self, itemsize: int) -> tuple[Work, Work]:
        rows, queries, width = self.B * self.L, self.B * self.candidates, self.heads * self.D
        pairs, bias = rows * self.candidates, rows * itemsize * self.bias
        product = 2.0 * pairs * width
        special = float(pairs * self.heads)
        forward = Work(2.0 * (rows + queries) * width * itemsize + bias, 2 * product, 3 * special, special)
        io = 4.0 * (rows + queries) * width * itemsize + 2 * bias
        return forward, Work(io, 5 * product, 5 * special, special)


@dataclass(frozen=True)
class SelfAttention(Call):
    op = "self_attention"
    L: int = 200
    D: int = 64  # of a head
    heads: int = 2
    causal: bool = False
    hide_self: bool = False
    buckets: int = 0  # of a bias by place, or with dropout by time
    dropout: float = 0.0

    def run(self, new: Callable[..., Tensor], offsets: Callable[[int], Tensor]) -> Sequence[Tensor]:
        rows, width = RECORDED * self.L, self.heads * self.D
        out = functional.self_attention(
            new(rows, width),
            new(rows, width),
            new(rows, width),
            offsets(self.L),
            num_heads=self.heads,
            causal=self.causal,
            hide_self=self.hide_self,
            bias_table=new(self.buckets, self.heads) if self.buckets else None,
            bias_index=torch.arange(rows) if self.dropout else "position",
            dropout=self.dropout,
        )
        return [out]

    def work(self, itemsize: int) -> tuple[Work, Work]:
        rows, width = self.B * self.L, self.heads * self.D
        pairs = rows * (self.L + 1) / 2 if self.causal else rows * self.L
        product, special = 2.0 * pairs * width, float(pairs * self.heads)
        forward = Work(4.0 * rows * width * itemsize, 2 * product, 4 * special, special)
        return forward, Work(8.0 * rows * width * itemsize, 5 * product, 6 * special, special)


@dataclass(frozen=True)
class AttentionalGru(Call):
    op = "attentional_gru"
    L: int = 50
    D: int = 36  # of inputs and of states
    kind: str = "augru"
    reset_after: bool = True

    def run(self, new: Callable[..., Tensor], offsets: Callable[[int], Tensor]) -> Sequence[Tensor]:
        rows = RECORDED * self.L
        return functional.attentional_gru(
            new(rows, self.D),
            offsets(self.L),
            None if self.kind == "gru" else new(rows),
            new(3 * self.D, self.D),
            new(3 * self.D, self.D),
            new(3 * self.D),
            new(3 * self.D),
            kind=self.kind,
            reset_after=self.reset_after,
        )

    def work(self, itemsize: int) -> tuple[Work, Work]:
        rows = self.B * self.L
        product = 2.0 * rows * 3 * self.D * self.D
        special, small = 3.0 * rows * self.D, 8.0 * rows * self.D
        forward = Work(2.0 * rows * self.D * itemsize, 2 * product, small, special)
        return forward, Work(4.0 * rows * self.D * itemsize, 6 * product, 3 * small, special)


@dataclass(frozen=True)
class PairwisePool(Call):
    op = "pairwise_pool"
    F: int = 39  # fields
    D: int = 16  # of a field
    A: int = 16  # units of the attention network

    def run(self, new: Callable[..., Tensor], offsets: Callable[[int], Tensor]) -> Sequence[Tensor]:
        del offsets  # samples have as many fields each
        out = functional.pairwise_pool(
            new(RECORDED, self.F, self.D), new(self.A, self.D), new(self.A), new(self.A)
        )
        return [out] if isinstance(out, Tensor) else out

    def work(self, itemsize: int) -> tuple[Work, Work]:
        pairs = self.B * self.F * (self.F - 1) / 2
        product, special = 2.0 * pairs * self.D * self.A, pairs
        small = pairs * (3.0 * self.D + 3 * self.A)  # the products of fields, score and pooling
        io = self.B * (self.F + 1.0) * self.D * itemsize
        return Work(io, product, small, special), Work(2 * io, 3 * product, 3 * small, special)


CALLS: tuple[Call, ...] = (
    ActivationUnit(),
    ActivationUnit(L=20),
    ActivationUnit(candidates=8),
    ActivationUnit(L=100, D=128, hidden=(512, 256)),
    ActivationUnitStatistics(),
    ActivationUnitStatistics(L=100, D=128, hidden=(512, 256)),
    TargetAttention(bias=True),
    TargetAttention(L=10),
    TargetAttention(heads=2, candidates=64),
    TargetAttention(heads=2, candidates=5),
    SelfAttention(),
    SelfAttention(hide_self=True, buckets=64),
    SelfAttention(causal=True, buckets=64, dropout=0.1),
    AttentionalGru(),
    AttentionalGru(D=64, reset_after=False),
    AttentionalGru(kind="gru"),
    AttentionalGru(D=128),
    PairwisePool(),
    PairwisePool(F=24, D=40, A=40),
)


def select_calls(ops: Sequence[str] | None = None, shape: str | None = None) -> list[Call]:
    """The calls of some operators, with sizes changed.

    Args:
        ops: names; all operators if not given.
        shape: such as `D=64,hidden=80x40`; an operator without such a size is left as it is.

    Raises:
        ValueError: for an operator that does not exist, or a size that none of them has.
    """
    known = list(dict.fromkeys(call.op for call in CALLS))
    for op in ops or ():
        if op not in known:
            raise ValueError(f"op: expected some of {', '.join(known)}, got {op!r}")
    calls = [call for call in CALLS if ops is None or call.op in ops]
    for part in shape.split(",") if shape else ():
        name, _, text = part.partition("=")
        names = dict.fromkeys(f.name for call in calls for f in fields(call))
        if name not in names:
            raise ValueError(f"shape: expected sizes among {', '.join(names)}, got {part!r}")
        calls = [
            replace(call, **{name: _parse(text, getattr(call, name), part)}) if hasattr(call, name) else call
            for call in calls
        ]
    return list(dict.fromkeys(calls))


def _parse(text: str, like: Any, part: str) -> Any:
    try:
        if isinstance(like, tuple):
            value: Any = tuple(int(n) for n in text.split("x"))
        elif isinstance(like, bool):
            value = {"0": False, "1": True}[text]
        else:
            value = type(like)(text)
    except (ValueError, KeyError):
        raise ValueError(
            f"shape: expected {part.partition('=')[0]}={_text(like)} or the like, got {part!r}"
        ) from None
    return value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)
