import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recattn import cli
from recattn.bench.cases import Case, Inputs
from recattn.bench.providers import PROVIDERS, Prepared

KEYS = ["op", "case", "provider", "mode", "device", "dtype", "ms", "ms_p20", "ms_p80", "peak_bytes", "error"]


def raising(case: Case, _: Inputs) -> Prepared:
    raise RuntimeError(f"no kernel for D={case.dim}")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_bench_writes_records_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(PROVIDERS, "raising", raising)
    command = ["bench", "--quick", "--case", "small", "--provider", "recattn", "eager", "raising"]
    command += ["--dtype", "bfloat16", "--device", "cpu"]
    files = ["--json", str(tmp_path / "a" / "b.json"), "--output", str(tmp_path / "results")]
    assert cli.main([*command, *files]) == 0
    records = json.loads((tmp_path / "a" / "b.json").read_text())
    assert [list(record) for record in records] == [KEYS] * 6
    assert [record["error"] is None for record in records] == [True, True, False] * 2
    assert {record["dtype"] for record in records} == {"bfloat16"}
    assert json.loads((tmp_path / "results" / "bench.json").read_text()) == records
    said = capsys.readouterr().out
    for text in (said, (tmp_path / "results" / "bench.md").read_text()):
        assert "1 of" in text
        assert "small: B=256, L=20" in text
        assert "small, forward, raising: RuntimeError: no kernel for D=16" in text


@pytest.mark.usefixtures("one_thread")
def test_bench_reads_a_log_from_a_folder(tmp_path: Path):
    ratings = "".join(f"{u},{t * 7 % 9},4.0,{t}\n" for t, u in enumerate(list(range(20)) * 30))
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings)
    movies = "".join(f"{i},title,Drama\n" for i in range(9))
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + movies)
    arguments = ["--data", str(tmp_path), "--case", "log-last-50", "--provider", "recattn", "--quick"]
    assert cli.main(["bench", *arguments, "--json", str(tmp_path / "out.json")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    assert [(r["case"], r["error"]) for r in records] == [("log-last-50", None)] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--case huge", "case: expected some of classic"),
        ("--provider liger", "provider: expected some of recattn, .*got 'liger'"),
        ("--case log-whole", "takes its histories from a log"),
        ("--data /nowhere", "path: expected a folder"),
        ("--device meta", "device: expected cpu or cuda, got meta"),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_bench_names_the_argument_that_is_wrong(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["bench", *arguments.split()]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_the_commands_load_neither_rich_nor_matplotlib_before_they_need_them():
    code = """
import sys, recattn.cli.bench, recattn.cli.profile
print([name for name in ("rich", "matplotlib", "deepctr_torch", "triton") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_without_rich_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert cli.main(["bench", "--quick", "--case", "small"]) == 2
    assert 'pip install "recattn[bench]"' in capsys.readouterr().err
