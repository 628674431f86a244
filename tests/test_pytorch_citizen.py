"""Layers under what PyTorch offers around a module: compile, export, autocast, checkpointing, threads and the like."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from recattn import Jagged, nn
from recattn.jagged import offsets_of

DIM = 6


class Data(NamedTuple):
    query: Tensor
    values: Tensor
    offsets: Tensor


def data(lengths: list[int], slack: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Data:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(lengths) + sum(lengths) + slack, DIM, generator=generator, dtype=dtype)
    query, values = rows.split([len(lengths), sum(lengths) + slack])
    return Data(query.clone(), values.clone(), offsets_of(torch.tensor(lengths, dtype=torch.int64)))


class Wrapped(torch.nn.Module):
    """A layer as a function of tensors alone, to `[B, ...]` or `[T, ...]`."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        history = Jagged(values, offsets)
        match self.layer:
            case nn.SelfAttention():
                return self.layer(history).values
            case nn.AttentionalGRU():
                return self.layer(history, history.with_values(values[:, 0]), h0=None)[1]
            case _:
                return self.layer(query, history)


MAKE: dict[str, Callable[[], torch.nn.Module]] = {
    "ActivationUnit": lambda: nn.ActivationUnit(DIM, (5, 4)),
    "ActivationUnit, dice": lambda: nn.ActivationUnit(DIM, (5, 4), activation="dice"),
    "TargetAttention": lambda: nn.TargetAttention(DIM, num_heads=2),
    "TargetAttention, additive": lambda: nn.TargetAttention(DIM, "additive"),
    "SelfAttention": lambda: nn.SelfAttention(DIM, 2, buckets=4),
    "AttentionalGRU": lambda: nn.AttentionalGRU(DIM, 5),
}


@pytest.fixture(params=MAKE)
def layer(request: pytest.FixtureRequest) -> Wrapped:
    torch.manual_seed(0)
    return Wrapped(MAKE[request.param]())


def gradients(layer: Wrapped, given: Data, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output, and gradients of what is floating."""
    query, values = (x.detach().requires_grad_() for x in given[:2])
    out = (layer if run is None else run)(query, values, given.offsets)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    leaves = [query, values, *layer.parameters()]
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


LENGTHS = [3, 0, 11, 1, 5]


# ---------------------------------------------------------------- compile


def test_compiles_whole_and_once_for_any_batch(layer: Wrapped) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        lengths = torch.randint(
            0, 9, (2 + int(torch.randint(9, (1,), generator=generator)),), generator=generator
        )
        given = data([*lengths.tolist(), 3], slack=step % 3, seed=step)
        # After the first no batch may compile anything: neither forward nor backward.
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = gradients(layer, given, compiled)
        if step in (0, 19):
            torch.testing.assert_close(got, gradients(layer, given), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_gives_the_same(layer: Wrapped) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, [2, 7, 0]):
        given = data(lengths)
        torch.testing.assert_close(gradients(layer, given, compiled), gradients(layer, given))


def exported(layer: Wrapped) -> Any:
    batch, rows = torch.export.Dim("batch", min=2, max=1 << 20), torch.export.Dim("rows", min=2, max=1 << 30)
    shapes = {"query": {0: batch}, "values": {0: rows}, "offsets": {0: batch + 1}}
    if isinstance(layer.layer, (nn.SelfAttention, nn.AttentionalGRU)):  # which read no query
        shapes["query"] = {0: torch.export.Dim.AUTO}
    given = data(LENGTHS)
    return torch.export.export(layer, tuple(given), dynamic_shapes=shapes)


def test_export_keeps_the_operator_and_takes_any_batch(layer: Wrapped, tmp_path: Path) -> None:
    layer.eval()
    program = exported(layer)
    assert any("recattn" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for lengths in (LENGTHS, [2, 7, 0]):
        given = data(lengths)
        torch.testing.assert_close(loaded(*given), layer(*given))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_packages_a_layer(tmp_path: Path) -> None:
    layer = Wrapped(MAKE["ActivationUnit"]()).eval()
    path = torch._inductor.aoti_compile_and_package(exported(layer), package_path=str(tmp_path / "layer.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for lengths in (LENGTHS, [2, 7, 0]):
        given = data(lengths)
        torch.testing.assert_close(loaded(*given), layer(*given))


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_forward_and_backward(layer: Wrapped, dtype: torch.dtype) -> None:
    given = data(LENGTHS)
    with torch.autocast("cpu", dtype=dtype):
        got = gradients(layer, given)
    expected = gradients(layer, given)
    assert got[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in got[1:])
    for one, other in zip(got, expected, strict=True):
        scale = 1 + float(other.abs().max())
        torch.testing.assert_close(one.float() / scale, other / scale, rtol=0, atol=0.05)


# ---------------------------------------------------------------- functions of a module


def test_functional_call_takes_other_parameters(layer: Wrapped) -> None:
    other = {name: x + 0.1 for name, x in layer.named_parameters()}
    changed = copy.deepcopy(layer)
    changed.load_state_dict(other, strict=False)
    given = data(LENGTHS)
    torch.testing.assert_close(functional_call(layer, other, tuple(given)), changed(*given))


def test_activation_checkpointing_gives_the_same(layer: Wrapped) -> None:
    if isinstance(layer.layer, nn.ActivationUnit):
        layer.layer.dropout = 0.3  # what is dropped must be dropped again
    given = data(LENGTHS)
    torch.manual_seed(3)
    expected = gradients(layer, given)
    torch.manual_seed(3)
    got = gradients(layer, given, lambda *x: checkpoint(layer, *x, use_reentrant=False))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_second_derivative_raises(layer: Wrapped) -> None:
    query, values, offsets = data(LENGTHS)
    values.requires_grad_()
    (grad,) = torch.autograd.grad(layer(query, values, offsets).sum(), values, create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative was asked for"):
        grad.sum().backward()


def test_inference_mode_gives_the_same(layer: Wrapped) -> None:
    layer.eval()
    given = data(LENGTHS)
    expected = layer(*given)
    with torch.inference_mode():
        got = layer(*given)
    assert got.is_inference()
    torch.testing.assert_close(got.clone(), expected.detach(), rtol=0, atol=0)


# ---------------------------------------------------------------- where tensors lie


def test_query_and_values_may_share_a_storage(layer: Wrapped) -> None:
    given = data(LENGTHS)
    together = torch.cat([given.query, given.values])
    shared = Data(together[: len(LENGTHS)], together[len(LENGTHS) :], given.offsets)
    torch.testing.assert_close(gradients(layer, shared), gradients(layer, given), rtol=0, atol=0)


def test_values_may_be_columns_of_something_wider(layer: Wrapped) -> None:
    given = data(LENGTHS)
    wide = [torch.full((len(x), 3 * DIM), torch.nan) for x in given[:2]]
    for x, w in zip(given, wide, strict=False):
        w[:, DIM : 2 * DIM] = x
    columns = [w[:, DIM : 2 * DIM] for w in wide]
    transposed = [x.t().contiguous().t() for x in given[:2]]
    expected = gradients(layer, given)
    for query, values in (columns, transposed):
        got = gradients(layer, Data(query, values, given.offsets))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_expanded_inputs_are_what_they_look_like(layer: Wrapped) -> None:
    given = data(LENGTHS)
    rows = [x[:1].expand(len(x), DIM) for x in given[:2]]
    elements = [x[:1, :1].expand(len(x), DIM) for x in given[:2]]
    for query, values in (rows, elements):
        expected = gradients(layer, Data(query.contiguous(), values.contiguous(), given.offsets))
        got = gradients(layer, Data(query, values, given.offsets))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_upstream_gradient_may_be_expanded(layer: Wrapped) -> None:
    query, values, offsets = data(LENGTHS)
    leaves = [values.requires_grad_(), *layer.parameters()]
    out = layer(query, values, offsets)
    one = torch.ones(1, 1).expand(out.shape)
    got = torch.autograd.grad(out, leaves, one, retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(out, leaves, one.contiguous(), allow_unused=True)
    torch.testing.assert_close(
        [g for g in got if g is not None], [g for g in expected if g is not None], rtol=1e-5, atol=1e-5
    )


# ---------------------------------------------------------------- threads


def test_threads_do_not_disturb_each_other(layer: Wrapped) -> None:
    batches = [data(LENGTHS, seed=0), data([40, 2, 0, 1, 9, 9], seed=1)]
    layer.eval()
    expected = [gradients(layer, given) for given in batches]
    wrong: list[BaseException] = []
    start = threading.Barrier(len(batches))

    def work(index: int) -> None:
        start.wait()
        try:
            for _ in range(20):
                got = gradients(layer, batches[index])
                torch.testing.assert_close(got, expected[index], rtol=0, atol=0)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
