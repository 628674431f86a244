"""AFM's attention over pairs of fields in other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recattn.bench.peers import import_peer
from recattn.bench.task import Prepared, comparing, leaves_of

if TYPE_CHECKING:
    from recattn.bench.tasks.pairwise_pool import Inputs


def deepctr_torch(inputs: Inputs) -> Prepared:
    """DeepCTR-Torch's `AFMLayer`, whose last projection is made the identity, so that it gives what is pooled."""
    case = inputs.case
    layer = import_peer("deepctr_torch.layers").AFMLayer(case.dim, case.hidden)
    layer.to(inputs.grad.device, inputs.grad.dtype)
    (fields,) = leaves_of(inputs.tensors[0])
    weight, bias, projection = inputs.tensors[1:]
    layer.projection_p = nn.Parameter(torch.eye(case.dim).to(inputs.grad), requires_grad=False)
    parameters = [layer.attention_W, layer.attention_b, layer.projection_h]
    with torch.no_grad():
        for parameter, value in zip(parameters, (weight.T, bias, projection.unsqueeze(1)), strict=True):
            parameter.copy_(value)
    parts = comparing(1)

    def comparable(result: Sequence[Tensor]) -> list[Tensor]:
        return parts(result if len(result) == 1 else [*result[:2], result[2].T, *result[3:]])

    return Prepared(lambda: layer(fields.split(1, 1)), [fields, *parameters], inputs.grad, comparable)


def recbole(inputs: Inputs) -> Prepared:
    """The pairs of RecBole's `AFM` and its `AttLayer`, whose network has no bias there and has one here. What its
    `afm_layer` does behind them is done here, up to the last product: it returns no more than a logit."""
    case = inputs.case
    model = import_peer("recbole.model.context_aware_recommender.afm").AFM
    layer = import_peer("recbole.model.layers").AttLayer(case.dim, case.hidden)
    layer.w = nn.Linear(case.dim, case.hidden)
    layer.to(inputs.grad.device, inputs.grad.dtype)
    (fields,) = leaves_of(inputs.tensors[0])
    parameters = [layer.w.weight, layer.w.bias, layer.h]
    with torch.no_grad():
        for parameter, value in zip(parameters, inputs.tensors[1:], strict=True):
            parameter.copy_(value)
    sizes = SimpleNamespace(num_feature_field=case.fields)

    def forward() -> Tensor:
        left, right = model.build_cross(sizes, fields)
        pairs = torch.mul(left, right)
        return torch.sum(torch.mul(layer(pairs).unsqueeze(2), pairs), dim=1)

    return Prepared(forward, [fields, *parameters], inputs.grad, comparing(1))


LAYERS: dict[str, Callable[[Inputs], Prepared]] = {"deepctr_torch": deepctr_torch, "recbole": recbole}
