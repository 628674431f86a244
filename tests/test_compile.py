"""Every kernel, in its default settings, compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from recattn.inspect.calls import CALLS

TARGETS = ["sm_80", "sm_90", "sm_120", "gfx942"]
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):  # earlier ones crash on some reductions
    TARGETS.append("sm_100")
MORE_TARGETS = [*TARGETS, "sm_86", "sm_89"]
OPERATORS = list(dict.fromkeys(call.op for call in CALLS))
DTYPES = ["bf16", "fp16", "tf32", "fp32"]


def compile_kernels(operator: str, targets: list[str], dtype: str, amount: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, operator, ",".join(targets), dtype, amount],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    records: list[dict[str, Any]] = json.loads(run.stdout)
    assert {record["arch"] for record in records} == set(targets)
    return records


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_kernel_compiles_for_every_target_in_bf16(operator: str) -> None:
    records = compile_kernels(operator, TARGETS, "bf16", "few")
    assert not [record for record in records if record["error"] is not None]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_form_of_every_kernel_compiles_for_every_target(operator: str, dtype: str) -> None:
    records = compile_kernels(operator, MORE_TARGETS, dtype, "all")
    assert not [record for record in records if record["error"] is not None]
