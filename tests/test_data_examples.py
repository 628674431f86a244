"""Examples: what is in a history, what is not, and how the log is cut."""

import itertools

import pytest
import torch

from recattn.data import Interactions


def random_log(seed: int = 0, rows: int = 400) -> Interactions:
    """Few users and few timestamps, so that ties abound; every seventh user or so has done nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> torch.Tensor:
        return torch.randint(0, high, (rows,), generator=generator)

    user, item = draw(12), draw(30)
    rating = draw(5) + 1.0
    return Interactions.from_log(user, item, rating, draw(25), torch.arange(30) % 4)


def histories_by_loop(
    log: Interactions, history: str, max_history: int | None, positive: float
) -> list[list[int]]:
    rows = list(
        zip(log.user.tolist(), log.item.tolist(), log.rating.tolist(), log.timestamp.tolist(), strict=True)
    )
    out = []
    for user, _, _, timestamp in rows:
        earlier = [
            item
            for other, item, rating, time in rows
            if other == user and time < timestamp and (history == "all" or rating >= positive)
        ]
        out.append(earlier if max_history is None else earlier[-max_history:])
    return out


@pytest.mark.parametrize("history", ["all", "positive"])
@pytest.mark.parametrize("max_history", [None, 1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_histories_are_those_of_a_brute_force_loop(history: str, max_history: int | None, seed: int) -> None:
    log = random_log(seed)
    examples = log.examples(history=history, max_history=max_history, positive=4)
    expected = histories_by_loop(log, history, max_history, positive=4)
    batch = examples.batch(torch.arange(len(log)))
    bounds = batch.history.validate().offsets.tolist()
    found = [batch.history.values[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert found == expected
    assert examples.history_lengths().tolist() == [len(h) for h in expected]
    assert torch.equal(batch.history_category.values, batch.history.values % 4)
    assert torch.equal(batch.category, batch.item % 4)
    assert batch.label.tolist() == (log.rating >= 4).float().tolist()
    assert batch.timestamp.tolist() == log.timestamp.tolist()


def test_what_is_in_a_history_comes_with_its_time_and_whether_it_was_liked() -> None:
    # Items count up with the rows of the log, so an item tells the row.
    generator = torch.Generator().manual_seed(1)
    user, time = (torch.randint(0, 4, (50,), generator=generator).sort().values for _ in range(2))
    rating = torch.randint(1, 6, (50,), generator=generator).float()
    log = Interactions.from_log(user, torch.arange(50), rating, time, torch.zeros(50).long())
    batch = log.examples(positive=3, max_history=7).batch(torch.arange(10, 50))
    rows = batch.history.values
    assert torch.equal(batch.history_timestamp.values, time[rows])
    assert torch.equal(batch.history_liked.values, rating[rows] >= 3)


def test_nothing_at_or_after_the_target_s_timestamp_is_in_its_history() -> None:
    # Items count up with time, so an item tells when it was met.
    user = torch.zeros(6, dtype=torch.int64)
    timestamp = torch.tensor([10, 20, 20, 20, 30, 30])
    log = Interactions.from_log(
        user, torch.arange(6), torch.full((6,), 5.0), timestamp, torch.zeros(6).long()
    )
    batch = log.examples().batch(torch.arange(6))
    assert batch.history.lengths.tolist() == [0, 1, 1, 1, 4, 4]
    seen = timestamp[batch.history.values]
    target = timestamp[batch.item][batch.history.segment_ids()]
    assert bool((seen < target).all())


def test_interactions_of_one_timestamp_keep_the_order_of_the_file() -> None:
    item = torch.tensor([3, 1, 2, 0])
    log = Interactions.from_log(torch.zeros(4).long(), item, item.float(), torch.tensor([5, 5, 5, 9]), item)
    assert log.item.tolist() == [3, 1, 2, 0]
    assert log.examples().batch(torch.tensor([3])).history.values.tolist() == [3, 1, 2]


def test_the_split_is_one_cut_in_time_for_all_users() -> None:
    log = random_log()
    examples = log.examples()
    train, test = examples.split(0.25)
    assert len(train) + len(test) == len(log)
    assert int(train.timestamp.max()) < int(test.timestamp.min())
    assert len(test) >= 0.25 * len(log)
    # Without the timestamp at the cut the test part would be too small.
    assert int((test.timestamp > test.timestamp.min()).sum()) < 0.25 * len(log)
    # A test history reaches back over the cut, whole.
    lengths = examples.history_lengths()[examples.timestamp >= test.timestamp.min()]
    assert torch.equal(test.history_lengths(), lengths)
    assert int(lengths.max()) > int(train.history_lengths().min())


def test_training_sees_no_history_of_the_test_period() -> None:
    log = random_log()
    train, test = log.examples().split()
    when = log.timestamp  # of the rows that begin and end index, as no row is left out
    longest = train.end[train.end > train.begin]
    assert bool((when[longest - 1] < test.timestamp.min()).all())


def test_batches_hold_every_example_once_and_a_seed_fixes_their_order() -> None:
    examples = random_log().examples(max_history=4)
    first, again, other = (list(examples.batches(64, seed=seed)) for seed in (3, 3, 4))
    assert [batch.size for batch in first] == [64] * 6 + [16]

    def keys(batches: list) -> list[tuple[int, int, int]]:
        return [
            row
            for batch in batches
            for row in zip(
                batch.user.tolist(), batch.item.tolist(), batch.history.lengths.tolist(), strict=True
            )
        ]

    assert keys(first) == keys(again)
    assert keys(first) != keys(other)
    in_order = keys(list(examples.batches(1000)))
    assert sorted(keys(first)) == sorted(in_order)
    assert in_order == keys([examples.batch(torch.arange(len(examples)))])
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.history.values, two.history.values)


def test_a_batch_moves_to_a_device_whole() -> None:
    batch = random_log().examples().batch(torch.arange(9)).to("meta")
    tensors = (batch.user, batch.item, batch.category, batch.label, batch.history.values)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.history_category.values.device.type == "meta"
    assert batch.history_category.offsets is batch.history.offsets


def test_history_lengths_of_a_log_are_those_of_its_examples() -> None:
    log = random_log()
    assert log.history_lengths().tolist() == [len(h) for h in histories_by_loop(log, "all", None, 4)]
    assert int(log.history_lengths(max_history=3).max()) == 3


def test_bad_arguments_are_named() -> None:
    log = random_log()
    with pytest.raises(ValueError, match="history: expected one of all, positive, got 'liked'"):
        log.examples(history="liked")
    with pytest.raises(ValueError, match="max_history: expected at least 1, or None, got 0"):
        log.examples(max_history=0)
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="test_fraction: expected a fraction"):
            log.examples().split(fraction)
    zeros = torch.zeros(5).long()
    with pytest.raises(ValueError, match="test_fraction: expected a training part"):
        Interactions.from_log(zeros, zeros, zeros.float(), zeros, zeros[:1]).examples().split()
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        log.examples().batches(0)
