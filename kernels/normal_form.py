"""The network as the kernels compute it, and the way back for its gradients.

sigmoid(z) = ½·tanh(z/2) + ½, and tanh is one instruction where sigmoid is four. So a kernel computes tanh, and the
factors go into the weights: the pre-activation of a layer is scaled by `inner`, and the next layer reads
`gain·u + shift` for what the kernel has as u:

    W' = inner·gain·W      b' = inner·(b + shift·rowsum(W))

The scale of the scores and log2 e, which turns softmax's exp into exp2, go into the last layer in the same way.
Where fp32 is asked for at its full accuracy, or tanh is no instruction, a kernel computes the function itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import settings
from .arguments import Network


class Form(NamedTuple):
    """How an activation is computed: `act(z) = gain·kernel(inner·z) + shift`."""

    kernel: str
    inner: float = 1.0
    gain: float = 1.0
    shift: float = 0.0

    @property
    def zero(self) -> float:
        """What the kernel has where act is 0, as it is for a dropped unit."""
        return -self.shift / self.gain if self.shift else 0.0


FOLDED = {"sigmoid": Form("tanh", 0.5, 0.5, 0.5), "silu": Form("half_silu", 0.5), "dice": Form("half_dice")}
PLAIN = {"prelu": Form("leaky_relu")}
# What turns scores to base 2, where an exponential of them is taken.
BASE_2 = {"softmax": math.log2(math.e), "exp": math.log2(math.e), "sigmoid": -math.log2(math.e)}
LARGE = 16  # a gain whose weights might leave fp16's range
SPLIT = {"sigmoid": Form("logistic2", -math.log2(math.e))}


class NormalForm(NamedTuple):
    """A call's network as a kernel computes it."""

    network: Network
    hidden: tuple[int, ...]
    precision: str
    approx: bool
    form: Form
    last_factor: float


def normal_form(unit: Any, bounded_half: bool = False, split: bool = False) -> NormalForm:
    """Of a `recattn.composite.activation_unit.Unit`. The weights of layers behind the first are

    - with `bounded_half`, in fp16 where that is as good as tf32: for units of tanh's instruction, all within ±1;
    - with `split`, three matrices in bfloat16 whose sum they are, where fp32 is asked for at its full accuracy."""
    precision = settings.precision(unit.keys.dtype)
    plain = PLAIN.get(unit.activation, Form(unit.activation))
    folded = {}
    if torch.version.hip is None:
        folded = FOLDED if precision != "ieee" else SPLIT if split else {}
    form = folded.get(unit.activation, plain)
    if unit.dropout is not None:
        form = form._replace(gain=form.gain * unit.dropout.gain, shift=form.shift * unit.dropout.gain)
    last_factor = unit.scale * BASE_2.get(unit.normalize, 1.0)
    dtype = unit.keys.dtype
    approx = precision != "ieee" and torch.version.hip is None and not triton.knobs.runtime.interpret
    half = bounded_half and approx and precision == "tf32" and form.kernel == "tanh" and form.gain < LARGE
    inner_dtype = torch.float16 if half else dtype
    first = [x if form.inner == 1 else x * form.inner for x in unit.first[1:]]
    *weights, last_weight = unit.weights
    *biases, last_bias = unit.biases
    inner_weights = [_scaled(w, form.inner * form.gain).to(inner_dtype) for w in weights]
    if split and precision == "ieee":
        inner_weights = [_bfloat16_parts(w) for w in inner_weights]
    network = Network(
        key=first[0].to(dtype).contiguous(),
        product=first[1].to(dtype).contiguous(),
        first_bias=first[2],
        weights=tuple(w.contiguous() for w in inner_weights),
        biases=tuple(_shifted(w, b, form, form.inner) for w, b in zip(weights, biases, strict=True)),
        params=_params(unit, form),
        last_weight=_scaled(last_weight, last_factor * form.gain).flatten(),
        last_bias=_shifted(last_weight, last_bias, form, last_factor),
        noise=unit.offsets if unit.dropout is None else unit.dropout.key,
    )
    hidden = (unit.first.bias.shape[1], *(b.shape[0] for b in biases))
    return NormalForm(network, hidden, precision, approx, form, last_factor)


def backward_weights(unit: Any, net: NormalForm) -> tuple[Tensor, ...]:
    """The matrices that lead back from one hidden layer to the one before, see `mlp_backward`."""
    sign = -1.0 if net.form.kernel == "tanh" else 1.0
    weights = [_scaled(w, sign * net.form.inner * net.form.gain) for w in unit.weights[:-1]]
    if weights:
        weights[-1] = weights[-1] * net.network.last_weight[:, None]
    return tuple(w.to(unit.keys.dtype).contiguous() for w in weights)


def gradients(
    net: NormalForm,
    key: Tensor,
    product: Tensor,
    first_bias: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    last_weight: Tensor,
    last_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """From gradients of the normal form's tensors to those of the unit's: the first layer's key, product and
    bias, then the weights and the biases of the layers behind it."""
    inner, gain, shift = net.form[1:]
    factors = [inner] * len(weights) + [net.last_factor]
    grad_weights, grad_biases = [], []
    all_weights, all_biases = [*weights, last_weight[None]], [*biases, last_bias]
    for factor, weight, bias in zip(factors, all_weights, all_biases, strict=True):
        weight = _scaled(weight, factor * gain)
        grad_weights.append(weight + factor * shift * bias[:, None] if shift else weight)
        grad_biases.append(_scaled(bias, factor))
    return _scaled(key, inner), _scaled(product, inner), _scaled(first_bias, inner), grad_weights, grad_biases


def _bfloat16_parts(x: Tensor) -> Tensor:
    """`[3, *x.shape]`."""
    parts = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1].to(x.dtype)
    return torch.stack(parts)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _shifted(weight: Tensor, bias: Tensor, form: Form, factor: float) -> Tensor:
    return _scaled(bias + form.shift * weight.sum(1) if form.shift else bias, factor)


# half_dice has (½ - ½·alpha, ½·scale, ½·shift), so that half the gate of dice is left to its tanh.
HALF_DICE = ((-0.5, 0.5), (0.5, 0.0), (0.5, 0.0))


def _params(unit: Any, form: Form) -> tuple[Tensor, ...]:
    """The vectors of all hidden layers, one element per unit, however they came."""
    widths = [unit.first.bias.shape[1], *(b.shape[0] for b in unit.biases[:-1])]
    like = unit.first.bias
    vectors = []
    for params, width in zip(unit.params, widths, strict=True):
        for index, param in enumerate(params):
            vector = param.expand(width) if isinstance(param, Tensor) else like.new_full((width,), param)
            if form.kernel == "half_dice":
                factor, shift = HALF_DICE[index]
                vector = vector * factor + shift
            vectors.append(vector.contiguous())
    return tuple(vectors)


def param_gradients(unit: Any, net: NormalForm, sums: Sequence[Tensor]) -> list[Tensor]:
    """From those of the normal form's params to those of the unit's, where these are tensors."""
    indexed = [(index, param) for layer in unit.params for index, param in enumerate(layer)]
    return [
        _scaled(grad, HALF_DICE[index][0] if net.form.kernel == "half_dice" else 1.0).sum_to_size(param.shape)
        for grad, (index, param) in zip(sums, indexed, strict=True)
        if isinstance(param, Tensor)
    ]
