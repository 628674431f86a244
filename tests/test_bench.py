import math
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from recattn.bench import report
from recattn.bench.cases import CASES, SCALED_LOG, Case, Inputs, make_inputs, select_cases
from recattn.bench.measure import (
    MODES,
    Inaccurate,
    Measurement,
    first_call,
    measure,
    reference_result,
    runnable,
)
from recattn.bench.providers import PROVIDERS, Prepared, eager, recattn
from recattn.bench.timing import HostMeter
from recattn.data import Interactions

CPU = torch.device("cpu")
TINY = Case("tiny", 8, 6, 4, hidden=(5, 3), fill=0.5)
KEYS = ["op", "case", "provider", "mode", "device", "dtype", "ms", "ms_p20", "ms_p80", "peak_bytes", "error"]
QUICK = {"budget": 0.0, "rounds": (1, 1)}


def raising(case: Case, _: Inputs) -> Prepared:
    raise RuntimeError(f"no kernel for D={case.dim}")


def inexact(case: Case, inputs: Inputs) -> Prepared:
    call = eager(case, inputs)
    return Prepared(lambda: call.forward() * 1.01, call.leaves)


def undefined(case: Case, inputs: Inputs) -> Prepared:
    call = eager(case, inputs)
    return Prepared(lambda: call.forward() * torch.nan, call.leaves)


def log_of(users: int, items: int) -> Interactions:
    """User u has u + 1 interactions, each at a time of its own."""
    user = torch.repeat_interleave(torch.arange(users), torch.arange(1, users + 1))
    item = torch.arange(user.numel()) * 7 % items
    return Interactions(
        user,
        item,
        torch.full(user.shape, 4.0),
        torch.arange(user.numel()),
        torch.zeros(items, dtype=torch.int64),
    )


# ---------------------------------------------------------------- cases


def test_quick_is_a_part_of_all_cases_with_and_without_a_log():
    for from_log in (False, True):
        every = select_cases(None, from_log=from_log, quick=False)
        quick = select_cases(None, from_log=from_log, quick=True)
        assert 0 < len(quick) < len(every)
        assert set(quick) < set(every)
    assert len({case.name for case in CASES}) == len(CASES)


def test_cases_by_name_must_exist_and_have_their_log():
    assert [c.name for c in select_cases(["wide", "small"], from_log=False, quick=True)] == ["wide", "small"]
    with pytest.raises(ValueError, match=r"case: expected some of classic, .* got 'clasic'"):
        select_cases(["clasic"], from_log=False, quick=False)
    with pytest.raises(ValueError, match="'log-whole' takes its histories from a log"):
        select_cases(["log-whole"], from_log=False, quick=False)


def test_inputs_are_the_same_for_a_seed_up_to_their_dtype():
    single, double = (make_inputs(TINY, CPU, dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(single.keys.values.double(), double.keys.values)
    assert torch.equal(single.weights[0].double(), double.weights[0])
    other = make_inputs(TINY, CPU, torch.float32, seed=1)
    assert not torch.equal(single.query, other.query)


def test_padding_is_zero_and_masked():
    inputs = make_inputs(TINY, CPU, torch.float32)
    assert inputs.padded.shape == (8, 6, 4)
    assert torch.equal(inputs.padded[inputs.mask], inputs.keys.values)
    assert not inputs.padded[~inputs.mask].any()
    assert inputs.fill == pytest.approx(0.5, abs=0.1)


def test_histories_of_a_log_are_its_own_with_one_embedding_per_item():
    log = log_of(users=20, items=9)
    case = replace(TINY, batch=200, lengths="log", max_length=5)
    inputs = make_inputs(case, CPU, torch.float32, log=log)
    assert set(inputs.keys.lengths.tolist()) <= set(log.history_lengths(5).tolist())
    assert inputs.keys.lengths.max() == 5
    assert len(inputs.keys.values.unique(dim=0)) <= 9
    whole = make_inputs(replace(case, max_length=None), CPU, torch.float32, log=log)
    assert whole.max_length == whole.keys.lengths.max() > 5


def test_a_case_from_a_log_needs_one():
    with pytest.raises(ValueError, match="log: expected the interactions"):
        make_inputs(replace(TINY, lengths="log"), CPU, torch.float32)


# ---------------------------------------------------------------- providers


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "compile" else ()) for name in PROVIDERS]
)
def test_providers_agree_with_the_reference_in_output_and_gradients(name: str, normalize: str):
    if name == "deepctr_torch":
        pytest.importorskip("deepctr_torch.layers")
    case = replace(TINY, normalize=normalize, batch=16, lengths="uniform")
    inputs = make_inputs(case, CPU, torch.float64)
    assert (inputs.keys.lengths == 0).any()
    run = runnable(PROVIDERS[name](case, inputs), "forward+backward", inputs.grad)
    _, deviation = first_call(run, HostMeter(), case, inputs, reference_result(case, inputs))
    assert deviation < 1e-12


def test_deepctr_torch_is_imported_without_its_version_check():
    pytest.importorskip("deepctr_torch")
    code = """
import sys, threading
def fail(*_): raise SystemExit("a thread was started")
threading.Thread.start = fail
from recattn.bench import cases, providers
import torch
case = cases.CASES[4]
providers.deepctr_torch(case, cases.make_inputs(case, torch.device("cpu"), torch.float32))
assert "deepctr_torch.utils" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_library_that_is_missing_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepctr_torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepctr_torch.layers", None)
    inputs = make_inputs(TINY, CPU, torch.float32)
    (row,) = measure(TINY, inputs, {"d": PROVIDERS["deepctr_torch"]}, HostMeter(), modes=["forward"], **QUICK)
    assert row.ms is None
    assert 'pip install "recattn[peers]"' in str(row.error)


# ---------------------------------------------------------------- measuring


def test_measurements_have_figures_and_records_exactly_the_schema():
    inputs = make_inputs(TINY, CPU, torch.float32)
    measured = measure(TINY, inputs, {"recattn": recattn, "eager": eager}, HostMeter(), **QUICK)
    assert [(m.mode, m.provider) for m in measured] == [
        (mode, p) for mode in MODES for p in ("recattn", "eager")
    ]
    for m in measured:
        record = m.record()
        assert list(record) == KEYS
        assert (record["op"], record["case"], record["device"], record["dtype"]) == (
            "activation_unit",
            "tiny",
            "cpu",
            "float32",
        )
        assert 0 < record["ms_p20"] <= record["ms"] <= record["ms_p80"]
        assert record["peak_bytes"] > 0
        assert record["error"] is None
        assert m.deviation is not None
        assert m.deviation < 1e-5
        assert m.first_ms is not None


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        (raising, "RuntimeError: no kernel for D=4"),
        (inexact, r"Inaccurate: \d.\de-02 from the float64 reference, where 1e-04 is the limit"),
        (undefined, "Inaccurate: inf from the float64 reference"),
    ],
)
def test_a_provider_that_fails_or_is_wrong_gets_an_error_and_the_others_figures(provider, said: str):
    inputs = make_inputs(TINY, CPU, torch.float32)
    measured = measure(TINY, inputs, {"bad": provider, "eager": eager}, HostMeter(), **QUICK)
    bad, good = measured[0], measured[1]
    assert bad.provider == "bad"
    assert (bad.ms, bad.ms_p20, bad.ms_p80, bad.peak_bytes) == (None, None, None, None)
    assert bad.error is not None
    assert re.match(said, bad.error)
    assert good.ms is not None
    assert good.error is None


@pytest.mark.parametrize(("activation", "accepted"), [("sigmoid", False), ("relu", True)])
def test_a_gradient_may_be_wrong_in_single_places_only_where_the_activation_has_a_kink(
    activation: str, accepted: bool
):
    case = replace(TINY, batch=100, activation=activation)
    inputs = make_inputs(case, CPU, torch.float32)
    run = runnable(eager(case, inputs), "forward+backward", inputs.grad)
    expected = reference_result(case, inputs)

    def one_flipped() -> list[torch.Tensor]:
        out, query, *others = run()
        query[3, 2] += 1
        return [out, query, *others]

    def one_wrong() -> list[torch.Tensor]:
        out, *others = run()
        out[3, 2] += 1
        return [out, *others]

    if accepted:
        assert first_call(one_flipped, HostMeter(), case, inputs, expected)[1] < 1e-4
    else:
        with pytest.raises(Inaccurate):
            first_call(one_flipped, HostMeter(), case, inputs, expected)
    with pytest.raises(Inaccurate):
        first_call(one_wrong, HostMeter(), case, inputs, expected)


# ---------------------------------------------------------------- reports


def measurement(provider: str, mode: str, ms: float, peak_bytes: int, **more: object) -> Measurement:
    return Measurement(
        "activation_unit", "c", provider, mode, "cpu", "float32", ms, ms * 0.9, ms * 1.1, peak_bytes, **more
    )


MEASURED = [
    measurement("recattn", "forward", 2.0, 2**20),
    measurement("eager", "forward", 13.0, 30 * 2**20, first_ms=5e3, deviation=2e-7),
    Measurement("activation_unit", "c", "compile", "forward", "cpu", "float32", error="no compiler"),
    measurement("recattn", "forward+backward", 4.0, 2**20),
    measurement("eager", "forward+backward", 10.0, 3 * 2**20),
]


def test_ratios_are_to_recattn_in_the_same_mode_and_an_error_has_none():
    text = report.markdown("title", MEASURED)
    table, failures = text.rsplit("\n\n", 1)
    assert failures == "- c, forward, compile: no compiler\n"
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert lines == [
        ["forward", "recattn", "2.00", "1.80–2.20", "", "1.00", "", "", ""],
        [
            "forward",
            "eager",
            "13.00",
            "11.70–14.30",
            "6.50×",
            "30.00",
            "30.00×",
            "2e-07",
            "first call 5.0 s",
        ],
        ["forward", "compile", "failed", "", "", "", "", "", ""],
        ["forward+backward", "recattn", "4.00", "3.60–4.40", "", "1.00", "", "", ""],
        ["forward+backward", "eager", "10.00", "9.00–11.00", "2.50×", "3.00", "3.00×", "", ""],
    ]


def test_a_table_shows_every_measurement():
    console = Console(width=130, file=StringIO())
    console.print(report.table("title", MEASURED))
    text = console.file.getvalue()
    for word in ("title", "forward+backward", "6.50×", "failed", "first call 5.0 s"):
        assert word in text


def test_lengths_like_those_of_a_log_are_scaled_to_the_longest():
    log = log_of(12, 5)
    case = Case("scaled", 200, 64, 8, lengths=SCALED_LOG)
    lengths = make_inputs(case, torch.device("cpu"), torch.float32, log=log).keys.lengths
    real = log.history_lengths()
    assert set(lengths.tolist()) <= {math.ceil(n * 64 / int(real.max())) for n in real.tolist()}
    assert lengths.max() == 64
    with pytest.raises(ValueError, match="log: expected the interactions"):
        make_inputs(case, torch.device("cpu"), torch.float32)
