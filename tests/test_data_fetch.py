"""fetch_movielens, with a pip that only pretends."""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from recattn.data import fetch_movielens

FILES = {"ml-100k.inter": b"ratings", "ml-100k.item": b"items"}


class FakePip:
    """Stands in for subprocess.run: writes a wheel to where pip was told to, or fails."""

    def __init__(self, files: dict[str, bytes], fails: bool = False) -> None:
        self.files, self.fails = files, fails
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(command))
        if self.fails:
            return subprocess.CompletedProcess(command, 1, "", "noise\n" * 9 + "ERROR: no network here\n")
        wheel = Path(command[command.index("--dest") + 1]) / "recbole-1.2.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("recbole/__init__.py", b"raise SystemExit")
            archive.writestr("recbole/dataset_example/other/ml-100k.inter", b"wrong")
            for name, content in self.files.items():
                archive.writestr(f"recbole/dataset_example/ml-100k/{name}", content)
        return subprocess.CompletedProcess(command, 0, "", "")


def install(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> FakePip:
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_the_data_come_out_of_the_wheel_and_are_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = install(monkeypatch, FakePip(FILES))
    folder = fetch_movielens(tmp_path / "cache")
    assert folder == tmp_path / "cache" / "ml-100k"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert fetch_movielens(tmp_path / "cache") == folder
    assert len(pip.commands) == 1
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "recbole==1.2.1"} <= set(pip.commands[0])
    assert list(folder.parent.iterdir()) == [folder]  # nothing of the download is left


def test_the_default_cache_is_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakePip(FILES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch_movielens() == tmp_path / "xdg" / "recattn" / "ml-100k"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch_movielens() == tmp_path / "home" / ".cache" / "recattn" / "ml-100k"


def test_a_failing_pip_is_quoted_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakePip(FILES, fails=True))
    with pytest.raises(RuntimeError, match=r"(?s)recbole==1\.2\.1.*exit status 1.*ERROR: no network here"):
        fetch_movielens(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_data_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakePip({"ml-100k.inter": b"ratings"}))
    with pytest.raises(RuntimeError, match=r"expected ml-100k\.inter and ml-100k\.item"):
        fetch_movielens(tmp_path)
    assert list(tmp_path.iterdir()) == []
