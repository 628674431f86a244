import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from recattn.bench import peers, report
from recattn.bench.cases import CASES, OPERATORS, SWEPT, check_providers, default_providers, select_cases
from recattn.bench.histories import SCALED_LOG
from recattn.bench.measure import RECORD, Inaccurate, measure, verified
from recattn.bench.roofline import Peaks
from recattn.bench.task import Case, Prepared, Setting, Task, Work
from recattn.bench.tasks import activation_unit
from recattn.bench.tasks.activation_unit import ActivationUnit, make_inputs
from recattn.bench.tasks.attentional_gru import AttentionalGRU
from recattn.bench.timing import HostMeter
from recattn.data import Interactions

CPU = Setting(torch.device("cpu"))
DOUBLE = replace(CPU, dtype=torch.float64)
TINY = ActivationUnit("tiny", batch=8, max_length=6, dim=4, hidden=(5, 3), fill=0.5)
QUICK = {"budget": 0.0, "rounds": (1, 1)}
SMALL = {"batch": 6, "max_length": 5, "dim": 8, "fields": 5}


def shrunk(case: Case) -> Case:
    """The case at small sizes."""
    sizes: dict[str, object] = {name: size for name, size in SMALL.items() if hasattr(case, name)}
    if getattr(case, "candidates", 1) > 1:
        sizes["candidates"] = 3
    if case.op == "activation_unit":
        sizes["hidden"] = (6, 4)
    if hasattr(case, "lengths"):
        sizes["lengths"] = "uniform"  # with empty histories
    return replace(case, **sizes)


def task_with(**providers) -> Task:
    """Providers of the tiny case, as functions of its inputs."""
    inputs, task = make_inputs(TINY, CPU), TINY.task(CPU)
    return replace(task, providers={name: lambda p=p: p(inputs) for name, p in providers.items()})


def raising(_) -> Prepared:
    raise RuntimeError("no kernel for D=4")


def inexact(inputs) -> Prepared:
    call = activation_unit.eager(inputs)
    return call._replace(forward=lambda: call.forward() * 1.01)


def undefined(inputs) -> Prepared:
    call = activation_unit.eager(inputs)
    return call._replace(forward=lambda: call.forward() * torch.nan)


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
        assert {"small", "small-full"} <= {case.name for case in quick}
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_operator_has_cases_with_recattn_and_eager_code_among_the_providers():
    assert len({case.op for case in CASES}) == len(OPERATORS)
    assert all({"recattn", "eager"} <= set(case.providers) for case in CASES)
    assert set(SWEPT) == {case.op for case in CASES} - {"model"}


def test_cases_by_name_must_exist_and_have_their_log():
    assert [c.name for c in select_cases(["wide", "small"], from_log=False, quick=True)] == ["wide", "small"]
    assert {c.op for c in select_cases(None, ["self_attention"], from_log=False, quick=False)} == {
        "self_attention"
    }
    with pytest.raises(ValueError, match=r"case: expected some of classic, .* got 'clasic'"):
        select_cases(["clasic"], from_log=False, quick=False)
    with pytest.raises(ValueError, match="'log-whole' takes its histories from a log"):
        select_cases(["log-whole"], from_log=False, quick=False)
    with pytest.raises(ValueError, match=r"op: expected some of activation_unit, .* got 'softmax'"):
        select_cases(None, ["softmax"], from_log=False, quick=False)
    with pytest.raises(ValueError, match=r"provider: expected some of recattn, .* got 'liger'"):
        check_providers(["liger"], CASES)


def test_inputs_are_the_same_for_a_seed_up_to_their_dtype():
    single, double = (make_inputs(TINY, setting) for setting in (CPU, DOUBLE))
    assert torch.equal(single.keys.values.double(), double.keys.values)
    assert torch.equal(single.weights[0].double(), double.weights[0])
    assert not torch.equal(single.query, make_inputs(TINY, replace(CPU, seed=1)).query)


def test_padding_is_zero_and_masked():
    inputs = make_inputs(TINY, CPU)
    assert inputs.padded.shape == (8, 6, 4)
    assert torch.equal(inputs.padded[inputs.mask], inputs.keys.values)
    assert not inputs.padded[~inputs.mask].any()


def test_histories_of_a_log_are_its_own_with_one_embedding_per_item():
    log = log_of(users=20, items=9)
    setting = replace(CPU, log=log)
    case = replace(TINY, batch=200, lengths="log", max_length=5)
    inputs = make_inputs(case, setting)
    assert set(inputs.keys.lengths.tolist()) <= set(log.history_lengths(5).tolist())
    assert inputs.keys.lengths.max() == 5
    assert len(inputs.keys.values.unique(dim=0)) <= 9
    whole = make_inputs(replace(case, max_length=None), setting)
    assert whole.max_length == whole.keys.lengths.max() > 5
    with pytest.raises(ValueError, match="log: expected the interactions"):
        make_inputs(case, CPU)


def test_lengths_like_those_of_a_log_are_scaled_to_the_longest():
    log = log_of(12, 5)
    case = replace(TINY, batch=200, max_length=64, lengths=SCALED_LOG)
    lengths = make_inputs(case, replace(CPU, log=log)).keys.lengths
    real = log.history_lengths()
    assert set(lengths.tolist()) <= {math.ceil(n * 64 / int(real.max())) for n in real.tolist()}
    assert lengths.max() == 64
    with pytest.raises(ValueError, match="log: expected the interactions"):
        make_inputs(case, CPU)


def test_cases_of_every_operator_take_histories_of_a_log():
    log = log_of(users=20, items=9)
    for case in CASES:
        if case.needs_log and case.op != "model":
            task = replace(shrunk(case), lengths="log").task(replace(CPU, log=log))
            assert "L=5 (log" in task.description


# ---------------------------------------------------------------- providers


def first_of_each_kind() -> list[Case]:
    """A case per operator and model, and those with candidates and without attention."""
    kinds = {}
    for case in CASES:
        variant = [getattr(case, name, None) for name in ("model", "kind")]
        kinds.setdefault((case.op, *variant, getattr(case, "candidates", 1) > 1), case)
    return [shrunk(case) for case in kinds.values()]


@pytest.mark.parametrize("case", first_of_each_kind(), ids=lambda case: case.name)
def test_providers_agree_with_the_reference_in_every_mode(case: Case):
    offered = default_providers(case, quick=True)
    names = [name for name in offered if not name.startswith(("compile", "fbgemm"))]
    measured = measure(case.task(DOUBLE), HostMeter(), providers=names, **QUICK)
    assert {m.mode for m in measured} == set(case.modes)
    for m in measured:
        if m.error is None:
            assert m.deviation is not None
            assert m.deviation < 1e-12, m
        else:
            assert m.error.startswith("NotImplementedError: "), m
            assert m.provider not in ("recattn", "recattn_padded", "eager"), m


@pytest.mark.slow
@pytest.mark.parametrize("case", first_of_each_kind(), ids=lambda case: case.name)
def test_compiled_providers_agree_with_the_reference(case: Case):
    names = [name for name in case.providers if name.startswith("compile")]
    for m in measure(case.task(DOUBLE), HostMeter(), providers=names, **QUICK):
        assert m.error is None or "NotImplementedError" in m.error, m


def test_a_layer_that_knows_no_padding_agrees_where_there_is_none_and_else_says_so():
    pytest.importorskip("torch_rechub")
    for case, agrees in (
        (TINY, False),
        (replace(TINY, lengths="equal"), True),
        (replace(TINY, lengths="equal", candidates=3), True),
        (replace(TINY, lengths="uniform", normalize="none"), True),  # where items of zeros add nothing
    ):
        for m in measure(case.task(DOUBLE), HostMeter(), providers=["torch_rechub"], **QUICK):
            if agrees:
                assert m.deviation is not None
                assert m.deviation < 1e-12, m
            else:
                assert "it has no mask" in str(m.error), m


@pytest.mark.parametrize("kind", ["agru", "augru"])
def test_a_recurrence_whose_states_are_float32_agrees_in_float32(kind: str):
    pytest.importorskip("fuxictr")
    case = shrunk(AttentionalGRU("tiny", kind=kind))
    rows = measure(case.task(CPU), HostMeter(), providers=["fuxictr"], **QUICK)
    assert [m.error for m in rows] == [None] * 3
    assert all(m.deviation is not None and m.deviation < 1e-6 for m in rows)


def test_libraries_without_a_layer_of_a_kind_have_no_row():
    providers = {kind: set(AttentionalGRU("a", kind=kind).providers) for kind in ("gru", "aigru", "augru")}
    assert "torch_gru" in providers["gru"]
    assert not {"recbole", "fuxictr", "deepctr_torch"} & (providers["gru"] | providers["aigru"])
    assert {"recbole", "fuxictr", "deepctr_torch"} <= providers["augru"]
    assert "torch_gru" not in providers["augru"] | providers["aigru"]


def test_libraries_that_are_not_installed_are_left_out_without_importing_any(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "PROVIDERS", ("fuxictr", "recbole", "torch_easy_rec"))
    monkeypatch.setitem(peers.MODULES, "recbole", "no_such_library")
    monkeypatch.setitem(peers.MODULES, "torch_easy_rec", "json")  # which is there
    monkeypatch.setitem(peers.MODULES, "fuxictr", "antigravity_and_more")
    names = default_providers(TINY, quick=False)
    assert not {"fuxictr", "recbole"} & set(names)
    assert {"recattn", "eager", "torch_easy_rec", "torch_rechub"} <= set(names)


def test_a_quick_run_compiles_no_whole_model():
    model = next(case for case in CASES if case.op == "model")
    assert "compile" not in default_providers(model, quick=True)
    assert "compile" in default_providers(model, quick=False)
    assert "compile" in default_providers(TINY, quick=True)


def test_fbgemm_agrees_with_the_reference():
    pytest.importorskip("fbgemm_gpu")
    for case in (TINY, replace(TINY, candidates=3), replace(TINY, normalize="none")):
        for m in measure(case.task(CPU), HostMeter(), providers=["fbgemm"], **QUICK):
            assert m.error is None, m


@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_unnormalised_attention_agrees_too(normalize: str):
    case = replace(TINY, normalize=normalize, lengths="uniform", batch=16)
    for m in measure(case.task(DOUBLE), HostMeter(), providers=["recattn", "eager", "eager_jagged"], **QUICK):
        assert m.error is None, m


def test_deepctr_torch_is_imported_without_its_version_check():
    pytest.importorskip("deepctr_torch")
    code = """
import sys, threading
def fail(*_): raise SystemExit("a thread was started")
threading.Thread.start = fail
import torch
from recattn.bench.cases import SWEPT
from recattn.bench.task import Setting
SWEPT["activation_unit"].task(Setting(torch.device("cpu"))).providers["deepctr_torch"]()
assert "deepctr_torch.utils" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_library_that_is_missing_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepctr_torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepctr_torch", None)
    (row,) = measure(TINY.task(CPU), HostMeter(), providers=["deepctr_torch"], modes=["inference"], **QUICK)
    assert row.ms is None
    assert 'pip install "recattn[peers]"' in str(row.error)


def test_a_training_step_changes_the_parameters_of_its_own_model_only():
    task = next(shrunk(case) for case in CASES if case.op == "model" and not case.needs_log).task(CPU)
    one, other = task.providers["recattn"](), task.providers["eager"]()
    before = [p.detach().clone() for p in one.leaves]
    one.run("training step")()
    assert not all(torch.equal(a, b) for a, b in zip(before, one.leaves, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, other.leaves, strict=True))


# ---------------------------------------------------------------- measuring


def test_measurements_have_figures_and_records_exactly_the_schema():
    measured = measure(TINY.task(CPU), HostMeter(), providers=["recattn", "eager"], **QUICK)
    assert [(m.mode, m.provider) for m in measured] == [
        (mode, p) for mode in TINY.modes for p in ("recattn", "eager")
    ]
    for m in measured:
        record = m.record()
        assert tuple(record) == RECORD
        assert [record[name] for name in RECORD[:2]] == ["activation_unit", "tiny"]
        assert (record["device"], record["dtype"]) == ("cpu", "float32")
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
    task = task_with(bad=provider, eager=activation_unit.eager)
    bad, good = measure(task, HostMeter(), **QUICK)[:2]
    assert bad.provider == "bad"
    assert (bad.ms, bad.ms_p20, bad.ms_p80, bad.peak_bytes) == (None, None, None, None)
    assert bad.error is not None
    assert re.match(said, bad.error)
    assert good.ms is not None
    assert good.error is None


def test_times_are_compared_round_by_round():
    class Meter(HostMeter):
        """The machine gets ten times slower from round to round; the second provider takes 3 times as long."""

        calls = 0

        def milliseconds(self, run):
            run()
            self.calls += 1
            factor = (1, 3, 3, 1)[(self.calls - 1) % 4]  # there and back
            return 10.0 ** ((self.calls + 1) // 2) * factor

    task = task_with(recattn=activation_unit.recattn, eager=activation_unit.eager)
    peaks = Peaks(1e9, 1e9, "made up")
    measured = measure(task, Meter(), modes=["inference"], budget=0, rounds=(4, 4), peaks=peaks)
    own, eager = measured
    assert (own.relative, eager.relative) == (1.0, pytest.approx(3))
    assert (eager.relative_low, eager.relative_high) == (pytest.approx(3), pytest.approx(3))
    assert report.speedups(measured) == [(own, eager, eager.relative)]
    assert own.roofline == pytest.approx(peaks.ms(Work(own.bytes, own.flops)) / own.ms)


def test_what_is_refused_is_not_run_and_says_why():
    def refuse(provider: str, mode: str) -> str | None:
        return "too much" if (provider, mode) == ("raises", "inference") else None

    task = task_with(raises=raising)
    measured = measure(task, HostMeter(), modes=["inference", "forward"], refuse=refuse, **QUICK)
    assert [m.error for m in measured] == ["MemoryError: too much", "RuntimeError: no kernel for D=4"]


@pytest.mark.parametrize(("kinked", "accepted"), [(False, False), (True, True)])
def test_a_gradient_may_be_wrong_in_single_places_only_where_the_activation_has_a_kink(
    kinked: bool, accepted: bool
):
    case = replace(TINY, batch=100)
    task = replace(case.task(CPU), kinked=kinked)
    expected = task.reference().result("forward+backward")
    flipped = [part.clone() for part in expected]
    flipped[1][3, 2] += 1
    wrong = [part.clone() for part in expected]
    wrong[0][3, 2] += 1
    if accepted:
        assert verified(flipped, expected, task) < 1e-4
    else:
        with pytest.raises(Inaccurate):
            verified(flipped, expected, task)
    with pytest.raises(Inaccurate):
        verified(wrong, expected, task)
