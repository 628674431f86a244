"""What the kernels of activation_unit are called with: tensors in named tuples, constants in one Spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
from torch import Tensor

# Vectors over the units that an activation takes, as `primitives.activate` knows it.
PARAMS = {"leaky_relu": 1, "dice": 3, "half_dice": 3}


class Histories(NamedTuple):
    """The data, whose rows lie as far apart as the Spec says.

    How many sequences there are is an argument of its own, as a number in a tuple would be specialised on.
    """

    query: Tensor  # [B, D]
    key: Tensor  # [R, D]
    value: Tensor  # [R, Dv], or the keys. A tuple in Triton has a `values` of its own
    offsets: Tensor  # [B + 1], of the sequences, one per query
    starts: Tensor  # [B], of each sequence its first position, where sequences share histories
    rows: Tensor  # [T], of each position its row of the keys and values, where they are read by index


class Network(NamedTuple):
    """The MLP in normal form: matrices in the dtype of the products, vectors in float32."""

    key: Tensor  # [H1, D]
    product: Tensor  # [H1, D]
    first_bias: Tensor  # [B, H1]
    weights: tuple[Tensor, ...]  # [H2, H1], ...
    biases: tuple[Tensor, ...]  # [H2], ...
    params: tuple[Tensor, ...]  # [H1], ..., [H2], ...: those of the activation, layer after layer
    last_weight: Tensor  # [Hn]
    last_bias: Tensor  # [1]
    noise: Tensor  # [1], int32, the key of dropout


class Upstream(NamedTuple):
    """What backward begins with."""

    grad_out: Tensor  # [B, Dv]
    grad_scores: Tensor  # [T]
    delta: Tensor  # [B], Σ_t a_t dL/da_t
    peak_mass: Tensor  # [B, 2], of the softmax the maximum in base 2 and the sum
    back: tuple[Tensor, ...]  # [H2, H1], ..., the matrices of the way back, see mlp_backward


class Chunk(NamedTuple):
    """What the way back through a wide network keeps of some positions, a row each, in the dtype of the products."""

    first: int  # the first position
    pairs: Tensor  # [rows, 2·D], k and q*k
    units: tuple[Tensor, ...]  # [rows, H1], ..., of all hidden layers but the last
    grads: tuple[Tensor, ...]  # [rows, H1], ..., dL/dz of all hidden layers, of the last e, see mlp_backward
    attention: Tensor  # [rows], in float32


class TileSums(NamedTuple):
    """Sums over the tokens of each tile."""

    last_weight: Tensor  # [tiles, Hn]; of none where statistics are wanted
    last_bias: Tensor  # [tiles]
    params: tuple[Tensor, ...]  # [tiles, H1], ..., as those of the Network


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Nothing here depends on a length or on the size of the batch."""

    dim: int
    value_dim: int
    hidden: tuple[int, ...]
    activation: str  # as `primitives.activate` knows it
    normalize: str
    separate_values: bool
    query_stride: int
    key_stride: int
    value_stride: int
    shared: bool  # whether sequences share histories
    indexed: bool  # whether keys and values are read by index
    scatter: bool  # whether their gradients go where the index says, which is at no two positions the same
    with_scores: bool  # forward writes them, backward gets their gradient
    precision: str  # of products, as tl.dot takes it
    approx: bool  # approximate instructions of NVIDIA GPUs
    block: int  # tokens per tile
    slab: int  # widest slab of a hidden layer that another one reads
    last_slab: tuple[int, int]  # widest and narrowest slab of the last hidden layer
    dim_slab: int  # widest slab of keys and values
    least_rows: int  # fewest rows worth a program
    stages: int
    fresh: bool = False  # vectors over the units are read again in every tile
    split: bool = False  # products of float32 as sums of products of parts, forward only
    warps: int = 1  # that share a tile
    scored: bool = False  # forward reads the scores instead of computing them
    dropped: int = 0  # of 2^16 hidden units
    zero: float = 0.0  # what a kernel has as a unit that is 0
    statistics: bool = False  # of the last hidden layer, in place of scores
    sums: str = "all"  # of "weights" or "params" only, in weights_kernel

    @property
    def softmax(self) -> bool:
        return self.normalize == "softmax"

    @property
    def params_each(self) -> int:
        """How many vectors of `Network.params` a hidden layer has."""
        return PARAMS.get(self.activation, 0)

    @property
    def param_layers(self) -> int:
        """For how many hidden layers gradients of the params are summed."""
        return len(self.hidden) - self.statistics if self.params_each and self.sums != "weights" else 0

    @property
    def weight_layers(self) -> int:
        """For how many of those behind the first gradients of the weights are."""
        return len(self.hidden) - 1 if self.sums != "params" else 0

    @property
    def last_layer(self) -> bool:
        """Whether they are for the layer behind them."""
        return self.sums != "params" and not self.statistics


@triton.constexpr_function
def get(spec, name):
    """A field or property of a Spec, as a constexpr."""
    return getattr(spec, name)


@triton.constexpr_function
def depth(spec):
    """The number of hidden layers."""
    return len(spec.hidden)


@triton.constexpr_function
def params_loaded(layer, total, spec):
    """As many of a hidden layer, but of the last one all that is left of the total: where its statistics are wanted
    none on the way forward, and those of `last_units_backward` on the way back."""
    each = spec.params_each
    return total - layer * each if layer == len(spec.hidden) - 1 else each


@triton.constexpr_function
def width(layer, spec):
    """Units of a hidden layer."""
    return spec.hidden[layer]


@triton.constexpr_function
def widest(layer, spec):
    """The widest slab of a hidden layer."""
    return spec.last_slab[0] if layer == len(spec.hidden) - 1 else spec.slab


@triton.constexpr_function
def narrowest(layer, spec):
    """The narrowest slab of a hidden layer. A product reads at least 16 columns, the score any number."""
    return spec.last_slab[1] if layer == len(spec.hidden) - 1 else 16
