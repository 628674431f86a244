"""Length distributions and random batches."""

import pytest
import torch

from recattn.data import LENGTH_DISTRIBUTIONS, random_batch, random_histories, sample_lengths


@pytest.mark.parametrize("distribution", LENGTH_DISTRIBUTIONS)
@pytest.mark.parametrize(("batch", "max_length"), [(0, 50), (1, 50), (7, 0), (7, 1), (512, 200)])
def test_lengths_are_in_range(distribution: str, batch: int, max_length: int) -> None:
    lengths = sample_lengths(distribution, batch, max_length)
    assert lengths.shape == (batch,)
    assert lengths.dtype == torch.int64
    assert bool(((lengths >= 0) & (lengths <= max_length)).all())


@pytest.mark.parametrize("distribution", ["uniform", "lognormal", "zipf", "one_huge"])
def test_a_seed_fixes_the_lengths(distribution: str) -> None:
    lengths = sample_lengths(distribution, 256, 100, seed=1)
    assert torch.equal(lengths, sample_lengths(distribution, 256, 100, seed=1))
    assert not torch.equal(lengths, sample_lengths(distribution, 256, 100, seed=2))


@pytest.mark.parametrize("distribution", ["lognormal", "zipf"])
@pytest.mark.parametrize("fill", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("batch", [64, 4096])
def test_the_mean_follows_fill_and_the_tail_is_long(distribution: str, fill: float, batch: int) -> None:
    lengths = sample_lengths(distribution, batch, 1000, fill=fill, seed=5).double()
    assert float(lengths.mean()) / 1000 == pytest.approx(fill, rel=0.05)
    if fill == 0.2:
        assert float(lengths.median()) < 0.75 * float(lengths.mean())
        assert float(lengths.max()) > 4 * float(lengths.mean())


def test_uniform_reaches_both_ends_and_its_middle() -> None:
    lengths = sample_lengths("uniform", 20_000, 9, fill=0.9)
    counts = torch.bincount(lengths, minlength=10)
    assert int(counts.min()) > 1800
    assert int(counts.max()) < 2200


def test_equal_is_all_of_the_maximum() -> None:
    assert sample_lengths("equal", 4, 17).tolist() == [17] * 4


def test_one_huge_is_one_among_short_ones() -> None:
    lengths = sample_lengths("one_huge", 100, 6400).sort().values
    assert int(lengths[-1]) == 6400
    assert int(lengths[-2]) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("normal", 4, 8), "distribution: expected one of uniform, .*, got 'normal'"),
        (("uniform", -1, 8), "batch, max_length: expected at least 0, got -1 and 8"),
        (("lognormal", 4, 8, 1.5), r"fill: expected a fraction in \(0, 1\] for lognormal, got 1.5"),
        (("zipf", 4, 8, 0.6), r"fill: expected a fraction in \(0, 0.5\] for zipf, got 0.6"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    distribution, batch, max_length, *fill = arguments
    with pytest.raises(ValueError, match=message):
        sample_lengths(distribution, batch, max_length, fill=fill[0] if fill else 0.2)


def test_random_histories_have_the_lengths_asked_for() -> None:
    lengths = torch.tensor([3, 0, 5])
    query, history = random_histories(lengths, 4, dtype=torch.float64)
    assert query.shape == (3, 4)
    assert history.values.shape == (8, 4)
    assert history.lengths.tolist() == lengths.tolist()
    assert query.dtype == history.values.dtype == torch.float64
    again = random_histories(lengths, 4, dtype=torch.float64)
    assert torch.equal(query, again[0])
    assert torch.equal(history.values, again[1].values)
    assert not torch.equal(query, random_histories(lengths, 4, dtype=torch.float64, seed=1)[0])


def test_a_random_batch_holds_ids_in_range_and_popular_items_more_often() -> None:
    lengths = sample_lengths("lognormal", 256, 60)
    batch = random_batch(lengths, num_users=5, num_items=40, num_categories=3)
    assert torch.equal(batch.history.lengths, lengths)
    assert int(batch.user.max()) < 5
    assert set(batch.label.tolist()) == {0.0, 1.0}
    counts = torch.bincount(batch.history.values, minlength=40)
    assert len(counts) == 40
    assert int(counts[0]) > 3 * int(counts[10:20].max())
    assert torch.equal(batch.history_category.values, batch.history.values % 3)


def test_a_random_batch_goes_forward_in_time() -> None:
    batch = random_batch(torch.tensor([5, 0, 30]), num_users=3, num_items=9, num_categories=2)
    assert batch.timestamp is not None
    assert batch.history_timestamp is not None
    for index in (0, 2):
        begin, end = batch.history.offsets[index : index + 2]
        times = [*batch.history_timestamp.values[begin:end].tolist(), int(batch.timestamp[index])]
        assert times == sorted(times)
