import json
from pathlib import Path

import pytest
import torch

from recattn import cli
from recattn.bench.measure import Measurement
from recattn.bench.plot import plot_scaling
from recattn.bench.scaling import Curve, curves, fit_exponent

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
    assert (eager.lengths, eager.exponents()) == ((16,), (None, None))


def test_a_picture_of_any_provider_is_written(tmp_path: Path):
    some = [
        Curve("recattn", "forward", (16, 32), (1.0, 2.0), (1000, 2000)),
        Curve("another", "forward+backward", (16,), (3.0,), (5000,)),
    ]
    plot_scaling(some, "title", tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(PNG)


def test_profile_writes_a_picture_and_the_records_behind_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--quick", "--device", "cpu", "--distribution", "equal", "--lengths", "16", "4", "8"]
    options += ["--batch", "4", "--dim", "8", "--hidden", "6"]
    assert cli.main(["profile", *options, "--output", str(tmp_path / "results")]) == 0
    assert (tmp_path / "results" / "profile.png").read_bytes().startswith(PNG)
    content = json.loads((tmp_path / "results" / "profile.json").read_text())
    records = content["records"]
    assert [(r["length"], r["mode"], r["provider"]) for r in records] == [
        (length, mode, provider)
        for length in (4, 8, 16)
        for mode in ("forward", "forward+backward")
        for provider in ("recattn", "eager")
    ]
    assert all(r["ms"] > 0 and r["peak_bytes"] > 0 and r["error"] is None for r in records)
    # The concatenation alone makes the memory of eager code proportional to the padded length.
    memory = {(e["provider"], e["mode"]): e["memory"] for e in content["exponents"]}
    assert memory["eager", "forward"] == pytest.approx(1.0, abs=0.1)
    assert "∝ L^" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lengths", "8"], "lengths: expected at least two"),
        (["--lengths", "8", "0"], "--lengths: expected an integer of at least 1, got '0'"),
        (["--batch", "-1"], "--batch"),
        (["--fill", "2"], "fill: expected a fraction"),
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
