"""What the launchers of activation_unit's backward kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from . import settings
from .activation_unit import specialize
from .arguments import PARAMS, Histories, Spec, Upstream
from .fragments import Fragments
from .normal_form import NormalForm
from .tuning import tuned


class Call(NamedTuple):
    """What backward is called with, and the gradients that kernels write."""

    unit: Any  # a `recattn.composite.activation_unit.Unit`
    data: Histories
    net: NormalForm
    upstream: Upstream
    grad_key: Tensor  # [T, D], or [R, D] where they are scattered
    grad_value: Tensor | None
    grad_first: Tensor  # [B, D + H1], dL/dq but for its way through c, and dL/dc
    with_scores: bool
    statistics: bool  # of the last hidden layer, in place of scores

    def spec(self, launch: settings.Launch, products: str | None = None) -> Spec:
        """Of a kernel, whose products of float32 may be others than the forward kernel's."""
        spec = specialize(self.unit, self.data, self.net, launch, self.with_scores)
        widest, narrowest = spec.last_slab
        # A product that reads the gradient of the last layer needs 16 columns of it.
        if len(spec.hidden) > 2 or spec.activation in PARAMS:
            narrowest = max(narrowest, 16)
        return replace(
            spec,
            statistics=self.statistics,
            last_slab=(widest, narrowest),
            precision=products or spec.precision,
        )

    def tuned(self, kernel: str, row: str, launch: settings.Launch) -> settings.Launch:
        """The settings of a kernel: its table's, or what tuning has found."""
        dim = max(self.data.key.shape[1], self.data.value.shape[1])
        return tuned(kernel, row, launch, dim, self.net.hidden, self.data.key.device)

    def programs(self, launch: settings.Launch) -> int:
        return settings.programs(launch, self.unit.most_rows, self.data.key.device)


class WeightSums(NamedTuple):
    """Sums over all tokens for the gradients of the normal form's tensors, of the last hidden layer with e in the place
    of dL/dz, see `mlp_backward`."""

    key: Tensor
    product: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    params: list[Tensor]  # but, where statistics are wanted, of the last layer
    last_weight: Tensor
    last_bias: Tensor

    @classmethod
    def of_programs(
        cls,
        key: Tensor,
        product: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        params: Sequence[Tensor],
        last_weight: Tensor,
        last_bias: Tensor,
        order: Fragments | None = None,
    ) -> WeightSums:
        """From sums of each program, `[programs, ...]`, matrices transposed; of the first layer they may be in an
        order of their own."""
        first = [x.sum(0) if order is None else order.matrix(x.sum(0)) for x in (key, product)]
        return cls(
            first[0].t(),
            first[1].t(),
            [w.sum(0).t() for w in weights],
            [b.sum(0) for b in biases],
            [p.sum(0) for p in params],
            last_weight.sum(0),
            last_bias.sum(0),
        )


def program_sums(
    call: Call, first: int, later: int, last: int, order: Fragments | None = None
) -> dict[str, Any]:
    """Zeros for `WeightSums.of_programs`: as many as programs make sums of the first layer, of the hidden layers behind
    it, and of the last layer and the params."""
    network, zeros = call.net.network, call.upstream.peak_mass.new_zeros
    shape = network.key.t().shape if order is None else (order.size,)
    with_params = PARAMS.get(call.net.form.kernel, 0) * (len(call.net.hidden) - call.statistics)
    return {
        "key": zeros(first, *shape),
        "product": zeros(first, *shape),
        "weights": tuple(zeros(later, *w.t().shape) for w in network.weights),
        "biases": tuple(zeros(later, *b.shape) for b in network.biases),
        "params": tuple(zeros(last, *p.shape) for p in network.params[:with_params]),
        "last_weight": zeros(last, call.net.hidden[-1]),
        "last_bias": zeros(last, 1),
    }
