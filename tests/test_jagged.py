"""Jagged: every way in and out, what may lie in padding and slack, and what bad input says."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from watching import NoSync

from recattn import Jagged
from recattn.jagged import unpack

BATCH, LONGEST, WIDTH = 5, 4, 3
LENGTHS = torch.tensor([2, 0, 4, 9, 1])  # an empty one, a full one, one longer than the padded batch
RIGHT = torch.arange(LONGEST) < LENGTHS[:, None]
MASKS = {
    "right padding": RIGHT,
    "left padding": RIGHT.flip(1),
    "holes": torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0]]).bool(),
    "all empty": torch.zeros(BATCH, LONGEST, dtype=torch.bool),
    "all full": torch.ones(BATCH, LONGEST, dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def jagged(lengths: list[int], slack: int = 0, dtype: torch.dtype = torch.int64) -> Jagged:
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    return Jagged(torch.randn(sum(lengths) + slack, WIDTH), offsets)


def sequences(x: Jagged) -> list[Tensor]:
    bounds = x.offsets.tolist()
    return [x.values[begin:end] for begin, end in pairwise(bounds)]


def assert_sequences(x: Jagged, expected: list[Tensor]) -> None:
    got = sequences(x)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_and_segment_ids_follow_the_offsets(dtype: torch.dtype) -> None:
    x = jagged([2, 0, 3], slack=2, dtype=dtype)
    assert x.batch_size == 3
    assert x.device == torch.device("cpu")
    assert torch.equal(x.lengths, torch.tensor([2, 0, 3], dtype=dtype))
    assert torch.equal(x.segment_ids(), torch.tensor([0, 0, 2, 2, 2, 3, 3]))


def test_no_sequences_and_no_rows_are_legal() -> None:
    nothing, empties = jagged([]), jagged([0, 0])
    assert (nothing.batch_size, empties.batch_size) == (0, 2)
    for x in (nothing, empties):
        assert x.validate() is x
        assert x.segment_ids().shape == (0,)
        assert x.to_padded().shape == (x.batch_size, 0, WIDTH)
        assert x.to_padded(2, padding_value=7).eq(7).all()


def test_to_moves_values_and_keeps_the_dtype_of_offsets() -> None:
    x = jagged([2, 1], dtype=torch.int32).to("meta", torch.float64)
    assert (x.values.dtype, x.offsets.dtype) == (torch.float64, torch.int32)
    assert x.values.device == x.offsets.device == torch.device("meta")


def test_with_values_keeps_the_sequences() -> None:
    x = jagged([2, 0, 1], slack=1)
    other = torch.randn(4)
    assert x.with_values(other).values is other
    assert x.with_values(other).offsets is x.offsets
    with pytest.raises(ValueError, match=re.escape("values: expected 4 rows, got (3, 2)")):
        x.with_values(torch.randn(3, 2))


# ---------------------------------------------------------------- padded


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("pattern", MASKS)
def test_from_padded_keeps_what_the_mask_marks_in_order(pattern: str, dtype: torch.dtype) -> None:
    padded, mask = torch.randn(BATCH, LONGEST, WIDTH), MASKS[pattern]
    x = Jagged.from_padded(padded, mask=mask.to(dtype))
    assert_sequences(x, [row[keep] for row, keep in zip(padded, mask, strict=True)])
    assert x.values.shape[0] == mask.sum()
    assert x.offsets.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_padded_cuts_lengths_at_the_padded_length(dtype: torch.dtype) -> None:
    padded = torch.randn(BATCH, LONGEST, WIDTH)
    x = Jagged.from_padded(padded, lengths=LENGTHS.to(dtype))
    assert_sequences(x, [row[:length] for row, length in zip(padded, LENGTHS.tolist(), strict=True)])


@pytest.mark.parametrize(("batch", "longest"), [(0, LONGEST), (3, 0), (0, 0)])
def test_from_padded_without_rows_or_positions(batch: int, longest: int) -> None:
    padded = torch.randn(batch, longest, WIDTH)
    mask = torch.ones(batch, longest, dtype=torch.bool)
    for x in (
        Jagged.from_padded(padded, mask=mask),
        Jagged.from_padded(padded, lengths=torch.ones(batch, dtype=torch.int64)),
    ):
        assert (x.batch_size, x.values.shape) == (batch, (0, WIDTH))
        assert x.validate() is x


@pytest.mark.parametrize("trailing", [(), (2, 3)])
def test_from_padded_takes_any_trailing_shape_and_dtype(trailing: tuple[int, ...]) -> None:
    padded = torch.randint(9, (BATCH, LONGEST, *trailing))
    x = Jagged.from_padded(padded, mask=MASKS["holes"])
    assert torch.equal(x.values, padded[MASKS["holes"]])


@pytest.mark.parametrize("pattern", MASKS)
def test_a_total_given_leaves_slack_behind_the_sequences(pattern: str) -> None:
    padded, mask = torch.randn(BATCH, LONGEST, WIDTH, requires_grad=True), MASKS[pattern]
    counted = Jagged.from_padded(padded, mask=mask)
    x = Jagged.from_padded(padded, mask=mask, total=BATCH * LONGEST)
    assert x.values.shape[0] == BATCH * LONGEST
    assert torch.equal(x.offsets, counted.offsets)
    assert_sequences(x, sequences(counted))


@pytest.mark.parametrize("pattern", MASKS)
def test_padding_that_holds_nan_reaches_neither_values_nor_gradients(pattern: str) -> None:
    mask = MASKS[pattern]
    padded = torch.randn(BATCH, LONGEST, WIDTH).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    x = Jagged.from_padded(padded, mask=mask)
    assert x.values.isfinite().all()
    (gradient,) = torch.autograd.grad(x.values.square().sum(), padded)
    assert torch.equal(gradient, torch.where(mask[..., None], 2 * padded, 0).nan_to_num())


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("max_length", [None, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_to_padded_pads_right_and_cuts(dtype: torch.dtype, max_length: int | None, slack: int) -> None:
    x = jagged([2, 0, 3, 1], slack, dtype)
    padded = x.to_padded(max_length, padding_value=-1)
    longest = 3 if max_length is None else max_length
    assert padded.shape == (4, longest, WIDTH)
    for row, sequence in zip(padded, sequences(x), strict=True):
        kept = sequence[:longest]
        assert torch.equal(row[: len(kept)], kept)
        assert row[len(kept) :].eq(-1).all()


def test_gradients_of_to_padded_are_those_of_the_rows_kept_and_zero_elsewhere() -> None:
    values = torch.randn(7, WIDTH, requires_grad=True)
    x = Jagged(values, torch.tensor([0, 3, 3, 5]))
    upstream = torch.randn(3, 2, WIDTH)
    (gradient,) = torch.autograd.grad(x.to_padded(2, padding_value=5), values, upstream)
    expected = torch.zeros_like(values)
    expected[:2], expected[3:5] = upstream[0], upstream[2]
    assert torch.equal(gradient, expected)


def test_slack_that_holds_nan_stays_out_of_the_padded_batch() -> None:
    x = jagged([2, 1], slack=2)
    x.values[3:] = torch.nan
    assert x.to_padded().isfinite().all()


@pytest.mark.parametrize("padded_to", [LONGEST, LONGEST + 2])
def test_padded_batches_survive_the_round_trip(padded_to: int) -> None:
    x = jagged([2, 0, LONGEST, 1])
    back = Jagged.from_padded(x.to_padded(padded_to, padding_value=torch.nan), lengths=x.lengths)
    assert torch.equal(back.values, x.values)
    assert torch.equal(back.offsets, x.offsets)


@pytest.mark.parametrize("total", [None, BATCH * LONGEST])
@pytest.mark.parametrize("pattern", MASKS)
def test_unpack_undoes_from_padded(pattern: str, total: int | None) -> None:
    mask = MASKS[pattern]
    padded = torch.randn(BATCH, LONGEST, requires_grad=True)
    back = unpack(Jagged.from_padded(padded, mask=mask, total=total).values, mask)
    assert torch.equal(back, torch.where(mask, padded, 0))
    (gradient,) = torch.autograd.grad(back.sum(), padded)
    assert torch.equal(gradient, mask.to(gradient))


def test_from_lengths_takes_rows_that_lie_end_to_end() -> None:
    values = torch.randn(5, WIDTH)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        x = Jagged.from_lengths(values, torch.tensor([3, 0, 2], dtype=dtype))
        assert x.values is values
        assert torch.equal(x.offsets, torch.tensor([0, 3, 3, 5]))


# ---------------------------------------------------------------- nested


def nested_with_holes() -> tuple[Tensor, list[Tensor]]:
    padded, starts, lengths = torch.randn(4, 6, WIDTH), [1, 0, 5, 2], [3, 0, 1, 4]
    nested = torch.nested.narrow(padded, 1, torch.tensor(starts), torch.tensor(lengths), layout=torch.jagged)
    kept = [row[s : s + n] for row, s, n in zip(padded, starts, lengths, strict=True)]
    return nested, kept


def test_nested_tensors_survive_the_round_trip() -> None:
    rows = [torch.randn(length, WIDTH) for length in (2, 0, 3)]
    x = Jagged.from_nested(torch.nested.nested_tensor(rows, layout=torch.jagged))
    assert_sequences(x, rows)
    for row, back in zip(rows, x.to_nested().unbind(), strict=True):
        assert torch.equal(row, back)


def test_to_nested_drops_slack() -> None:
    x = jagged([1, 2], slack=3)
    assert_sequences(Jagged.from_nested(x.to_nested()), sequences(x))
    assert x.to_nested().values().shape == (3, WIDTH)


def test_a_narrowed_nested_tensor_loses_its_holes() -> None:
    nested, kept = nested_with_holes()
    x = Jagged.from_nested(nested)
    assert_sequences(x, kept)
    assert x.values.shape[0] == sum(map(len, kept))


def test_gradients_flow_through_nested_tensors() -> None:
    values = torch.randn(4, WIDTH, requires_grad=True)
    nested = Jagged(values, torch.tensor([0, 1, 3])).to_nested()
    (gradient,) = torch.autograd.grad(Jagged.from_nested(nested).values.sum(), values)
    assert torch.equal(gradient[:, 0], torch.tensor([1.0, 1.0, 1.0, 0.0]))


# ---------------------------------------------------------------- torchrec, which need not be installed


class FakeJaggedTensor:
    def __init__(self, values: Tensor, offsets: Tensor) -> None:
        self._values, self._offsets = values, offsets

    def values(self) -> Tensor:
        return self._values

    def offsets(self) -> Tensor:
        return self._offsets


class FakeKeyedJaggedTensor(FakeJaggedTensor):
    """Two keys of two sequences each, end to end."""

    def keys(self) -> list[str]:
        return ["clicks", "carts"]

    def __getitem__(self, key: str) -> FakeJaggedTensor:
        first = 2 * self.keys().index(key)
        bounds = self._offsets[first : first + 3]
        return FakeJaggedTensor(self._values[bounds[0] : bounds[-1]], bounds - bounds[0])


def test_from_torchrec_takes_a_jagged_tensor_or_one_key_of_a_keyed_one() -> None:
    values, offsets = torch.randn(6, WIDTH), torch.tensor([0, 1, 3, 3, 6])
    assert_sequences(
        Jagged.from_torchrec(FakeJaggedTensor(values, offsets)),
        [values[:1], values[1:3], values[3:3], values[3:]],
    )
    keyed = FakeKeyedJaggedTensor(values, offsets)
    assert_sequences(Jagged.from_torchrec(keyed, "clicks"), [values[:1], values[1:3]])
    assert_sequences(Jagged.from_torchrec(keyed, key="carts"), [values[3:3], values[3:]])


def test_to_torchrec_makes_what_its_key_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    torchrec = ModuleType("torchrec")
    torchrec.JaggedTensor = lambda *a, **k: made.append((a, k)) or "jagged"  # type: ignore[attr-defined]
    torchrec.KeyedJaggedTensor = lambda *a, **k: made.append((a, k)) or "keyed"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchrec", torchrec)
    x = jagged([2, 1])
    assert x.to_torchrec() == "jagged"
    assert x.to_torchrec("clicks") == "keyed"
    assert made == [((x.values,), {"offsets": x.offsets}), ((["clicks"], x.values), {"offsets": x.offsets})]


# ---------------------------------------------------------------- nothing waits for the device


def test_the_guard_against_synchronisation_bites() -> None:
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        jagged([1]).to_nested()


def test_conversions_whose_size_is_known_do_not_synchronise() -> None:
    padded = torch.randn(BATCH, LONGEST, WIDTH, requires_grad=True)
    nested = torch.nested.nested_tensor([torch.randn(2, WIDTH)], layout=torch.jagged)
    mask = MASKS["holes"]
    with NoSync():
        x = Jagged.from_padded(padded, mask=mask, total=8)
        Jagged.from_padded(padded, lengths=LENGTHS, total=BATCH * LONGEST).segment_ids()
        Jagged.from_lengths(padded[0], LENGTHS[:2]).lengths  # noqa: B018
        (x.to_padded(LONGEST)[..., 0] + unpack(x.values[:, 0], mask)).sum().backward()
        Jagged.from_nested(nested)


def test_off_the_cpu_the_batch_is_packed_without_counting_its_rows() -> None:
    padded = torch.empty(BATCH, LONGEST, WIDTH, device="meta")  # has no contents that could be read
    lengths = torch.empty(BATCH, dtype=torch.int64, device="meta")
    for x in (
        Jagged.from_padded(padded, lengths=lengths),
        Jagged.from_padded(padded, mask=torch.empty(BATCH, LONGEST, dtype=torch.bool, device="meta")),
    ):
        assert x.values.shape == (BATCH * LONGEST, WIDTH)
        assert x.offsets.shape == (BATCH + 1,)
        assert x.to_padded(2).shape == (BATCH, 2, WIDTH)


def test_a_total_that_is_too_small_never_leaves_offsets_past_the_rows() -> None:
    packed = Jagged.from_padded(torch.arange(12.0).reshape(3, 4), lengths=torch.tensor([2, 4, 3]), total=5)
    assert packed.values.tolist() == [0, 1, 4, 5, 6]
    assert packed.validate().lengths.tolist() == [2, 3, 0]


def test_the_mean_is_that_of_each_sequence_and_zero_of_an_empty_one() -> None:
    values = torch.tensor([[1.0], [3.0], [5.0], [float("nan")]], requires_grad=True)
    mean = Jagged(values, torch.tensor([0, 2, 2, 3])).mean()
    assert mean.tolist() == [[2.0], [0.0], [5.0]]
    mean.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5], [0.5], [1.0], [0.0]]
    assert Jagged(torch.zeros(0, 2), torch.tensor([0, 0])).mean().tolist() == [[0.0, 0.0]]


def test_the_sum_is_that_of_each_sequence_and_zero_of_an_empty_one() -> None:
    values = torch.tensor([[1.0], [3.0], [5.0], [float("nan")]], requires_grad=True)
    total = Jagged(values, torch.tensor([0, 2, 2, 3])).sum()
    assert total.tolist() == [[4.0], [0.0], [5.0]]
    total.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0], [1.0], [1.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[2, 0, 3], [0, 0], []])
def test_appending_puts_a_row_behind_each_sequence_and_slack_behind_all(
    lengths: list[int], dtype: torch.dtype
) -> None:
    x = jagged(lengths, slack=2, dtype=dtype)
    x.values[len(x.values) - 2 :] = torch.nan
    values, rows = x.values.requires_grad_(), torch.randn(len(lengths), WIDTH, requires_grad=True)
    with NoSync():
        longer = x.append(rows)
    assert longer.offsets.dtype == dtype
    assert longer.values.shape == (len(x.values) + len(rows), WIDTH)
    assert_sequences(longer, [torch.cat([a, row[None]]) for a, row in zip(sequences(x), rows, strict=True)])
    assert longer.values[-2:].isnan().all()
    upstream = torch.randn_like(longer.values)
    grads = torch.autograd.grad(longer.values, [values, rows], upstream)
    parts = sequences(longer.with_values(upstream))
    torch.testing.assert_close(grads[0][: sum(lengths)], torch.cat([grads[0][:0], *(g[:-1] for g in parts)]))
    torch.testing.assert_close(grads[1], torch.cat([grads[1][:0], *(g[-1:] for g in parts)]))


def test_appending_rows_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("rows: expected (2, 3), got (3, 3)")):
        jagged([2, 1]).append(torch.randn(3, WIDTH))


def test_selected_rows_keep_their_sequence_and_order() -> None:
    history = Jagged(torch.arange(8), torch.tensor([0, 3, 3, 6], dtype=torch.int32))
    chosen = history.select(torch.tensor([True, False, True, False, True, True, True, False]))
    assert chosen.values.tolist() == [0, 2, 4, 5]  # rows 6 and 7 are slack
    assert chosen.offsets.tolist() == [0, 2, 2, 4]
    assert chosen.offsets.dtype == torch.int32


def test_selecting_on_an_accelerator_leaves_slack_and_asks_the_host_nothing() -> None:
    history = Jagged(torch.empty(8, 5, device="meta"), torch.empty(4, dtype=torch.int64, device="meta"))
    chosen = history.select(torch.empty(8, dtype=torch.bool, device="meta"))
    assert chosen.values.shape == (8, 5)
    assert chosen.batch_size == 3


def test_a_selection_by_anything_but_a_bool_per_row_is_refused() -> None:
    history = Jagged(torch.arange(3), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=r"mask: expected bool, got torch\.int64"):
        history.select(torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"mask: expected \(3,\), got \(2,\)"):
        history.select(torch.tensor([True, False]))
