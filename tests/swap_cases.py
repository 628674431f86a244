"""What the tests of fused layers of other libraries compare."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recattn
from recattn.bench.peers import import_peer

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
LENGTHS = torch.tensor([3, 0, 6, 1, 6, 0, 5])
BATCH, LONGEST, WIDTH = 7, 6, 4
# right padding, left padding, holes
MASKS = {
    "right": torch.arange(LONGEST) < LENGTHS[:, None],
    "left": torch.arange(LONGEST - 1, -1, -1) < LENGTHS[:, None],
    "holes": (torch.arange(LONGEST) * 5 % LONGEST) < LENGTHS[:, None],
}


def import_or_skip(name: str) -> Any:
    try:
        return import_peer(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error), allow_module_level=True)


def spread(module: Any, std: float = 0.5) -> Any:
    """With parameters and statistics that hide no error, as fresh ones may."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
        elif name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return module


def run(layer: nn.Module, call: Callable[[nn.Module], Any], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, the gradients of inputs and parameters for some gradient of them, and the buffers afterwards."""
    outputs = call(layer)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(x, Tensor)]
    heads = [x for x in outputs if x.requires_grad]
    upstream = [torch.arange(1.0, 1 + x.numel()).reshape(x.shape).cos().to(x) for x in heads]
    leaves = [*inputs, *layer.parameters()]
    grads = torch.autograd.grad(heads, leaves, upstream, materialize_grads=True) if heads else ()
    return [*outputs, *grads, *layer.buffers()]


def assert_same(actual: list[Tensor], expected: list[Tensor], relative: float, least: float = 1.0) -> None:
    """Equal up to a share of the largest element of each, or of `least`, if that is more: some gradients are 0 but for
    the rounding of what cancels, as that of a bias before batch norm."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        finite = e.detach()[e.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        torch.testing.assert_close(a, e, rtol=0, atol=relative * max(scale, least), equal_nan=True)


def assert_fused_equals_own(
    layer: nn.Module,
    call: Callable[..., Any],
    inputs: list[Tensor],
    dtype: torch.dtype = torch.float64,
    remark: str = "",
    least: float = 1.0,
    **options: Any,
) -> nn.Module:
    """Fuses a copy, compares, and compares again after `unfuse`, bit by bit. Returns the fused copy.

    Args:
        call: of the layer and `inputs`, cast.
        least: as of `assert_same`.
    """
    layer = layer.to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    own, fused = copy.deepcopy(layer), copy.deepcopy(layer)
    report = recattn.fuse(fused, **options)
    assert report
    assert [(row.swapped, row.reason) for row in report] == [(True, remark)] * len(report), report

    def calling(module: nn.Module) -> Any:
        return call(module, *inputs)

    expected = run(own, calling, inputs)
    assert_same(run(fused, calling, inputs), expected, TOLERANCES[dtype], least)
    back = copy.deepcopy(layer)
    recattn.fuse(back, **options)
    recattn.unfuse(back)
    assert [type(a) for a in back.modules()] == [type(a) for a in own.modules()]
    for a, b in zip(run(back, calling, inputs), expected, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    return fused


def pickled(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assert_state_survives(layer: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    """Checkpoints load across fuse and back; copies and pickles are fused; parameters stay the same objects."""
    layer = layer.eval()
    other = spread(copy.deepcopy(layer), 0.3)
    state, parameters, expected = copy.deepcopy(layer.state_dict()), list(layer.parameters()), call(layer)
    classes = [type(m) for m in layer.modules()]
    recattn.fuse(layer)
    recattn.fuse(other)
    fused = [type(m) for m in layer.modules()]
    assert fused != classes
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in state.items()}
    other.load_state_dict(state)
    for twin in (layer, other, copy.deepcopy(layer), pickled(layer)):
        assert [type(m) for m in twin.modules()] == fused
        torch.testing.assert_close(call(twin), expected)
        assert torch.equal(call(recattn.unfuse(twin)), expected)
    assert [type(m) for m in layer.modules()] == classes


def assert_exports_as_own(layer: nn.Module, example: tuple[Any, ...]) -> None:
    """torch.fx, `jit.trace` and TorchScript make of a fused layer what they make of the library's own."""
    own = layer.eval()
    fused = copy.deepcopy(own)
    recattn.fuse(fused)
    kind = type(fused)
    assert kind is not type(own)
    for export in (
        torch.fx.symbolic_trace,
        lambda m: torch.jit.trace(m, example, check_trace=False),
        torch.jit.script,
    ):
        try:
            expected = export(own)(*example)
        except Exception as error:  # what the library's own layer does not survive
            with pytest.raises(type(error)):
                export(fused)(*example)
        else:
            torch.testing.assert_close(export(fused)(*example), expected, rtol=0, atol=0)
    assert type(fused) is kind
