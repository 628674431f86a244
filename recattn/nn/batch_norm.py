"""Batch norm and Dice over the hidden units of a scoring MLP, as scales and shifts that fused layers take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Moments(NamedTuple):
    """Of the units of a layer, over the items of a batch."""

    mean: Tensor  # [H]
    variance: Tensor  # [H], the mean squared distance from the mean
    items: Tensor  # how many

    def after(self, scale: Tensor, shift: Tensor) -> Moments:
        """Those of `scale·z + shift`."""
        return Moments(scale * self.mean + shift, scale.square() * self.variance, self.items)


class UnitNorm(nn.BatchNorm1d):
    r"""`nn.BatchNorm1d` as a scale and a shift per unit, from moments that are computed elsewhere.

    .. math:: \gamma \frac{z - mean}{\sqrt{variance + eps}} + \beta = scale \cdot z + shift

    Arguments, parameters, buffers, and what training and evaluation do are those of `nn.BatchNorm1d`; but a batch
    without items leaves the running statistics as they are, and one of a single item is no error: it has variance 0.
    """

    @property
    def needs_moments(self) -> bool:
        return needs_moments(self)

    def scale_and_shift(self, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """`[H]` each, in float32 at least; `moments` where they are needed, which move the running statistics."""
        return scale_and_shift(self, moments)


def needs_moments(norm: nn.BatchNorm1d) -> bool:
    """Whether a batch norm normalises by the batch itself."""
    return norm.training or norm.running_mean is None


def scale_and_shift(norm: nn.BatchNorm1d, moments: Moments | None) -> tuple[Tensor, Tensor]:
    """A batch norm as `UnitNorm.scale_and_shift` has it."""
    if needs_moments(norm):
        assert moments is not None
        mean, variance = moments.mean, moments.variance
        if norm.training:
            _track(norm, moments)
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        wide = torch.promote_types(norm.running_mean.dtype, torch.float32)
        mean, variance = norm.running_mean.to(wide), norm.running_var.to(wide)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


@torch.no_grad()
def _track(norm: nn.BatchNorm1d, moments: Moments) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    mean, variance, count = moments
    some, items = count > 0, count.to(variance.dtype)
    norm.num_batches_tracked += some
    rate: Tensor | float = (
        1 / norm.num_batches_tracked.to(mean.dtype) if norm.momentum is None else norm.momentum
    )
    unbiased = variance * (items / (items - 1).clamp_min(1))
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.copy_(torch.where(some, running + rate * (new - running), running))


class Dice(nn.Module):
    r"""The parameters and statistics of Dice for a hidden layer.

    .. math:: h = p z + (1 - p)\,alpha\,z,\qquad p = sigmoid(BatchNorm(z))

    Args:
        units: H.
        options: of the batch norm, `nn.BatchNorm1d`; by default without affine parameters, and with eps 1e-8.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018.
    """

    def __init__(self, units: int, *, device: Any = None, dtype: Any = None, **options: Any) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.bn = UnitNorm(units, **{"eps": 1e-8, "affine": False, **options}, **factory)
        self.alpha = nn.Parameter(torch.zeros(units, **factory))

    def params(self, moments: Moments | None) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, scale, shift) of `recattn.functional.activation_unit`."""
        return self.alpha, *self.bn.scale_and_shift(moments)
