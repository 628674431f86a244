"""`recattn bench --library`: whole models of other libraries before and after fuse."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from swap_cases import import_or_skip

from recattn import cli
from recattn.bench import library
from recattn.bench.libraries import LIBRARIES, Sizes
from recattn.bench.timing import HostMeter
from recattn.swap import Report

MODELS = [(name, model) for name, (models, _) in LIBRARIES.items() for model in models]


@pytest.mark.parametrize(("name", "model"), MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_fused_model_learns_the_same(name: str, model: str) -> None:
    try:
        example = LIBRARIES[name][1](model, Sizes(batch=4, longest=6, dim=4, items=20, users=10))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert not torch.is_anomaly_enabled()
    torch.manual_seed(0)
    assert example.loss(example.model).isfinite().all()
    sizes = Sizes(batch=16, longest=8, dim=4, items=50, users=10)
    report, compared = library.compare(
        name, model, sizes, HostMeter(), semantics="exact", budget=0.0, rounds=(1, 1)
    )
    assert all(row.swapped for row in report)
    assert [c.mode for c in compared] == ["predict", "fit step"]
    assert max(c.difference for c in compared) < 1e-4
    assert all((c.faster_by or 0) > 0 for c in compared)
    assert all(c.own_ms > 0 and c.fused_ms > 0 and c.fused_bytes > 0 for c in compared)


@pytest.mark.parametrize(("semantics", "refused"), [("exact", True), ("valid", False)])
@pytest.mark.filterwarnings("ignore")
def test_there_is_no_speed_up_where_the_fused_model_is_to_compute_the_same_and_does_not(
    semantics: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_or_skip("deepctr_torch.models.din")

    def fuse(model: torch.nn.Module, **_: str) -> Report:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        return Report(())

    monkeypatch.setattr(library, "fuse", fuse)
    sizes = Sizes(batch=8, longest=5, dim=4, items=20, users=10)
    _, compared = library.compare(
        "deepctr-torch", "DIN", sizes, HostMeter(), semantics=semantics, budget=0.0, rounds=(1, 1)
    )
    assert all((c.faster_by is None) == refused and c.difference > 1e-3 for c in compared)
    console = Console(width=130, file=StringIO())
    console.print(library.table(compared))
    assert ("differs" in console.file.getvalue()) == refused


@pytest.mark.filterwarnings("ignore")
def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_or_skip("deepctr_torch.models.din")
    calls: list[Any] = []
    original = library.compare

    def compare(*arguments: Any, **options: Any) -> Any:
        calls.append(options["semantics"])
        small = (*arguments[:2], Sizes(batch=8, longest=5, dim=4, items=20, users=10), arguments[3])
        return original(*small, **{**options, "budget": 0.0, "rounds": (1, 1)})

    monkeypatch.setattr(library, "compare", compare)
    threads = torch.get_num_threads()
    command = [
        "bench",
        "--library",
        "deepctr-torch",
        "--model",
        "DIN",
        "--semantics",
        "valid",
        "--device",
        "cpu",
    ]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    assert calls == ["valid"]
    said = capsys.readouterr().out
    assert "AttentionSequencePoolingLayer  yes" in said
    assert "fit step" in said
    records = json.loads((tmp_path / "deepctr-torch.json").read_text())
    assert [(r["library"], r["model"], r["mode"]) for r in records] == [
        ("deepctr-torch", "DIN", "predict"),
        ("deepctr-torch", "DIN", "fit step"),
    ]


def test_another_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert cli.main(["bench", "--library", "fuxictr", "--model", "BST", "--device", "cpu"]) == 2
    torch.set_num_threads(threads)
    assert "model: expected some of DIN, DIEN, got 'BST'" in capsys.readouterr().err
