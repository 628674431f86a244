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
        return self.training or self.running_mean is None

    def scale_and_shift(self, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """`[H]` each, in float32 at least; `moments` where they are needed, which move the running statistics."""
        if self.needs_moments:
            assert moments is not None
            mean, variance = moments.mean, moments.variance
            if self.training:
                self._track(moments)
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            wide = torch.promote_types(self.running_mean.dtype, torch.float32)
            mean, variance = self.running_mean.to(wide), self.running_var.to(wide)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    @torch.no_grad()
    def _track(self, moments: Moments) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        mean, variance, items = moments
        some = items > 0
        self.num_batches_tracked += some
        rate: Tensor | float = (
            1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        )
        unbiased = variance * (items / (items - 1).clamp_min(1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
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
