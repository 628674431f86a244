"""TorchEasyRec: its DIN and dot-product encoders of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from tzrec.modules.activation import Dice
from tzrec.modules.mlp import MLP, Perceptron
from tzrec.modules.sequence import DINEncoder, SimpleAttention
from tzrec.modules.utils import Transpose

from recattn import functional
from recattn.backend import requested_backend
from recattn.ops.library import on_cpu
from recattn.swap.coverage import Options, Swap, Uncovered, expect, expect_own, instead_of, leave_small
from recattn.swap.histories import IN_WORDS, MEAN, ZERO, Padded, attend, by_length, remarks
from recattn.swap.scorers import Gate, Scorer

__all__ = ["SWAPS", "FusedDINEncoder", "FusedSimpleAttention"]

# Dot products of a padded batch take less time than reading a jagged one.
ON_THE_CPU = "on a CPU by the library's own code, which is faster there"
POOLING: dict[str, Any] = {"normalize": "softmax", "empty": MEAN}


class FusedDINEncoder(DINEncoder):
    """`DINEncoder`, computed over the items that count and no others; an empty sequence gives the mean of its padding,
    as in the library."""

    @instead_of(DINEncoder.forward)
    def forward(self, sequence_embedded: dict[str, Tensor]) -> Tensor:
        """Pools `{input}.sequence [B, L, D]`, of `{input}.sequence_length [B]`, by `{input}.query [B, Dq]`; returns
        `[B, D]`."""
        query, history = _inputs(self, sequence_embedded)
        leave_small(history.keys, Options.of(self), "activation_unit")
        missing = history.keys.shape[2] - query.shape[1]
        if missing < 0 or query.shape[1] != self._query_dim:
            raise Uncovered(f"query: {tuple(query.shape)}")
        query = F.pad(query, (0, missing)) if missing else query
        return attend(_scorer(self), query, history, Options.of(self), **POOLING)


class FusedSimpleAttention(SimpleAttention):
    """`SimpleAttention`, over the items that count and no others; an empty sequence as `DINEncoder` has it."""

    @instead_of(SimpleAttention.forward)
    def forward(self, sequence_embedded: dict[str, Tensor]) -> Tensor:
        """As of `DINEncoder`, with a query as wide as the sequence."""
        expect_own("forward", self)
        query, history = _inputs(self, sequence_embedded)
        if on_cpu(query) and requested_backend() == "auto" and Options.of(self).exact:
            raise Uncovered(ON_THE_CPU)
        if query.shape[1] != history.keys.shape[2]:
            raise Uncovered(f"query: {tuple(query.shape)}")
        layout = history.layout()
        pooled = functional.target_attention(query, values=layout["keys"], scale=1.0, **layout)
        assert isinstance(pooled, Tensor)
        return history.pooled(pooled, MEAN if Options.of(self).exact else ZERO)


def _inputs(layer: Any, embedded: dict[str, Tensor]) -> tuple[Tensor, Padded]:
    query, sequence = embedded[layer._query_name], embedded[layer._sequence_name]
    lengths = embedded[layer._sequence_length_name]
    if (
        sequence.dim() != 3
        or query.dim() != 2
        or not (lengths.shape == query.shape[:1] == sequence.shape[:1])
    ):
        raise Uncovered(f"query, sequence: {tuple(query.shape)}, {tuple(sequence.shape)}")
    if layer._max_seq_length > 0:
        lengths = lengths.clamp_max(layer._max_seq_length)
        sequence = sequence[:, : layer._max_seq_length]
    return query, Padded(sequence, by_length(lengths, sequence.shape[1]))


def _scorer(layer: DINEncoder) -> Scorer:
    expect_own("forward", layer)
    expect("mlp", layer.mlp, MLP)
    if layer.mlp.return_hidden_layer_feature:
        raise Uncovered("mlp: returns its hidden layers")
    modules: dict[str, nn.Module] = {}
    for i, perceptron in enumerate(layer.mlp.mlp):
        expect(f"mlp.mlp.{i}", perceptron, Perceptron)
        expect(f"mlp.mlp.{i}.perceptron", perceptron.perceptron, nn.Sequential)
        for j, module in enumerate(perceptron.perceptron):
            name = f"mlp.mlp.{i}.perceptron.{j}"
            if isinstance(module, nn.PReLU) and module.num_parameters != 1:
                raise Uncovered(f"{name}: PReLU of a 3-D input has a slope per position, not per unit")
            if isinstance(module, Transpose):  # around batch norm, which here is per unit anyway
                expect(name, module, Transpose)
            else:
                modules[name] = module
    return Scorer.of({**modules, "linear": layer.linear}, {Dice: "dice"}, _gate)


def _gate(dice: Dice) -> Gate:
    if dice.dim != 3:
        raise Uncovered("Dice of a 2-D input")
    return Gate(dice.alpha, dice.bn)


def _check_din(layer: Any, options: Options) -> Sequence[str]:
    return remarks(_scorer(layer), options, POOLING["empty"])


def _check_simple(layer: Any, options: Options) -> Sequence[str]:
    expect_own("forward", layer)
    if not options.exact:
        return [f"an empty history gives 0, not {IN_WORDS[MEAN]}"]
    return [ON_THE_CPU] if options.backend == "auto" else []


SWAPS = (
    Swap(DINEncoder, FusedDINEncoder, _check_din, "activation_unit"),
    Swap(SimpleAttention, FusedSimpleAttention, _check_simple),
)
