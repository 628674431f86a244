"""Sessions against a loop over rows."""

import pytest
import torch
from accelerator import select_rows_with_slack
from torch import Tensor

from recattn.data import Sessions, split_sessions
from recattn.jagged import Jagged, offsets_of

LENGTHS = [0, 7, 1, 0, 30, 5, 0]
GAP = 10


def histories(slack: int = 3, dtype: torch.dtype = torch.int64) -> Jagged:
    generator = torch.Generator().manual_seed(3)
    pauses = [torch.randint(0, 16, (length,), generator=generator) for length in LENGTHS]
    values = torch.cat([*(pause.cumsum(0) for pause in pauses), torch.full((slack,), 10**9)])
    return Jagged(values, offsets_of(torch.tensor(LENGTHS)).to(dtype))


def by_loop(
    timestamp: Jagged, gap: int, max_sessions: int | None, max_length: int | None
) -> list[list[list[int]]]:
    """Per history its sessions, each a list of rows."""
    bounds, times = timestamp.offsets.tolist(), timestamp.values.tolist()
    result = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        sessions: list[list[int]] = []
        for row in range(begin, end):
            if row == begin or times[row] - times[row - 1] > gap:
                sessions.append([])
            sessions[-1].append(row)
        sessions = sessions[-max_sessions:] if max_sessions else sessions
        result.append([session[-max_length:] if max_length else session for session in sessions])
    return result


def nested(sessions: Sessions) -> list[list[list[int]]]:
    rows, offsets, histories = (x.tolist() for x in sessions)
    parts = [rows[begin:end] for begin, end in zip(offsets, offsets[1:], strict=False)]
    return [parts[begin:end] for begin, end in zip(histories, histories[1:], strict=False)]


@pytest.mark.parametrize("max_sessions", [None, 1, 3, 100])
@pytest.mark.parametrize("max_length", [None, 1, 2, 100])
@pytest.mark.parametrize("where", ["cpu", "accelerator"])
def test_sessions_are_those_of_a_loop(
    max_sessions: int | None, max_length: int | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timestamp = histories()
    if where == "accelerator":
        monkeypatch.setattr("recattn.data.sessions.select_rows", select_rows_with_slack)
    sessions = split_sessions(timestamp, GAP, max_sessions=max_sessions, max_length=max_length)
    expected = by_loop(timestamp, GAP, max_sessions, max_length)
    assert nested(sessions) == expected
    Jagged(sessions.rows, sessions.offsets).validate()
    Jagged(sessions.offsets[:-1], sessions.histories).validate()
    count = sum(map(len, expected))
    assert int(sessions.offsets[count:].diff().sum()) == 0  # what is behind the last is empty
    if where == "cpu":
        assert sessions.offsets.shape == (count + 1,)


@pytest.mark.parametrize("gap", [0, 3, 15, 10**6])
def test_a_pause_ends_a_session_where_it_is_longer_than_the_gap(gap: int) -> None:
    timestamp = histories()
    assert nested(split_sessions(timestamp, gap)) == by_loop(timestamp, gap, None, None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_keep_their_dtype(dtype: torch.dtype) -> None:
    for limits in ({}, {"max_sessions": 2, "max_length": 2}):
        sessions = split_sessions(histories(dtype=dtype), GAP, **limits)
        assert sessions.offsets.dtype == sessions.histories.dtype == dtype


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("slack", [0, 2])
def test_no_histories_and_empty_ones_have_no_sessions(batch: int, slack: int) -> None:
    empty = Jagged(torch.zeros(slack, dtype=torch.int64), torch.zeros(batch + 1, dtype=torch.int64))
    for limits in ({}, {"max_sessions": 2, "max_length": 2}):
        sessions = split_sessions(empty, GAP, **limits)
        assert sessions.offsets.tolist() == [0]
        assert sessions.histories.tolist() == [0] * (batch + 1)


def test_on_an_accelerator_nothing_is_counted() -> None:
    def empty(*shape: int) -> Tensor:  # has no contents that could be read
        return torch.empty(shape, dtype=torch.int64, device="meta")

    for limits, rows, count in (
        ({}, 20, 20),
        ({"max_sessions": 2}, 20, 6),
        ({"max_length": 3}, 20, 20),
        ({"max_sessions": 2, "max_length": 3}, 18, 6),
    ):
        sessions = split_sessions(Jagged(empty(20), empty(4)), GAP, **limits)
        assert [tuple(x.shape) for x in sessions] == [(rows,), (count + 1,), (4,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gap": -1}, "gap: expected at least 0, got -1"),
        ({"gap": 1, "max_sessions": 0}, "max_sessions: expected at least 1, got 0"),
        ({"gap": 1, "max_length": 0}, "max_length: expected at least 1, got 0"),
    ],
)
def test_bad_limits_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_sessions(histories(), **options)


def test_timestamps_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"timestamp: expected \[T\], got \[2, 3\]"):
        split_sessions(Jagged(torch.zeros(2, 3), torch.tensor([0, 2])), GAP)
