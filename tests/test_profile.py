import json
from pathlib import Path

import pytest
import torch

from recattn import cli
from recattn.bench import plot
from recattn.bench.cases import CASES, SWEPT
from recattn.bench.measure import Measurement
from recattn.bench.scaling import AXES, Curve, at, cells, crossovers, curves, ends, fit_exponent, reaches
from recattn.cli.profile import Guard

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measurement(ms: float | None, provider: str = "recattn", mode: str = "forward") -> Measurement:
    peak, error = (1000, None) if ms is not None else (None, "out of memory")
    return Measurement("activation_unit", "c", provider, mode, "cpu", "float32", ms, ms, ms, peak, error)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent: float):
    lengths = [16, 64, 100, 1000]
    assert fit_exponent(lengths, [3.0 * n**exponent for n in lengths]) == pytest.approx(exponent)


def test_the_exponent_is_that_of_the_upper_half():
    lengths = [1, 2, 4, 8, 16, 32]
    assert fit_exponent(lengths, [100, 100, 100, 8, 16, 32]) == pytest.approx(1.0)
    assert fit_exponent([10, 100], [1, 10]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("lengths", "values"), [([1], [1]), ([], []), ([1, 2], [1]), ([1, 2], [0, 1]), ([0, 2], [1, 1])]
)
def test_an_exponent_needs_two_positive_points(lengths: list[int], values: list[float]):
    with pytest.raises(ValueError, match="expected"):
        fit_exponent(lengths, values)


def test_curves_leave_out_what_failed():
    measured = {
        32: [measurement(2.0), measurement(None, "eager")],
        16: [measurement(1.0), measurement(5.0, "eager")],
    }
    recattn, eager = curves(measured)
    assert recattn == Curve("recattn", "forward", (16, 32), (1.0, 2.0), (1000, 1000))
    assert recattn.exponents() == pytest.approx((1.0, 0.0))
    assert (eager.sizes, eager.exponents()) == ((16,), (None, None))
    assert ends(measured, "L") == ["forward: eager stops at L=32: out of memory"]
    assert cells("forward", "ms", measured, [recattn, eager], "L") == [
        ["L", "recattn", "eager"],
        ["16", "1.00", "5.00 (5.0×)"],
        ["32", "2.00", "failed"],
        ["", "∝ L^1.00", ""],
    ]


def test_a_crossover_is_where_the_curves_meet_on_logarithmic_axes():
    flat = Curve("recattn", "forward", (1, 100), (1.0, 1.0), (1, 1))
    (said,) = crossovers([flat, Curve("eager", "forward", (1, 100), (0.1, 10.0), (1, 1))], "L")
    assert said == (
        "forward: eager is faster below L=10, slower above L=10; it takes 0.1× to 10× the time of recattn"
    )
    (said,) = crossovers([flat, Curve("eager", "forward", (1, 100), (2.0, 4.0), (1, 1))], "L")
    assert said == "forward: eager is slower everywhere: it takes 2× to 4× the time of recattn"


def test_what_would_take_too_much_memory_is_refused_by_its_growth():
    curve = Curve("eager", "forward", (100, 200), (1.0, 1.0), (2**30, 2**32))  # with the square
    assert curve.forecast_bytes(400) == pytest.approx(2**34)
    guard = Guard([curve], 400, limit=2**33)
    assert guard.refuse("eager", "forward") == "it would take about 16 GiB, over the limit of 8"
    assert guard.refuse("eager", "inference") is None
    assert Guard([curve], 400, limit=2**35).refuse("eager", "forward") is None
    assert Curve("eager", "forward", (100,), (1.0,), (50,)).forecast_bytes(200) == 100


def test_where_memory_ends_is_told_by_its_growth():
    square = Curve("eager", "forward", (100, 200), (1.0, 1.0), (2**28, 2**30))
    flat = Curve("recattn", "forward", (100, 200), (1.0, 1.0), (1000, 1001))
    twice = Curve(
        "twice", "forward", (100, 200), (1.0, 1.0), (2**29 + 2**28, 2**30)
    )  # at least in proportion
    once = Curve("sdpa", "forward", (100,), (1.0,), (1000,))
    assert square.size_of_bytes(2**32) == pytest.approx(400)
    assert flat.size_of_bytes(2**32) is None
    assert reaches([square, flat, once, twice], 2**32, "L") == [
        "forward: by its growth memory comes to 4 GiB at about L=400 (eager), 800 (twice)"
    ]


def test_every_provider_has_a_style_of_its_own_and_a_long_title_has_several_lines():
    assert {name for case in CASES for name in case.providers} <= set(plot.STYLES)
    assert len(set(plot.STYLES.values())) == len(plot.STYLES)
    curve = Curve("recattn", "forward", (16, 32), (1.0, 2.0), (1000, 2000))
    figure = plot.scaling([curve], AXES["length"], "word " * 60 + "\nend", {})
    assert 3 <= len(figure.get_suptitle().splitlines()) <= 6


@pytest.mark.parametrize("op", SWEPT)
def test_every_operator_has_axes_and_names_those_that_it_has_not(op: str):
    for over in AXES:
        if hasattr(SWEPT[op], AXES[over].field):
            assert getattr(at(SWEPT[op], over, 1), AXES[over].field) == 1
        else:
            with pytest.raises(ValueError, match=f"over: expected one of .* for {op}"):
                at(SWEPT[op], over, 1)


def test_a_picture_of_any_provider_is_written_and_goes_into_a_page(tmp_path: Path):
    some = [
        Curve("recattn", "forward", (16, 32), (1.0, 2.0), (1000, 2000)),
        Curve("another", "forward+backward", (16,), (3.0,), (5000,)),
    ]
    figure = plot.scaling(some, AXES["length"], "title", {"forward": {16: 0.1, 32: 0.2}})
    png, svg = plot.save(figure, tmp_path / "new" / "a.png")
    assert png.read_bytes().startswith(PNG)
    assert "roofline" in svg.read_text()
    inline = plot.inline(figure)
    assert inline.startswith("<svg")
    assert "currentColor" in inline
    assert "max-width" in inline.partition(">")[0]
    assert 'width="' not in inline.partition(">")[0].replace("stroke-width", "")
    with pytest.raises(ValueError, match="curves: expected at least one"):
        plot.scaling([], AXES["length"], "title", {})


TINY = ["--quick", "--device", "cpu", "--distribution", "equal", "--batch", "4", "--dim", "8"]


def test_profile_writes_a_picture_a_page_and_the_records_behind_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [*TINY, "--sizes", "16", "4", "8", "--hidden", "6", "--provider", "recattn", "eager"]
    assert cli.main(["profile", *options, "--output", str(tmp_path / "results")]) == 0
    assert (tmp_path / "results" / "profile.png").read_bytes().startswith(PNG)
    assert (tmp_path / "results" / "profile.svg").is_file()
    assert "recattn grows in" in (tmp_path / "results" / "profile.html").read_text()
    content = json.loads((tmp_path / "results" / "profile.json").read_text())
    records = content["records"]
    assert [(r["length"], r["mode"], r["provider"]) for r in records] == [
        (length, mode, provider)
        for length in (4, 8, 16)
        for mode in ("inference", "forward+backward")
        for provider in ("recattn", "eager")
    ]
    assert all(r["ms"] > 0 and r["peak_bytes"] > 0 and r["error"] is None for r in records)
    # The concatenation alone makes the memory of eager code proportional to the padded length.
    memory = {(e["provider"], e["mode"]): e["memory"] for e in content["exponents"]}
    assert memory["eager", "inference"] == pytest.approx(1.0, abs=0.1)
    assert "∝ L^" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("op", "over", "sizes"),
    [
        ("target_attention", "candidates", ["1", "3"]),
        ("self_attention", "fill", ["0.5", "1"]),
        ("attentional_gru", "batch", ["2", "4"]),
        ("pairwise_pool", "fields", ["3", "5"]),
    ],
)
def test_profile_varies_any_size_of_any_operator(op: str, over: str, sizes: list[str], tmp_path: Path):
    options = [*TINY, "--op", op, "--over", over, "--sizes", *sizes, "--length", "6", "--mode", "inference"]
    assert cli.main(["profile", *options, "--provider", "recattn", "eager", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"profile-{op}-{over}.json").read_text())
    assert [r["error"] for r in content["records"]] == [None] * 4
    assert sum("inference: eager is" in line for line in content["findings"]) == 1


def test_profile_stops_a_provider_at_the_limit_of_memory(tmp_path: Path):
    options = [*TINY, "--sizes", "64", "512", "--mode", "inference", "--provider", "recattn", "eager"]
    assert cli.main(["profile", *options, "--memory-limit", "0.001", "--output", str(tmp_path)]) == 0
    findings = json.loads((tmp_path / "profile.json").read_text())["findings"]
    assert any("eager stops at L=512: MemoryError: it would take about" in line for line in findings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "8"], "sizes: expected at least two"),
        (["--sizes", "8", "0"], "sizes: expected at least two different ones"),
        (["--sizes", "8", "9.5"], "whole but for fill"),
        (["--batch", "-1"], "--batch"),
        (["--fill", "2"], "fill: expected a fraction"),
        (["--over", "fields"], "over: expected one of length, batch, candidates, fill"),
        (["--provider", "liger"], "provider: expected some of recattn"),
        (["--memory-limit", "0"], "memory-limit: expected a positive size"),
    ],
)
def test_profile_names_the_argument_that_is_wrong(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["profile", "--quick", *options, "--output", str(tmp_path)]
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert said in capsys.readouterr().err
