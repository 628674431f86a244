import json
from dataclasses import replace
from pathlib import Path

import pytest

from recattn.bench import history
from recattn.bench.measure import Measurement

OLD = Measurement("op", "case", "recattn", "inference", "cpu", "float32", 10.0, 9.5, 10.5, 100)


def written(path: Path, *measured: Measurement) -> list[dict]:
    history.append(path, measured, command="recattn bench", commit="abc", machine="here")
    return history.read(path)


def test_each_run_is_a_line_with_commit_machine_and_command(tmp_path: Path):
    path = tmp_path / "new" / "history.jsonl"
    written(path, OLD)
    runs = written(path, replace(OLD, ms=11.0))
    assert len(path.read_text().splitlines()) == len(runs) == 2
    assert [(run["commit"], run["machine"], run["command"]) for run in runs] == [
        ("abc", "here", "recattn bench")
    ] * 2
    assert [run["records"][0]["ms"] for run in runs] == [10.0, 11.0]


@pytest.mark.parametrize(
    ("new", "factor"),
    [
        (replace(OLD, ms=13.0, ms_p20=12.0, ms_p80=14.0), 1.3),
        (replace(OLD, ms=5.0, ms_p20=4.0, ms_p80=6.0), 0.5),
        (replace(OLD, ms=10.8, ms_p20=10.6, ms_p80=11.0), None),  # apart, but within a tenth
        (replace(OLD, ms=13.0, ms_p20=10.4, ms_p80=14.0), None),  # spreads overlap
        (replace(OLD, case="another", ms=99.0, ms_p20=99.0, ms_p80=99.0), None),
    ],
)
def test_what_moved_is_more_than_a_tenth_with_spreads_apart(
    tmp_path: Path, new: Measurement, factor: float | None
):
    runs = written(tmp_path / "h.jsonl", OLD)
    found = [change.factor for change in history.moved(runs, [new])]
    assert found == ([] if factor is None else [pytest.approx(factor)])


def test_the_latest_run_that_has_a_measurement_counts(tmp_path: Path):
    path = tmp_path / "h.jsonl"
    written(path, replace(OLD, ms=99.0, ms_p20=99.0, ms_p80=99.0))
    written(path, OLD)
    runs = written(path, replace(OLD, case="another"))
    assert list(history.moved(runs, [OLD])) == []


def test_a_failure_that_is_new_or_gone_has_moved(tmp_path: Path):
    failed = replace(OLD, ms=None, ms_p20=None, ms_p80=None, error="MemoryError: no room")
    (change,) = history.moved(written(tmp_path / "a.jsonl", OLD), [failed])
    assert (change.before, change.after) == ("10 ms", "failed (MemoryError: no room)")
    runs = written(tmp_path / "b.jsonl", failed)
    assert [change.after for change in history.moved(runs, [OLD])] == ["10 ms"]
    assert list(history.moved(runs, [failed])) == []


@pytest.mark.parametrize(
    ("new", "factor"),
    [
        ((3.0, 2.9, 3.1), 1.5),
        ((1.0, 0.9, 1.1), 0.5),
        ((2.15, 2.12, 2.18), None),  # apart, but within a tenth
        ((3.0, 2.05, 3.5), None),  # bounds overlap
        ((None, None, None), None),
    ],
)
def test_a_speed_up_moved_if_by_more_than_a_tenth_with_bounds_apart(
    tmp_path: Path, new: tuple[float, float, float], factor: float | None
):
    def with_ratio(relative, low, high):
        return replace(OLD, provider="eager", relative=relative, relative_low=low, relative_high=high)

    runs = written(tmp_path / "h.jsonl", with_ratio(2.0, 1.9, 2.1))
    found = [change.factor for change in history.moved_speedups(runs, [with_ratio(*new)])]
    assert found == ([] if factor is None else [pytest.approx(factor)])
    said = history.compare(tmp_path, runs, [with_ratio(*new)], "here")
    assert ("eager, over recattn: 2.00× -> " in said) == (factor is not None)
    old = [
        {**run, "records": [{k: v for k, v in r.items() if "_low" not in k} for r in run["records"]]}
        for run in runs
    ]
    assert not list(history.moved_speedups(old, [with_ratio(*new)]))


def test_a_comparison_says_what_moved_or_that_nothing_did(tmp_path: Path):
    path = tmp_path / "h.jsonl"
    runs = written(path, OLD)
    assert "No time moved" in history.compare(path, runs, [OLD], "here")
    said = history.compare(path, runs, [replace(OLD, ms=20.0, ms_p20=19.0, ms_p80=21.0)], "there")
    assert "op, case, inference, recattn: 10 ms -> 20 ms, 2.00× slower" in said
    assert "on another machine: here" in said
    assert "Most moved alike, 2.00× in the median" in said
    assert "no runs" in history.compare(path, [], [OLD], "here")


@pytest.mark.parametrize("line", ["no json", "[1]", json.dumps({"records": []})])
def test_a_line_that_is_no_run_is_named(tmp_path: Path, line: str):
    path = tmp_path / "h.jsonl"
    written(path, OLD)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"h\.jsonl, line 2: expected a run of recattn bench"):
        history.read(path)
