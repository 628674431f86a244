"""The MLP by which a layer of another library scores items, as `recattn.functional.activation_unit` takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from recattn.nn.batch_norm import Moments, needs_moments, scale_and_shift
from recattn.swap.coverage import Uncovered, expect

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
    nn.Identity: "identity",
}


class Gate(NamedTuple):
    """A library's Dice: `z·(alpha + (1 - alpha)·sigmoid(norm(z)))`."""

    alpha: Tensor  # [H]
    norm: nn.BatchNorm1d


@dataclass
class Hidden:
    """A hidden layer: a product, batch norm, an activation, dropout, in this order; the last three may lack."""

    linear: nn.Linear
    norm: nn.BatchNorm1d | None = None
    activation: nn.Module | None = None
    name: str = ""  # of the activation
    dropout: nn.Dropout | None = None


@dataclass(frozen=True)
class Scorer:
    """An MLP with one output, of whatever a library's layer holds.

    Attributes:
        hidden: its hidden layers, all of one activation and one dropout.
        last: the product behind them.
        activation: as `activation_unit` names it.
        negative_slope: of leaky_relu.
        gates: of dice, one per hidden layer.
        output: the activation of the score, `"identity"` or a name from `ACTIVATIONS`.
    """

    hidden: Sequence[Hidden]
    last: nn.Linear
    activation: str
    negative_slope: float | None
    gates: Sequence[Gate]
    output: str

    @classmethod
    def of(
        cls,
        modules: Mapping[str, nn.Module],
        also: Mapping[type[nn.Module], str] | None = None,
        gate: Callable[[Any], Gate] | None = None,
    ) -> Scorer:
        """Of the modules that a batch goes through, by name.

        Args:
            also: the names of further activations, of the library's own; `"dice"` for its Dice.
            gate: takes such a Dice apart.
        """
        names = {**ACTIVATIONS, **(also or {})}
        layers: list[Hidden] = []
        for name, module in modules.items():
            if type(module) not in (nn.Linear, nn.BatchNorm1d, nn.Dropout, *names):
                raise Uncovered(f"{name}: {type(module).__name__} is not built")
            expect(name, module, type(module))
            _append(layers, name, module, names)
        *hidden, last = layers
        if not hidden or last.linear.out_features != 1 or last.norm is not None or last.dropout is not None:
            raise Uncovered("not a network of hidden layers and one output")
        variants = {(h.name or "identity", getattr(h.activation, "negative_slope", None)) for h in hidden}
        if len(variants) != 1:
            kinds = ", ".join(repr(h.activation) for h in hidden)
            raise Uncovered(f"different activations of hidden layers, {kinds}")
        if len({_rate(h) for h in hidden}) != 1:
            raise Uncovered("different dropout of hidden layers")
        ((activation, slope),) = variants
        gates = [gate(h.activation) for h in hidden] if activation == "dice" and gate else []
        for g in gates:
            expect("the batch norm of Dice", g.norm, nn.BatchNorm1d)
        return cls(hidden, last.linear, activation, slope, gates, last.name or "identity")

    @property
    def dropout(self) -> float:
        """The probability that a hidden unit is dropped, in training."""
        return _rate(self.hidden[0])

    @property
    def drops(self) -> float:
        """The same, now."""
        dropout = self.hidden[0].dropout
        return self.dropout if dropout is not None and dropout.training else 0.0

    @property
    def norms(self) -> list[nn.BatchNorm1d]:
        """Whatever normalises by a batch."""
        return [h.norm for h in self.hidden if h.norm is not None] + [g.norm for g in self.gates]

    @property
    def needs_moments(self) -> bool:
        return any(map(needs_moments, self.norms))

    def network(self, statistics: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        """The weights, the biases and the activation, batch norm within them.

        Args:
            statistics: computes, of a network that ends with a hidden layer, mean and variance of that layer, and of
                how many items.
        """
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        params: list[Any] = []

        def so_far() -> dict[str, Any]:
            known = {"prelu": params, "dice": params, "leaky_relu": self.negative_slope}.get(self.activation)
            return {
                "weights": weights,
                "biases": biases,
                "activation": self.activation,
                "activation_params": known,
            }

        for index, layer in enumerate(self.hidden):
            weights.append(layer.linear.weight)
            biases.append(_bias(layer.linear))
            norms = [
                n for n in (layer.norm, *(g.norm for g in self.gates[index : index + 1])) if n is not None
            ]
            moments = Moments(*statistics(**so_far())) if any(map(needs_moments, norms)) else None
            if layer.norm is not None:
                scale, shift = scale_and_shift(layer.norm, moments)
                dtype = weights[-1].dtype
                weights[-1] = (weights[-1] * scale.unsqueeze(1)).to(dtype)
                biases[-1] = (biases[-1] * scale + shift).to(dtype)
                moments = None if moments is None else moments.after(scale, shift)
            if self.activation == "prelu":
                assert layer.activation is not None
                params.append(layer.activation.weight)
            if self.gates:
                alpha, norm = self.gates[index]
                scale, shift = scale_and_shift(norm, moments)
                params.append((alpha, scale.to(alpha.dtype), shift.to(alpha.dtype)))
        weights.append(self.last.weight)
        biases.append(_bias(self.last))
        return so_far()


def _append(layers: list[Hidden], name: str, module: nn.Module, names: Mapping[type[nn.Module], str]) -> None:
    """Adds what a module does to the layers before it."""
    if isinstance(module, nn.Linear):
        layers.append(Hidden(module))
        return
    if isinstance(module, nn.Dropout):
        if module.p == 0:
            return
        if not layers or layers[-1].dropout is not None:
            raise Uncovered(f"{name}: dropout of inputs is not built")
        layers[-1].dropout = module
        return
    if not layers or layers[-1].name or layers[-1].dropout is not None:
        raise Uncovered(f"{name}: {type(module).__name__} in an unexpected place")
    if isinstance(module, nn.BatchNorm1d):
        layers[-1].norm = module
        return
    if isinstance(module, nn.GELU) and module.approximate != "none":
        raise Uncovered(f"{name}: GELU(approximate={module.approximate!r}) is not built")
    layers[-1].activation, layers[-1].name = module, names[type(module)]


def _rate(layer: Hidden) -> float:
    return 0.0 if layer.dropout is None else float(layer.dropout.p)


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
