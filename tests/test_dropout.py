"""Which units dropout keeps: pinned to the hash in plain integers, and random enough."""

from __future__ import annotations

import pytest
import torch
from activation_unit_cases import call, variant

import recattn
from recattn import functional
from recattn.ops.dropout import Dropout

WORD = 0xFFFFFFFF
M1, M2 = 0x21F0AAAD, 0xD35A2D97
E1, E2 = 0x43E1555A, 0xA6B45B2E


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * M1 & WORD
    x ^= x >> 15
    x = x * M2 & WORD
    return x ^ x >> 15


def half(seed: int, row: int, layer: int, unit: int) -> int:
    """The 16 bits that decide on a unit, as an unsigned number turned by half its range."""
    key = mix((seed & WORD) ^ mix((seed >> 32 & WORD) ^ 0x9E3779B9))
    r = mix((row & WORD) ^ key) + (row >> 32) * 0x9E3779B9 & WORD
    s = mix(r ^ 0x9E3779B9) | 1
    lane, octet = unit // 2 % 4, 8193 * layer + unit // 8
    x = (r + (65537 * layer + unit // 2) * 0x9E3779B9) * (s ^ lane * E1 & WORD ^ octet * E2 & WORD) & WORD
    return ((x * (65537 if unit % 2 else 1) & WORD) >> 16) + 32768 & 0xFFFF


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_the_hash_is_what_it_says(seed: int) -> None:
    dropout = Dropout.of(0.3, torch.tensor(seed))
    assert dropout is not None
    assert dropout.dropped == 19661
    rows = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
    for layer in (0, 2):
        expected = [[half(seed, row, layer, unit) >= 19661 for unit in range(9)] for row in rows.tolist()]
        assert dropout.kept(rows, layer, 9).tolist() == expected


def test_units_are_dropped_as_if_independently() -> None:
    rows, units, probability = 100_000, 32, 0.3
    z = []
    for seed in (5, 6):
        dropout = Dropout.of(probability, torch.tensor([seed]))
        assert dropout is not None
        for layer in range(2):
            kept = dropout.kept(torch.arange(rows), layer, units).double()
            z.append((kept - (1 - probability)) / (probability * (1 - probability)) ** 0.5)
    each = torch.cat(z, 1)  # [rows, 128], of mean 0 and variance 1 each
    assert each.mean(0).abs().max() < 5 * rows**-0.5
    between = each.t() @ each / rows
    assert between.fill_diagonal_(0).abs().max() < 5.5 * rows**-0.5
    for lag in (1, 2, 32):
        assert (each[lag:] * each[:-lag]).mean(0).abs().max() < 5 * rows**-0.5


def test_no_dropout_is_none_and_the_gain_keeps_the_mean() -> None:
    assert Dropout.of(0.0, None) is None
    assert Dropout.of(1e-9, torch.tensor(0)) is None
    dropout = Dropout.of(0.5, torch.tensor(0))
    assert dropout is not None
    assert dropout.gain == 2.0


def test_the_seed_comes_from_the_generator_of_torch() -> None:
    case = variant()
    t = case.tensors()
    weights = [t[f"weight {i}"] for i in range(3)]
    biases = [t[f"bias {i}"] for i in range(3)]

    def out() -> torch.Tensor:
        result = functional.activation_unit(
            t["query"], t["keys"], case.offsets(), weights, biases, dropout=0.4
        )
        assert isinstance(result, torch.Tensor)
        return result

    torch.manual_seed(1)
    first, second = out(), out()
    torch.manual_seed(1)
    assert torch.equal(out(), first)
    assert not torch.equal(first, second)


def test_a_batch_drops_the_same_whatever_block_a_row_is_in() -> None:
    case = variant(dropout=0.4, lengths=[40, 0, 3000, 40])
    tensors = case.tensors()
    with recattn.backend("torch"):
        results = call(functional.activation_unit, case, tensors)
        again = call(functional.activation_unit, case, tensors)
    for name, result in results.items():
        assert torch.equal(result, again[name]), name
