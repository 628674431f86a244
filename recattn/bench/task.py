"""What is timed: a case of an operator, made into a task on one device, which providers compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from recattn.data import Interactions

MODES = ("inference", "forward", "forward+backward", "training step")


@dataclass(frozen=True)
class Setting:
    """Where a task runs, in which precision, and on whose histories.

    Args:
        log: of cases whose histories or lengths are those of a log.
        seed: of everything that is drawn.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    log: Interactions | None = None
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One call of an operator, as it comes up in a real setting.

    Args:
        name: of the setting; no two cases share one.
        quick: whether a quick run includes it.
    """

    op: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = MODES[:3]  # those that make sense
    name: str
    quick: bool = False

    @property
    def providers(self) -> Mapping[str, Callable[[Any], Prepared]]:
        """Who computes it, of the inputs that `task` makes."""
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass that defines providers")

    @property
    def needs_log(self) -> bool:
        return False

    def task(self, setting: Setting) -> Task:
        """Its tensors, and who computes it.

        Raises:
            ValueError: for a case that takes histories from a log, in a setting without one.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass that defines task")


class Work(NamedTuple):
    """What a pass has to move and to compute at least, whatever computes it: valid positions only, in the cheapest
    form of the formula that is known here."""

    bytes: float
    flops: float

    def of(self, mode: str) -> Work:
        """Of a mode, from that of forward: gradients read and write all of it once more, and take two products for
        each one of forward."""
        return self if mode in ("inference", "forward") else Work(3 * self.bytes, 3 * self.flops)


class Prepared(NamedTuple):
    """A call to time, its tensors laid out as it takes them.

    Args:
        forward: computes the output, in whatever layout, with a graph where gradients are enabled.
        leaves: what is differentiated, each requiring a gradient: inputs, then parameters.
        grad: dL/dout, in the layout of the output; None if that is the loss itself.
        comparable: of `[out, *gradients]`, or of `[out]`, the parts in the layout of the reference.
        infer: what inference computes, if not `forward`.
        step: a whole training step, of a model.
    """

    forward: Callable[[], Any]
    leaves: Sequence[Tensor]
    grad: Tensor | None
    comparable: Callable[[Sequence[Tensor]], list[Tensor]] = list
    infer: Callable[[], Any] | None = None
    step: Callable[[], Any] | None = None

    def run(self, mode: str) -> Callable[[], list[Tensor]]:
        """What is timed in a mode: a function that returns the output and, after a backward pass, the gradients."""
        if mode == "inference":
            infer = self.infer or self.forward
            return torch.no_grad()(lambda: [infer()])
        if mode == "forward":
            return lambda: [self.forward()]
        if mode == "training step":
            assert self.step is not None
            step = self.step
            return lambda: [step()]

        def forward_backward() -> list[Tensor]:
            out = self.forward()
            gradients = torch.autograd.grad(out, self.leaves, self.grad, materialize_grads=True)
            return [out.detach(), *gradients]

        return forward_backward

    def result(self, mode: str) -> list[Tensor]:
        """What is compared in a mode: of a training step the loss and its gradients."""
        run = self.run("forward+backward" if mode == "training step" else mode)
        return [part.detach() for part in self.comparable(run())]


Provider = Callable[[], Prepared]


@dataclass(frozen=True, eq=False)
class Task:
    """A case on one device.

    Args:
        description: of its sizes, one line.
        providers: by name; each raises where it cannot compute this.
        reference: the formula in float64, in the layout that results are compared in.
        work: of forward; None where there is no sum of it, as for a whole model.
        kinked: whether a gradient may jump where a unit is within rounding of its kink.
    """

    case: Case
    setting: Setting
    description: str
    providers: Mapping[str, Provider]
    reference: Callable[[], Prepared]
    work: Work | None
    kinked: bool = False


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    """Copies that require gradients."""
    return [t.detach().clone().requires_grad_() for t in tensors]


def comparing(
    inputs: int, unpad: Callable[[Tensor], Tensor] | None = None, padded: Sequence[int] = ()
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Compares the output and the gradients of so many inputs one by one, those of the parameters as one vector: where
    softmax makes a gradient 0, as that of the last bias, its relative error means nothing.

    Args:
        unpad: packs what is `padded`: positions in `[out, *gradients]`.
    """

    def parts(result: Sequence[Tensor]) -> list[Tensor]:
        packed = [unpad(t) if unpad and i in padded else t for i, t in enumerate(result)]
        parameters = [t.reshape(-1) for t in packed[1 + inputs :]]
        return [*packed[: 1 + inputs], *([torch.cat(parameters)] if parameters else [])]

    return parts


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
