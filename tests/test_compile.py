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

TARGETS = ["sm_80", "sm_90", "sm_120", "gfx942"]
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):  # earlier ones crash on some reductions
    TARGETS.append("sm_100")
KERNELS = {
    "activation_unit": {
        "_forward_kernel",
        "candidates_kernel",
        "tokens_kernel",
        "keys_kernel",
        "weights_kernel",
        "_merge_kernel",
    },
    "activation_unit_statistics": {"_statistics_kernel", "tokens_kernel", "weights_kernel"},
    "activation_unit_wide": {
        "score_kernel",
        "_forward_kernel",
        "recompute_kernel",
        "histories_kernel",
        "_merge_kernel",
    },
    "attentional_gru": {
        "scan_kernel",
        "scan_mma_kernel",
        "coefficients_kernel",
        "reverse_kernel",
        "reverse_mma_kernel",
        "gradients_kernel",
        "weights_kernel",
    },
    "pairwise_pool": {"_forward_kernel", "_backward_kernel"},
    "self_attention": {
        "_spans_kernel",
        "_forward_kernel",
        "_queries_kernel",
        "_keys_kernel",
        "_table_kernel",
    },
    "target_attention": {
        "_forward_kernel",
        "_backward_kernel",
        "_join_kernel",
        "_candidates_forward_kernel",
        "_candidates_backward_kernel",
    },
}
PRODUCTS = ["bf16", "fp16", "tf32", "fp32"]


def compile_kernels(
    operator: str, targets: list[str], dtypes: list[str], folder: Path
) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, operator, ",".join(targets), ",".join(dtypes), folder],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    records: list[dict[str, Any]] = json.loads(run.stdout)
    return records


def check(operator: str, products: list[str], folder: Path) -> None:
    records = compile_kernels(operator, TARGETS, products, folder)
    assert {record["target"] for record in records} == set(TARGETS)
    assert {record["kernel"] for record in records} >= KERNELS[operator]
    failed = [record for record in records if record["error"] is not None]
    assert not failed


@pytest.mark.parametrize("operator", KERNELS)
def test_every_kernel_compiles_for_every_target_in_bf16(operator: str, tmp_path: Path) -> None:
    check(operator, ["bf16"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("products", PRODUCTS[1:])
@pytest.mark.parametrize("operator", KERNELS)
def test_every_kernel_compiles_for_every_target(operator: str, products: str, tmp_path: Path) -> None:
    if (operator, products) == ("activation_unit_wide", "fp32"):
        pytest.skip("no wide kernel computes in fp32 at its full accuracy")
    check(operator, [products], tmp_path)
