"""`recattn doctor`: faults are found, and each comes with a cure."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from recattn.cli import doctor, main


def found(findings: object, name: str) -> doctor.Finding:
    return next(finding for finding in findings if finding.name == name)  # type: ignore[attr-defined]


def versions_are(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(doctor, "_version", versions.get)


def test_a_sound_machine_gets_a_report_and_status_0() -> None:
    code = "import sys; from recattn.cli import main; sys.exit(main(['doctor']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert re.search(rf"^ok +torch +{re.escape(torch.__version__)}$", result.stdout, re.MULTILINE)
    assert "PyTorch operations" in result.stdout
    assert "FAULT" not in result.stdout


OPERATORS = ("activation_unit", "target_attention", "self_attention", "attentional_gru", "pairwise_pool")


def test_each_operator_says_what_it_runs_on_each_device_and_why() -> None:
    on_cpu = {finding.name.strip(): finding.found for finding in doctor.operators("cpu")}
    assert tuple(on_cpu) == OPERATORS
    few = "PyTorch operations (not on a GPU; the hidden units of all rows fit in 8 MiB)"
    assert set(on_cpu.values()) == {"PyTorch operations (not on a GPU)", few}
    assert on_cpu["activation_unit"] == few
    on_gpu = {finding.name.strip(): finding.found for finding in doctor.operators("cuda")}
    assert tuple(on_gpu) == tuple(f"{op}, {dtype}" for op in OPERATORS for dtype in ("float32", "bfloat16"))
    assert all("kernels (" in found for found in on_gpu.values())
    assert "short histories: the packed kernels" in on_gpu["activation_unit, bfloat16"]
    listed = [finding.name.strip() for finding in doctor.devices()]
    assert listed[: 1 + len(OPERATORS)] == ["cpu", *OPERATORS]


def test_a_fault_gives_status_1_and_its_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "FAULT torch" in said
    assert "torch: expected at least 2.8; upgrade it" in said


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0"])
def test_a_triton_that_is_not_supported_is_a_fault(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    versions_are(monkeypatch, triton=version)
    assert "3.6 or later, below 3.10" in str(found(doctor.versions(), "triton").cure)


def test_triton_is_missed_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    versions_are(monkeypatch)
    assert found(doctor.versions(), "triton").cure is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "pip install triton" in str(found(doctor.versions(), "triton").cure)


def test_the_interpreter_of_triton_3_6_does_not_go_with_numpy_2_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    versions_are(monkeypatch, triton="3.6.0", numpy="2.4.1")
    assert "numpy<2.4" in str(found(doctor.versions(), "triton").cure)
    versions_are(monkeypatch, triton="3.6.0", numpy="2.3.5")
    assert found(doctor.versions(), "triton").cure is None


def test_the_interpreter_on_a_gpu_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "unset it" in str(found(doctor.settings(), "TRITON_INTERPRET").cure)


def test_kernels_asked_for_where_none_can_run_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(doctor, "requested_backend", lambda: "triton")
    assert "RECATTN_BACKEND=triton" in str(found(doctor.devices(), "cpu").cure)


def test_a_gpu_that_pytorch_does_not_see_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Everywhere:
        def __init__(self, _: str) -> None: ...

        def exists(self) -> bool:
            return True

    monkeypatch.setattr(doctor, "Path", Everywhere)
    assert "a build for CUDA or ROCm" in str(found(doctor.devices(), "gpu").cure)


def test_gpus_that_kernels_do_not_run_on_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/cc")
    old = SimpleNamespace(major=7, minor=5)
    assert "8.0 or later" in str(doctor._gpu_fault(old))
    assert doctor._gpu_fault(SimpleNamespace(major=9, minor=0)) is None
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc" in str(doctor._gpu_fault(SimpleNamespace(major=9, minor=0)))
