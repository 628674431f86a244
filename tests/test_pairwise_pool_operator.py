"""pairwise_pool as PyTorch's own tools see it, its equality with two libraries, its memory, and bad input."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from pairwise_pool_cases import Case, call, variant
from torch import Tensor, nn

from recattn import functional
from recattn.bench.timing import HostMeter
from recattn.composite import pairwise_pool as composite
from recattn.ops.pairwise_pool import forward_op

F64 = torch.float64


@pytest.mark.parametrize(
    "case",
    [variant(), variant(count=1), variant(return_weights=True, dtype=torch.bfloat16)],
    ids=["plain", "no pair", "weights"],
)
def test_schema_fake_and_autograd_agree_with_the_implementation(case: Case) -> None:
    tensors = [x.requires_grad_() for x in case.tensors().values()]
    checks = torch.library.opcheck(forward_op, (*tensors, None, 0.0, case.return_weights, "auto"))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("count", [2, 5, 6])
def test_gradients_are_those_of_finite_differences(count: int, dropout: float) -> None:
    case = variant(batch=3, count=count, dim=3, hidden=4, dtype=F64, dropout=dropout, return_weights=True)

    def function(*tensors: Tensor) -> Any:
        torch.manual_seed(0)
        return functional.pairwise_pool(*tensors, **case.options())

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in case.tensors().values()])


def test_it_compiles_without_a_graph_break() -> None:
    case = variant(dropout=0.2)
    leaves = [x.requires_grad_() for x in case.tensors().values()]

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(0)
        out = functional.pairwise_pool(*tensors)
        assert isinstance(out, Tensor)
        return out * 2

    compiled = torch.compile(lambda *x: functional.pairwise_pool(*x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), function(*leaves), rtol=0, atol=0)
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(function(*leaves).sum(), leaves))


def test_a_second_derivative_raises() -> None:
    tensors = [x.requires_grad_() for x in variant().tensors().values()]
    out = functional.pairwise_pool(*tensors)
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="pairwise_pool: a second derivative"):
        grad.sum().backward()


def test_under_autocast_it_computes_in_the_dtype_of_autocast() -> None:
    tensors = variant().tensors().values()
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.pairwise_pool(*tensors)
    torch.testing.assert_close(out, functional.pairwise_pool(*(x.bfloat16() for x in tensors)))


# ------------------------------------------------------------------------------------------------ libraries


def compare(case: Case, peer: Any) -> None:
    tensors = case.tensors()
    expected, got = call(peer, case, tensors), call(functional.pairwise_pool, case, tensors)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("count", [2, 7, 10])
def test_it_equals_the_layer_of_deepctr_torch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = ModuleType("deepctr_torch.utils")  # which at its import asks the network whether it is the newest
    utils.check_version = lambda _: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepctr_torch.utils", utils)
    layers = pytest.importorskip("deepctr_torch.layers.interaction")
    case = variant(count=count, dtype=F64)
    layer = layers.AFMLayer(case.dim, case.hidden).double()

    def peer(fields: Tensor, weight: Tensor, bias: Tensor, projection: Tensor, **_: Any) -> Tensor:
        given = {"attention_W": weight.T, "attention_b": bias, "projection_h": projection[:, None]}
        columns = []
        for unit in torch.eye(case.dim, dtype=F64):  # the layer ends in a product with a vector
            given["projection_p"] = unit[:, None]
            columns.append(torch.func.functional_call(layer, given, (list(fields.split(1, 1)),)))
        return torch.cat(columns, 1)

    compare(case, peer)


@pytest.mark.parametrize("count", [2, 7, 10])
def test_it_equals_the_attention_of_fuxictr(count: int) -> None:
    layers = pytest.importorskip("fuxictr.pytorch.layers", exc_type=ImportError)
    case = variant(count=count, dtype=F64)
    products = layers.InnerProductInteraction(count, output="elementwise_product")
    attention = nn.Sequential(
        nn.Linear(case.dim, case.hidden), nn.ReLU(), nn.Linear(case.hidden, 1, bias=False), nn.Softmax(dim=1)
    )

    def peer(fields: Tensor, weight: Tensor, bias: Tensor, projection: Tensor, **_: Any) -> Tensor:
        given = {"0.weight": weight, "0.bias": bias, "2.weight": projection[None]}
        pairs = products(fields)
        return (torch.func.functional_call(attention, given, (pairs,)) * pairs).sum(1)

    compare(case, peer)


# ------------------------------------------------------------------------------------------------ memory


def test_the_products_of_all_pairs_are_never_in_memory() -> None:
    case = variant(batch=2048, count=20, dim=16, hidden=16)
    leaves = [x.requires_grad_() for x in case.tensors().values()]
    fields, block = leaves[0].nbytes, composite.BLOCK_BYTES["cpu"]
    products = fields * (case.count - 1) // 2

    def run() -> None:
        out = functional.pairwise_pool(*leaves)
        assert isinstance(out, Tensor)
        torch.autograd.grad(out.sum(), leaves)

    peak = HostMeter().peak_bytes(run)
    assert fields <= peak <= 2 * fields + 6 * block < products / 2


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fields": [1.0]}, TypeError, "fields: expected a tensor, got list"),
        ({"fields": torch.ones(2, 3)}, ValueError, "fields: expected shape [B, F, K], got [2, 3]"),
        ({"fields": torch.ones(2, 3, 4).int()}, TypeError, "fields: expected one of torch.float16"),
        ({"fields": torch.ones(2, 3, 0)}, ValueError, "fields: expected at least one column, got [2, 3, 0]"),
        ({"weight": torch.ones(5, 3)}, ValueError, "weight: expected shape [A, 4], got [5, 3]"),
        ({"weight": torch.ones(0, 4)}, ValueError, "weight: expected at least one row, got [0, 4]"),
        ({"weight": torch.ones(5, 4).half()}, TypeError, "weight: expected torch.float32, as the fields"),
        ({"bias": torch.ones(4)}, ValueError, "bias: expected shape [5], got [4]"),
        ({"projection": torch.ones(1, 5)}, ValueError, "projection: expected shape [5], got [1, 5]"),
        ({"bias": torch.ones(5, device="meta")}, ValueError, "bias: expected device cpu, as the fields"),
        ({"dropout": 1.0}, ValueError, "dropout: expected at least 0 and less than 1, got 1.0"),
        ({"dropout": float("nan")}, ValueError, "dropout: expected at least 0 and less than 1, got nan"),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "fields": torch.ones(2, 3, 4),
        "weight": torch.ones(5, 4),
        "bias": torch.ones(5),
        "projection": torch.ones(5),
    }
    with pytest.raises(error, match=re.escape(message)):
        functional.pairwise_pool(**arguments | changes)
