"""Compiles kernels for GPUs that are not there; run in a process of its own, without the interpreter.

Arguments: an operator, whose `<operator>_cases.run_classic_case` runs it forward and backward; targets; dtypes; a
folder for temporary files. Prints a JSON list, one record per kernel and target. What is compiled is what the launchers
would launch: they are run with recorders in the place of the kernels.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from recattn.kernels import settings
from recorded_launches import recorded_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

import recattn

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def source(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """What Triton would compile for a launch: types, constants, and pointers aligned to 16 bytes."""
    attrs: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            attrs[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, tuple):
            kinds = [kind(v, (*path, i)) for i, v in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, float):
            return "fp32"
        assert isinstance(value, int), value
        return "i32"

    names = kernel.arg_names
    signature = {name: kind(value, (i,)) for i, (name, value) in enumerate(zip(names, args, strict=False))}
    signature |= dict.fromkeys(constants, "constexpr")
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return language(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attrs
    )


def stack_bytes(cubin: bytes, folder: Path) -> int:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[-1])


def main(operator: str, targets: list[str], dtypes: list[str], folder: Path) -> None:
    run_classic_case = importlib.import_module(f"{operator}_cases").run_classic_case
    records = []
    for name in dtypes:
        dtype, products = {
            "fp32": (torch.float32, "highest"),
            "tf32": (torch.float32, "high"),
            "bf16": (torch.bfloat16, "highest"),
            "fp16": (torch.float16, "highest"),
        }[name]
        torch.set_float32_matmul_precision(products)
        for target in targets:
            hip = target.startswith("gfx")
            torch.version.hip = "6.4" if hip else None
            settings.matrix_unit = lambda _, group=target in ("sm_90", "sm_100"): "group" if group else "warp"
            with recorded_launches() as launches, recattn.backend("triton"):
                run_classic_case(dtype)
            gpu = (
                GPUTarget("hip", target, 64)
                if hip
                else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
            )
            for kernel, args, kwargs in launches:
                options = {"num_warps": kwargs["num_warps"]}
                constants = {n: v for n, v in kwargs.items() if n != "num_warps"}
                record = {
                    "kernel": kernel.__name__,
                    "target": target,
                    "dtype": name,
                    "error": None,
                    "stack": None,
                }
                try:
                    compiled = triton.compile(source(kernel, args, constants), target=gpu, options=options)
                    if not hip:
                        record["stack"] = stack_bytes(compiled.asm["cubin"], folder)
                except Exception as error:
                    while error.__cause__ is not None:
                        error = error.__cause__
                    record["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
                records.append(record)
    print(json.dumps(records))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(","), Path(sys.argv[4]))
