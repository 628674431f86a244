"""Batch norm, Dice and dropout in nn.ActivationUnit: as PyTorch's own modules over the items that count."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_nn_activation_unit import HOLES, VALID, WIDTH, assert_close, batch
from torch import Tensor, nn

from recattn import Jagged
from recattn.nn import ActivationUnit

OPTIONS: dict[str, dict[str, Any]] = {
    "dice": {"activation": "dice"},
    "dice with affine": {"activation": "dice", "dice": {"affine": True, "momentum": 0.01}},
    "batch norm": {"batch_norm": True},
    "batch norm and prelu": {"batch_norm": {"eps": 1e-3}, "activation": "prelu"},
    "batch norm and dice": {"batch_norm": True, "activation": "dice"},
    "cumulative": {"batch_norm": {"momentum": None}, "activation": "leaky_relu"},
    "no running statistics": {"batch_norm": {"track_running_stats": False}},
    "dropout": {"dropout": 0.4},
    "all": {"batch_norm": True, "activation": "dice", "dropout": 0.3, "dice": {"affine": True}},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def unit(**options: Any) -> ActivationUnit:
    torch.manual_seed(0)
    layer = ActivationUnit(WIDTH, (4, 2), dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def buffers(layer: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in layer.buffers()]


@by_options
@pytest.mark.parametrize("training", [True, False])
def test_the_eager_twin_computes_the_same(options: dict[str, Any], training: bool) -> None:
    results, states = [], []
    for implementation in range(2):
        layer = unit(**options)
        layer.train()
        layer(*batch(VALID), lengths=VALID.sum(1))  # moves the running statistics
        layer.train(training)
        torch.manual_seed(3)
        results.append(one_call(layer, "fused" if implementation == 0 else "eager"))
        states.append(buffers(layer))
    assert_close(results[0], results[1])
    assert_close(states[0], states[1])


def one_call(layer: ActivationUnit, implementation: str) -> list[Tensor]:
    query, padded = (x.requires_grad_() for x in batch(HOLES))
    out, attention = layer.use(implementation)(query, padded, mask=HOLES, return_scores=True)
    loss = out.square().sum() + attention.sin().sum()
    return [out, attention, *torch.autograd.grad(loss, [query, padded, *layer.parameters()])]


class Plain(nn.Module):
    """The scoring MLP out of PyTorch's modules, over packed items."""

    def __init__(self, layer: ActivationUnit) -> None:
        super().__init__()
        sizes = [(linear.in_features, linear.out_features) for linear in layer.layers]  # type: ignore[union-attr]
        self.layers = nn.ModuleList(nn.Linear(n, m, dtype=torch.float64) for n, m in sizes)
        options = [(norm.eps, norm.momentum, norm.affine) for norm in layer.norms]  # type: ignore[union-attr]
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(m, *o, dtype=torch.float64) for (_, m), o in zip(sizes, options, strict=False)
        )
        self.gates = nn.ModuleList()
        for (_, m), gate in zip(sizes, layer.gates, strict=False):
            own = nn.Module()
            own.bn = nn.BatchNorm1d(m, gate.bn.eps, gate.bn.momentum, gate.bn.affine, dtype=torch.float64)  # type: ignore[union-attr]
            own.alpha = nn.Parameter(torch.zeros(m, dtype=torch.float64))
            self.gates.append(own)
        self.load_state_dict(layer.state_dict())

    def forward(self, query: Tensor, history: Jagged) -> Tensor:
        sequence, k = history.segment_ids(), history.values
        q = query[sequence]
        x = torch.cat([q, k, q - k, q * k], 1)
        for i, linear in enumerate(self.layers[:-1]):
            x = linear(x)
            if self.norms:
                x = self.norms[i](x)
            if self.gates:
                p = torch.sigmoid(self.gates[i].bn(x))  # type: ignore[operator, union-attr]
                x = p * x + (1 - p) * self.gates[i].alpha * x  # type: ignore[operator]
            else:
                x = torch.sigmoid(x)
        a = self.layers[-1](x)
        return torch.zeros_like(query).index_add(0, sequence, a * k)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "dice"},
        {"batch_norm": True},
        {"batch_norm": {"momentum": None}, "activation": "dice", "dice": {"affine": True, "momentum": 0.01}},
    ],
    ids=["dice", "batch norm", "both"],
)
def test_training_is_that_of_batch_norm_modules_over_packed_items(options: dict[str, Any]) -> None:
    layer = unit(normalize="none", **options)
    plain = Plain(layer)
    for _ in range(3):
        query, padded = batch(HOLES)
        history = Jagged.from_padded(padded, mask=HOLES)
        out, expected = layer(query, history), plain(query, history)
        assert_close(out, expected)
        assert_close(
            torch.autograd.grad(out.sin().sum(), list(layer.parameters()), retain_graph=True),
            torch.autograd.grad(expected.sin().sum(), list(plain.parameters()), retain_graph=True),
        )
        assert_close(layer.state_dict(), plain.state_dict())
    layer.eval()
    plain.eval()
    assert_close(layer(query, history), plain(query, history))


@by_options
def test_a_batch_without_items_leaves_no_trace(options: dict[str, Any]) -> None:
    for implementation in ("fused", "eager"):
        layer = unit(**options).use(implementation)
        before = buffers(layer)
        query = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
        out = layer(
            query, torch.randn(3, 4, WIDTH, dtype=torch.float64), lengths=torch.zeros(3, dtype=torch.int64)
        )
        out.sum().backward()
        assert_close(buffers(layer), before)
        assert out.eq(0).all()
        for parameter in (query, *layer.parameters()):
            assert parameter.grad is None or parameter.grad.eq(0).all()


@by_options
def test_a_single_item_is_no_error(options: dict[str, Any]) -> None:
    for implementation in ("fused", "eager"):
        layer = unit(**options).use(implementation)
        keys = torch.randn(1, WIDTH, dtype=torch.float64)
        out = layer(torch.randn(1, WIDTH, dtype=torch.float64), Jagged(keys, torch.tensor([0, 1])))
        out.sum().backward()
        assert out.isfinite().all()
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    layer = unit(dropout=0.5)
    query, padded = batch(VALID)

    def out(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(query, padded, lengths=VALID.sum(1))

    assert_close(out(1), out(1))
    assert not torch.equal(out(1), out(2))
    layer.eval()
    assert_close(out(1), out(2))


def test_dropout_keeps_the_mean_of_the_hidden_units() -> None:
    layer = unit(dropout=0.3, normalize="none", activation="identity")
    query, keys = torch.randn(1, WIDTH, dtype=torch.float64), torch.randn(1, WIDTH, dtype=torch.float64)
    n = 20_000
    history = Jagged(keys.expand(n, WIDTH), torch.arange(n + 1))
    outs = layer(query.expand(n, WIDTH), history)
    layer.eval()
    expected = layer(query, Jagged(keys, torch.tensor([0, 1])))[0]
    assert ((outs.mean(0) - expected).abs() < 5 * outs.std(0) * n**-0.5).all()


def test_state_is_that_of_batch_norm() -> None:
    layer = ActivationUnit(WIDTH, (4, 2), activation="dice", batch_norm=True)
    names = set(layer.state_dict())
    batch_norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert {f"norms.1.{name}" for name in batch_norm} < names
    assert {name for name in names if name.startswith("gates.0.")} == {
        "gates.0.alpha",
        "gates.0.bn.running_mean",
        "gates.0.bn.running_var",
        "gates.0.bn.num_batches_tracked",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_statistics_in_float32(dtype: torch.dtype) -> None:
    layer = unit(activation="dice", batch_norm=True)
    query, padded = batch(VALID)
    expected = layer(query, padded, lengths=VALID.sum(1))
    half = unit(activation="dice", batch_norm=True).to(dtype)
    out = half(query.to(dtype), padded.to(dtype), lengths=VALID.sum(1))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = unit(activation="dice", batch_norm=True).float()
        out = mixed(query.float(), padded.float(), lengths=VALID.sum(1))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "dropout: expected a probability below 1, got 1.0"),
        ({"dice": {"eps": 1.0}}, "dice: expected None, since the activation is sigmoid, got {'eps': 1.0}"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ActivationUnit(WIDTH, (4, 2), **options)
