"""Where MovieLens-100K comes from."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "recbole==1.2.1"
_MEMBERS = "recbole/dataset_example/ml-100k/"
_NEEDED = ("ml-100k.inter", "ml-100k.item")


def fetch_movielens(cache: Path | None = None) -> Path:
    """MovieLens-100K as a folder for `read_movielens`: downloaded once, then kept.

    The files are those that the RecBole 1.2.1 wheel carries; pip downloads it, and nothing of it is installed
    or run. The data are GroupLens': for research, not for commercial use, and not to be redistributed without
    permission (https://grouplens.org/datasets/movielens/100k/). Publications that use them cite Harper and
    Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.

    Args:
        cache: the folder to keep `ml-100k` in; `$XDG_CACHE_HOME/recattn`, or else `~/.cache/recattn`.

    Raises:
        RuntimeError: if pip cannot download the wheel, or the wheel does not hold the files.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recattn"
    target = Path(cache) / "ml-100k"
    if _complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".ml-100k-") as scratch:
        folder = Path(scratch) / "ml-100k"
        _extract(_download(Path(scratch)), folder)
        try:
            folder.rename(target)
        except OSError:
            # Another process was faster, or something else is in the way.
            if not _complete(target):
                raise
    return target


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _NEEDED)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode or wheel is None:
        said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:]) or "nothing"
        raise RuntimeError(
            f"MovieLens-100K comes inside {REQUIREMENT}, which pip could not download"
            f" (exit status {result.returncode}). pip said:\n{said}"
        )
    return wheel


def _extract(wheel: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = member.removeprefix(_MEMBERS)
            if name != member and name and "/" not in name:
                (folder / name).write_bytes(archive.read(member))
    if not _complete(folder):
        raise RuntimeError(f"{wheel.name}: expected {' and '.join(_NEEDED)} below {_MEMBERS}")
