"""What a layer of another library must be like for a fused operator to compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

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
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Uncovered(Exception):
    """Why no fused operator computes what a layer computes."""


class Swap(NamedTuple):
    """A library's layer and the fused one that takes its place."""

    original: type[nn.Module]
    fused: type[nn.Module]  # a subclass that overrides `forward` and adds no state
    check: Callable[[Any], object]  # raises Uncovered


def expect(name: str, module: nn.Module, *classes: type[nn.Module]) -> None:
    """Raises unless a call of `module` does what one of `classes` says, and nothing else.

    A fused layer reads the parameters of the modules inside it and never calls them.
    """
    if type(module) not in classes:
        expected = " or ".join(cls.__name__ for cls in classes)
        raise Uncovered(f"{name}: {type(module).__name__} in place of {expected}")
    _expect_no_detour(name, module)


def hidden_activation(
    layers: Mapping[str, nn.Module], also: Mapping[type[nn.Module], str] | None = None
) -> dict[str, Any]:
    """`activation` and `activation_params` of `recattn.functional.activation_unit`, from the modules by name.

    Args:
        also: the names of further classes, of the library's own.
    """
    names = {**ACTIVATIONS, **(also or {})}
    for name, layer in layers.items():
        if type(layer) not in names:
            raise Uncovered(f"{name}: {type(layer).__name__} is not built")
        if isinstance(layer, nn.GELU) and layer.approximate != "none":
            raise Uncovered(f"{name}: GELU(approximate={layer.approximate!r}) is not built")
        _expect_no_detour(name, layer)
    modules = list(layers.values())
    variants = {(names[type(layer)], getattr(layer, "negative_slope", None)) for layer in modules}
    if len(variants) != 1:
        raise Uncovered(f"{', '.join(layers)}: different activations, {', '.join(map(repr, modules))}")
    ((activation, negative_slope),) = variants
    slopes: Sequence[Any] = [layer.weight for layer in modules if isinstance(layer, nn.PReLU)]
    return {"activation": activation, "activation_params": slopes or negative_slope}


def _expect_no_detour(name: str, module: nn.Module) -> None:
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise Uncovered(f"{name}: its hooks would not run")
    if "forward" in vars(module):
        raise Uncovered(f"{name}: its forward is replaced")
