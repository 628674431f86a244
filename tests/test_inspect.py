"""recattn inspect: what kernels compile to, for GPUs that are not there."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from recattn.kernels import settings

from recattn import cli
from recattn.inspect.calls import ActivationUnit, SelfAttention, TargetAttention, select_calls
from recattn.inspect.chips import CHIPS
from recattn.inspect.disassembly import amdgcn_instructions, sass_instructions
from recattn.inspect.processes import Failure, in_processes
from recattn.inspect.roofline import bound_of

FIELDS = [
    "op",
    "kernel",
    "arch",
    "dtype",
    "shape",
    "config",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "occupancy",
]
ONE_CALL = """
import sys
from recattn import cli
from recattn.inspect import calls
calls.CALLS = (calls.TargetAttention(D=16),)
{fault}
sys.exit(cli.main(["inspect", *sys.argv[1:]]))
"""
# Tiles of a size whose scores no thread's registers hold.
SPILLING = """
from recattn.kernels import target_attention_settings as settings
launch = settings.QUERY_FORWARD["narrow", "half"]
settings.QUERY_FORWARD["narrow", "half"] = launch._replace(block=1024)
"""
NOT_COMPILING = """
from recattn.kernels import target_attention_settings as settings
launch = settings.QUERY_FORWARD["narrow", "half"]
settings.QUERY_FORWARD["narrow", "half"] = launch._replace(block=48)
"""


NOT_FITTING = """
from recattn.inspect.chips import CHIPS
CHIPS["sm_80"] = CHIPS["sm_80"]._replace(program_shared_memory=512)
"""
UNCOVERED = "calls.CALLS = (calls.ActivationUnit(D=128, hidden=(512, 256), candidates=8),)"
# Those that no call launches.
EVERY_KERNEL = """
import torch
import recattn
from recattn.inspect.calls import CALLS
from recattn.inspect.recording import modules, recorded_launches
left = {id(x): f"{m.__name__}.{name}" for m in modules() for name, x in vars(m).items() if name.endswith("_kernel")}
for precision, dtype in (("high", torch.float32), ("highest", torch.bfloat16)):
    torch.set_float32_matmul_precision(precision)
    for call in CALLS:
        with recorded_launches() as launches, recattn.backend("triton"):
            call.launch(dtype, then=lambda: None)
        for launch in launches:
            left.pop(id(launch.kernel), None)
print(*left.values())
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process whose kernels can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def inspect(folder: Path, *options: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """`recattn inspect` where there is only one call of one operator."""
    files = ["--json", str(folder / "new" / "records.json"), "--html", str(folder / "page.html")]
    return python(ONE_CALL.format(fault=fault), *files, *options)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_clean_kernels_give_records_a_table_and_a_page(tmp_path: Path) -> None:
    run = inspect(tmp_path, "--arch", "sm_80,gfx942")
    records = json.loads((tmp_path / "new" / "records.json").read_text())
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(list(record)[:12] == [*FIELDS, "ok", "error"] for record in records)
    assert {record["arch"] for record in records} == {"sm_80", "gfx942"}
    assert [(record["step"], record["kernel"]) for record in records if record["arch"] == "sm_80"] == [
        ("forward", "_forward_kernel"),
        ("forward", "_join_kernel"),
        ("backward", "_backward_kernel"),
        ("backward", "_join_kernel"),
    ]
    for record in records:
        assert record["ok"], record
        assert record["spill_bytes"] == 0
        assert record["registers"] > 0
        assert 0 < record["occupancy"] <= 1
        assert record["instructions"]["total"] > sum(record["instructions"]["memory"].values()) > 0
        assert record["roofline"]["binds"] == "memory"
        assert record["config"]["num_warps"] >= 1
        assert record["kernel"] in run.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Page(page)
    assert parsed.tags.count("svg") == 2
    assert parsed.tags.count("circle") == 4
    assert not parsed.links
    assert "url(" not in page
    assert page.count("<tr") == len(records) + 4


def test_a_kernel_that_spills_is_caught(tmp_path: Path) -> None:
    run = inspect(tmp_path, "--arch", "sm_80", fault=SPILLING)
    assert run.returncode == 1
    records = json.loads((tmp_path / "new" / "records.json").read_text())
    (bad,) = [record for record in records if not record["ok"]]
    assert bad["kernel"] == "_forward_kernel"
    assert bad["spill_bytes"] > 0
    assert re.search(r"_forward_kernel: \d+ bytes of spills", run.stdout)


def test_a_kernel_that_does_not_compile_is_caught(tmp_path: Path) -> None:
    run = inspect(tmp_path, "--arch", "sm_80", fault=NOT_COMPILING)
    assert run.returncode == 1
    records = json.loads((tmp_path / "new" / "records.json").read_text())
    (bad,) = [record for record in records if not record["ok"]]
    assert bad["registers"] is None
    assert "power of 2" in bad["error"]


def test_a_kernel_that_does_not_fit_is_caught(tmp_path: Path) -> None:
    run = inspect(tmp_path, "--arch", "sm_80", fault=NOT_FITTING)
    assert run.returncode == 1
    assert "_forward_kernel: a program can have 512 bytes of shared memory" in run.stdout


def test_a_call_that_no_kernel_covers_is_told(tmp_path: Path) -> None:
    run = inspect(tmp_path, "--arch", "sm_80", "--dtype", "float32", fault=UNCOVERED)
    assert run.returncode == 0, run.stderr
    assert "no kernel: activation_unit in fp32" in run.stdout
    assert json.loads((tmp_path / "new" / "records.json").read_text()) == []


def test_kernels_in_the_interpreter_cannot_be_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--op", "target_attention"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--arch", "sm_70"],
            "arch: expected some of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, got 'sm_70'",
        ),
        (["--op", "pool"], "op: expected some of activation_unit"),
        (["--dtype", "fp8"], "dtype: expected some of bf16, fp16, tf32, fp32, got 'fp8'"),
        (["--shape", "Z=3"], "shape: expected sizes among B, L, D"),
        (["--shape", "D=wide"], "shape: expected D=64 or the like, got 'D=wide'"),
        (["--shape", "hidden=80,40"], "shape: expected sizes among"),
        (["--workers", "0"], "workers: expected at least 1, got 0"),
    ],
)
def test_inspect_names_the_argument_that_is_wrong(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_shape_changes_the_calls_that_have_such_sizes() -> None:
    calls = select_calls(["activation_unit", "self_attention"], "D=32,hidden=64x16")
    assert ActivationUnit(D=32, hidden=(64, 16)) in calls
    assert SelfAttention(D=32) in calls
    assert len(set(calls)) == len(calls)
    assert ActivationUnit(D=32).shape == "B=1024,L=200,D=32,hidden=80x40,candidates=1"
    assert select_calls(["target_attention"], TargetAttention(L=7, bias=True).shape) == [
        TargetAttention(L=7, bias=True)
    ]


def test_the_calls_launch_every_kernel_that_there_is() -> None:
    run = python(EVERY_KERNEL)
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr


def test_settings_are_those_of_the_gpu_that_is_asked_for() -> None:
    device = torch.device("cpu")
    for chip, architecture, unit in (
        ("sm_80", "ampere", "warp"),
        ("sm_89", "ampere", "warp"),
        ("sm_90", "hopper", "group"),
        ("sm_100", "blackwell", "group"),
        ("sm_120", "geforce", "warp"),
        ("gfx942", "cdna", "warp"),
    ):
        gpu = settings.Gpu(CHIPS[chip].hip, CHIPS[chip].capability // 10, CHIPS[chip].program_shared_memory)
        with settings.choosing_for(gpu):
            assert settings.architecture(device) == architecture
            assert settings.matrix_unit(device) == unit
            assert settings._shared_memory(device) == gpu.shared_memory
            assert (torch.version.hip is not None) == (chip == "gfx942")
    assert torch.version.hip is None


def test_occupancy_is_what_runs_out_first() -> None:
    a100, mi300x = CHIPS["sm_80"], CHIPS["gfx942"]
    assert a100.occupancy(registers=32, shared_bytes=0, num_warps=4) == 1.0
    assert a100.occupancy(registers=255, shared_bytes=0, num_warps=1) == 8 / 64
    assert a100.occupancy(registers=168, shared_bytes=0, num_warps=4) == 12 / 64
    assert (
        a100.occupancy(registers=16, shared_bytes=0, num_warps=1) == 32 / 64
    )  # as many programs as there can be
    assert a100.occupancy(registers=16, shared_bytes=54 << 10, num_warps=8) == 16 / 64
    assert a100.occupancy(registers=16, shared_bytes=200 << 10, num_warps=8) == 0.0
    assert mi300x.occupancy(registers=512, shared_bytes=0, num_warps=1) == 4 / 32
    assert mi300x.occupancy(registers=64, shared_bytes=32 << 10, num_warps=4) == 8 / 32


def test_the_roofline_of_the_activation_unit_is_that_of_its_design() -> None:
    forward, backward = ActivationUnit(B=1, L=1_000_000).work(itemsize=2)
    bound = bound_of(forward, CHIPS["sm_90"], "bf16")
    assert bound.binds == "memory"
    assert 1.0 / bound.microseconds * 1e6 == pytest.approx(26.2e3, rel=0.01)  # 26 G tokens a second
    assert forward.bytes == pytest.approx(128e6, rel=1e-3)
    assert forward.products == 16640e6
    assert backward.products == 3 * forward.products
    assert bound_of(SelfAttention(L=4000).work(2)[0], CHIPS["sm_90"], "bf16").binds != "memory"


def test_instructions_of_nvidia_are_counted_by_what_they_keep_busy() -> None:
    text = """
        code for sm_80
                Function : kernel
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;     /* 0x00000a0000017624 */
                                                                               /* 0x000fc400078e00ff */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;                     /* 0x0000000402047981 */
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.64 [R5], [R2.64] ;  /* 0x0000000402047981 */
        /*0030*/             @UP0  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ; /* 0x0000000402047981 */
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;        /* 0x0000000402047981 */
        /*0050*/               @P1 MUFU.TANH R9, R8 ;                          /* 0x0000000402047981 */
        /*0060*/                   FFMA.FTZ R9, R8, R7, R6 ;                   /* 0x0000000402047981 */
        /*0070*/                   LDSM.16.M88.4 R4, [R20] ;                   /* 0x0000000402047981 */
        /*0080*/                   STL [R1], R4 ;                              /* 0x0000000402047981 */
        /*0090*/                   STG.E.U16 [R2.64], R4 ;                     /* 0x0000000402047981 */
        /*00a0*/                   EXIT ;                                      /* 0x000000000000794d */
    """
    counts = sass_instructions(text)
    assert (counts.total, counts.matrix, counts.special, counts.fma, counts.shared, counts.local) == (
        11,
        2,
        1,
        1,
        1,
        1,
    )
    assert counts.memory == {2: 1, 8: 1, 16: 1}


def test_instructions_of_amd_are_counted_by_what_they_keep_busy() -> None:
    text = """
    .text
kernel:
\ts_load_dwordx4 s[0:3], s[0:1], 0x0
\tbuffer_load_dwordx4 v[0:3], v8, s[0:3], 0 offen
\tglobal_store_short v[0:1], v2, off
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
\tv_exp_f32_e32 v0, v1
\tv_pk_mul_f32 v[0:1], v[2:3], v[4:5]
\tv_add_u32_e32 v0, v1, v2
\tds_read_b128 v[0:3], v9
\tscratch_store_dword off, v0, off
\ts_endpgm
    """
    counts = amdgcn_instructions(text)
    assert (counts.total, counts.matrix, counts.special, counts.fma, counts.shared, counts.local) == (
        10,
        1,
        1,
        1,
        1,
        1,
    )
    assert counts.memory == {2: 1, 16: 1}


def test_a_task_that_dies_takes_nothing_else_with_it(capfd: pytest.CaptureFixture[str]) -> None:
    def dies() -> None:
        faulthandler.disable()
        os.write(2, b"LLVM ERROR: cannot select\n")
        os.abort()

    def raises() -> None:
        raise ValueError("no such layout") from KeyError("a layout")

    results = dict(in_processes([dies, lambda: 7, raises], workers=2))
    assert results[1] == 7
    assert isinstance(results[0], Failure)
    assert results[0] == "the compiler died: SIGABRT LLVM ERROR: cannot select"
    assert results[2] == "KeyError: 'a layout'"
    assert capfd.readouterr() == ("", "")
