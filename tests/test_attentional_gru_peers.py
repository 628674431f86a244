"""attentional_gru against torch.nn.GRU and the cells of two libraries, in float64: outputs and gradients."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from attentional_gru_cases import call, variant
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from recattn import functional

CASE = variant(dtype=torch.float64, slack=0, lengths=[4, 1, 7, 2, 5, 3])
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def histories(inputs: Tensor, offsets: Tensor) -> list[Tensor]:
    return list(inputs.split(offsets.diff().tolist()))


def torch_gru(inputs: Tensor, offsets: Tensor, _: None, *parameters: Tensor, h0: Tensor, **__: Any) -> Any:
    layer = nn.GRU(inputs.shape[1], h0.shape[1], dtype=inputs.dtype)
    given = {f"{name}_l0": p for name, p in zip(PARAMETERS, parameters, strict=True)}
    packed = pack_sequence(histories(inputs, offsets), enforce_sorted=False)
    out, last = torch.func.functional_call(layer, given, (packed, h0.unsqueeze(0)))
    return torch.cat(nn.utils.rnn.unpack_sequence(out)), last.squeeze(0)


def over_steps(cell: nn.Module, given: dict[str, Tensor], order: str) -> Any:
    """A function that runs a library's cell over each history, its arguments in an order of its own."""

    def run(inputs: Tensor, offsets: Tensor, scores: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        states, last = [], []
        for sequence, attention, h in zip(
            histories(inputs, offsets), histories(scores, offsets), h0.unsqueeze(1), strict=True
        ):
            for x, a in zip(sequence, attention, strict=True):
                step = (x.unsqueeze(0), h, a.reshape(1, 1) if order == "column" else a.reshape(1))
                h = torch.func.functional_call(cell, given, step)
                states.append(h)
            last.append(h)
        return torch.cat(states), torch.cat(last)

    return run


def permuted(tensor: Tensor, negate: bool, order: tuple[int, int, int]) -> Tensor:
    """Thirds in another order, that of z with another sign: 1 - sigmoid(x) is sigmoid(-x)."""
    r, z, n = tensor.chunk(3)
    thirds = r, -z if negate else z, n
    return torch.cat([thirds[i] for i in order])


def compare(case: Any, peer: Any, tensors: dict[str, Tensor] | None = None) -> None:
    tensors = case.tensors() if tensors is None else tensors
    expected, got = call(peer, case, tensors), call(functional.attentional_gru, case, tensors)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-11, msg=name)


def test_gru_equals_that_of_torch() -> None:
    compare(variant(**vars(CASE) | {"kind": "gru"}), torch_gru)


@pytest.mark.parametrize("kind", ["agru", "augru"])
def test_cells_equal_those_of_deepctr_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = ModuleType("deepctr_torch.utils")  # which at its import asks the network whether it is the newest
    utils.check_version = lambda _: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepctr_torch.utils", utils)
    layers = pytest.importorskip("deepctr_torch.layers.sequence")
    cell = {"agru": layers.AGRUCell, "augru": layers.AUGRUCell}[kind](CASE.width, CASE.size).double()

    def peer(
        inputs: Tensor, offsets: Tensor, scores: Tensor, *parameters: Tensor, h0: Tensor, **_: Any
    ) -> Any:
        given = {
            name: permuted(p, kind == "augru", (0, 1, 2))
            for name, p in zip(PARAMETERS, parameters, strict=True)
        }
        if kind == "augru":  # of whose biases there is one, under two names
            cell.bias_ih = nn.Parameter(cell.bias_hh.detach().clone())
        return over_steps(cell, given, "column")(inputs, offsets, scores, h0)

    compare(variant(**vars(CASE) | {"kind": kind}), peer)


@pytest.mark.parametrize("kind", ["agru", "augru"])
def test_cells_equal_those_of_fuxictr(kind: str) -> None:
    module = pytest.importorskip("model_zoo.LongCTR.DIEN.DIEN", exc_type=ImportError)
    cell = {"agru": module.AGRUCell, "augru": module.AUGRUCell}[kind](CASE.width, CASE.size).double()
    names = ("x2h.weight", "h2h.weight", "x2h.bias", "h2h.bias")

    def peer(
        inputs: Tensor, offsets: Tensor, scores: Tensor, *parameters: Tensor, h0: Tensor, **_: Any
    ) -> Any:
        given = {name: permuted(p, True, (1, 0, 2)) for name, p in zip(names, parameters, strict=True)}
        return over_steps(cell, given, "vector")(inputs, offsets, scores, h0)

    compare(variant(**vars(CASE) | {"kind": kind}), peer)


def test_aigru_is_the_gru_of_torch_over_scaled_inputs() -> None:
    def peer(inputs: Tensor, offsets: Tensor, scores: Tensor, *parameters: Tensor, **options: Any) -> Any:
        return torch_gru(inputs * scores.unsqueeze(1), offsets, None, *parameters, **options)

    compare(variant(**vars(CASE) | {"kind": "aigru"}), peer)
