import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from recattn import cli
from recattn.bench.measure import RECORD
from recattn.bench.task import Prepared
from recattn.bench.tasks import activation_unit

VOID = {"meta", "link", "br", "img"}


def raising(inputs: activation_unit.Inputs) -> Prepared:
    raise RuntimeError(f"no kernel for D={inputs.case.dim}")


class Page(HTMLParser):
    """Checks that tags match, and collects what a page would have to load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and v[0] != "#"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_bench_writes_records_tables_a_page_and_a_history_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(activation_unit.PROVIDERS, "raising", raising)
    command = ["bench", "--quick", "--case", "small", "--provider", "recattn", "eager", "raising"]
    command += ["--dtype", "bfloat16", "--device", "cpu"]
    results = tmp_path / "results"
    files = ["--json", str(tmp_path / "a" / "b.json"), "--output", str(results)]
    assert cli.main([*command, *files]) == 0
    records = json.loads((tmp_path / "a" / "b.json").read_text())
    assert [tuple(record)[: len(RECORD)] for record in records] == [RECORD] * 6
    assert records[0]["faster_by"] == records[1]["faster_by"] > 0
    assert records[0]["roofline"] > 0
    assert [record["error"] is None for record in records] == [True, True, False] * 2
    assert {record["dtype"] for record in records} == {"bfloat16"}
    assert json.loads((results / "bench.json").read_text()) == records
    said = capsys.readouterr().out
    page = (results / "bench.html").read_text()
    for text in (said, (results / "bench.md").read_text(), page):
        assert "small: B=256, L=20" in text
        assert "small, raising, inference, forward+backward: RuntimeError: no kernel for D=16" in text
        assert "Against the fastest other provider" in text
    parsed = Page(page)
    assert parsed.loaded == []
    assert {"svg", "table"} <= parsed.seen
    assert "prefers-color-scheme: dark" in page
    assert (results / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "bench.svg").read_text().startswith("<?xml")
    (run,) = map(json.loads, (results / "history.jsonl").read_text().splitlines())
    assert len(run["records"]) == 6
    assert {"time", "command", "commit", "machine"} <= set(run)
    history = ["--compare", str(results / "history.jsonl"), "--history", str(tmp_path / "h.jsonl")]
    assert cli.main([*command, *history]) == 0
    assert "Against " in capsys.readouterr().out
    assert (tmp_path / "h.jsonl").is_file()


@pytest.mark.usefixtures("one_thread")
def test_bench_reads_a_log_from_a_folder(tmp_path: Path):
    ratings = "".join(f"{u},{t * 7 % 9},4.0,{t}\n" for t, u in enumerate(list(range(20)) * 30))
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings)
    movies = "".join(f"{i},title,Drama\n" for i in range(9))
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + movies)
    arguments = ["--data", str(tmp_path), "--case", "log-last-50", "--provider", "recattn", "--quick"]
    assert cli.main(["bench", *arguments, "--json", str(tmp_path / "out.json")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    assert [(r["case"], r["mode"], r["error"]) for r in records] == [
        ("log-last-50", mode, None) for mode in ("inference", "forward+backward")
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--case huge", "case: expected some of classic"),
        ("--provider liger", "provider: expected some of recattn, .*got 'liger'"),
        ("--case log-whole", "takes its histories from a log"),
        ("--data /nowhere", "path: expected a folder"),
        ("--op softmax", "op: expected some of activation_unit"),
        ("--compare /nowhere.jsonl", "No such file"),
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
