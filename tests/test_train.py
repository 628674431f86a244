"""`recattn train`, end to end on a tiny log."""

import builtins
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recattn.cli import main
from recattn.data import Examples, read_movielens
from recattn.models import DIN
from recattn.training import Curve, PeakMemory, predict, train_side_by_side

CPU = torch.device("cpu")
FIGURES = {"loss", "label_loss", "auc", "gauc", "seconds", "peak_bytes"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log in which everyone likes the items of even id, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    rows = ["userId,movieId,rating,timestamp"]
    for time in range(600):
        user, item, noise = torch.randint(0, 20, (3,), generator=generator).tolist()
        rating = 5 if (item % 2 == 0) != (noise == 0) else 2
        rows.append(f"{user},{item},{rating},{time // 3}")
    (tmp_path / "ratings.csv").write_text("\n".join(rows) + "\n")
    genres = "\n".join(f"{i},Title {i},{'Drama' if i < 10 else 'Comedy'}" for i in range(20))
    (tmp_path / "movies.csv").write_text(f"movieId,title,genres\n{genres}\n")
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    size = ["--epochs", "2", "--batch-size", "64", "--dim", "4", "--max-history", "20"]
    return ["train", "--data", str(folder), "--device", "cpu", "--lr", "0.02", *size, *more]


def test_it_trains_both_and_reports_a_figure_per_epoch(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, "--json", str(folder / "out.json"))) == 0
    (report,) = json.loads((folder / "out.json").read_text())
    assert set(report) == {"model", "fused", "eager"}
    assert report["model"] == "din"
    for name in ("fused", "eager"):
        assert set(report[name]) == FIGURES
        assert all(len(figures) == 2 for figures in report[name].values())
        assert all(seconds > 0 for seconds in report[name]["seconds"])
        assert report[name]["loss"][1] < report[name]["loss"][0]
        assert report[name]["auc"][1] > 0.8
    assert report["fused"]["loss"] == pytest.approx(report["eager"]["loss"], rel=1e-3)
    for figure in ("auc", "gauc"):
        assert report["fused"][figure] == pytest.approx(report["eager"][figure], abs=2e-3)
    out = " ".join(capsys.readouterr().out.split())
    assert "fused" in out
    assert "The curves agree" in out


def test_the_loss_of_the_labels_stands_apart_where_there_is_another(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [option if option != "2" else "1" for option in command(folder)]
    assert main([*one, "--model", "dien", "din", "--json", str(folder / "out.json")]) == 0
    dien, din = json.loads((folder / "out.json").read_text())
    for layers in ("fused", "eager"):
        assert din[layers]["label_loss"] == din[layers]["loss"]
        assert 0.3 < dien[layers]["label_loss"][0] < 1 < dien[layers]["loss"][0]
    assert dien["fused"]["label_loss"] == pytest.approx(dien["eager"]["label_loss"], rel=1e-3)
    assert capsys.readouterr().out.count("of labels") == 1


def test_several_models_end_in_one_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = [option if option != "2" else "1" for option in command(folder)]
    assert main([*one, "--model", "dot", "mean", "dot", "--json", str(folder / "out.json")]) == 0
    reports = json.loads((folder / "out.json").read_text())
    assert [report["model"] for report in reports] == ["dot", "mean"]
    gap = reports[0]["fused"]["gauc"][-1] - reports[1]["fused"]["gauc"][-1]
    out = capsys.readouterr().out
    assert "All models" in out
    assert f"{gap:+.4f}" in out


def test_one_of_the_two_can_be_trained_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--json", str(folder / "both.json"))) == 0
    both = json.loads((folder / "both.json").read_text())[0]
    capsys.readouterr()
    assert main(command(folder, "--layers", "eager", "--json", str(folder / "one.json"))) == 0
    (alone,) = json.loads((folder / "one.json").read_text())
    assert set(alone) == {"model", "eager"}
    assert alone["eager"]["loss"] == both["eager"]["loss"]
    assert "agree" not in capsys.readouterr().out


def test_a_seed_fixes_the_curves(folder: Path) -> None:
    def losses(seed: int) -> list[float]:
        assert main(command(folder, "--seed", str(seed), "--json", str(folder / "out.json"))) == 0
        return json.loads((folder / "out.json").read_text())[0]["fused"]["loss"]

    first = losses(1)
    assert losses(1) == first
    assert losses(2) != first


def tiny(folder: Path) -> tuple[DIN, Examples, Examples]:
    log = read_movielens(folder)
    torch.manual_seed(0)
    model = DIN(log.num_users, log.num_items, log.num_categories, dim=4, dropout=0.3)
    return model, *log.examples(max_history=20).split()


def train(models: dict[str, DIN], parts: tuple[Examples, Examples]) -> dict[str, Curve]:
    return train_side_by_side(models, *parts, epochs=1, batch_size=32, lr=0.02, seed=0, device=CPU)


def test_one_model_twice_gives_one_curve_even_with_dropout(folder: Path) -> None:
    model, *parts = tiny(folder)
    curves = train({"one": model, "two": copy.deepcopy(model)}, (parts[0], parts[1]))
    assert curves["one"].loss == curves["two"].loss
    assert curves["one"].auc == curves["two"].auc


def test_curves_differ_where_models_do(folder: Path) -> None:
    model, *parts = tiny(folder)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head[0].weight.mul_(1.5)
    curves = train({"one": model, "two": other}, (parts[0], parts[1]))
    assert curves["one"].loss != pytest.approx(curves["two"].loss, rel=1e-3)


def test_the_verdict_tells_curves_apart() -> None:
    from recattn.cli.train import _verdict

    one = Curve(loss=[0.5], auc=[0.7], gauc=[0.7], seconds=[1.0], peak_bytes=[100])
    two = Curve(loss=[0.5], auc=[0.7], gauc=[0.7], seconds=[3.0], peak_bytes=[400])
    agreement, time, memory = _verdict(one, two)
    assert "curves agree" in agreement
    assert "3.00 times the seconds" in time
    assert "4.00 times the peak memory" in memory
    for field, value in (("loss", 0.501), ("auc", 0.7021), ("gauc", 0.69)):
        changed = copy.deepcopy(two)
        setattr(changed, field, [value])
        assert "DO NOT agree" in _verdict(one, changed)[0]


def test_predictions_are_in_the_order_of_the_examples(folder: Path) -> None:
    model, _, test = tiny(folder)
    together = predict(model, test, len(test), CPU)
    torch.testing.assert_close(predict(model, test, 7, CPU), together)
    rows = torch.arange(len(test)).flip(0)
    torch.testing.assert_close(predict(model, test[rows], 16, CPU), together.flip(0))


def test_peak_memory_is_what_a_stretch_takes_on_top() -> None:
    memory = PeakMemory(CPU)
    held = torch.ones(16 << 20)
    with memory.measured():
        torch.ones(8 << 20).sum()
    if memory.peak is None:
        pytest.skip("this system keeps no peak of the resident set that can be reset")
    assert 31 << 20 <= memory.peak < 44 << 20
    with memory.measured():
        held.sum()
    assert memory.peak < 4 << 20


def test_bad_options_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(folder / "nowhere")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    assert main(command(folder, "--json", str(folder / "nowhere" / "out.json"))) == 2
    assert "--json: expected a file in an existing folder" in capsys.readouterr().err
    assert main(command(folder, "--device", "meta")) == 2
    assert "--device: expected cpu or cuda, got meta" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(command(folder, "--batch-size", "0"))
    assert "expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["rich", "sklearn"])
def test_a_missing_library_names_the_extra(
    folder: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=missing)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(command(folder)) == 2
    assert f'{missing} is not installed; pip install "recattn[bench]"' in capsys.readouterr().err
