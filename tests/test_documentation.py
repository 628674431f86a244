"""What README and docs show runs, and the site builds."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_HERE = [page for page in PAGES if page.parent.name != "libraries"]  # those have a test of their own


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_of_a_page_runs(page: Path) -> None:
    """One after the other, as a reader would."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        if "deepctr_torch" in block and find_spec("deepctr_torch") is None:
            pytest.skip("deepctr-torch is not installed")
        exec(block, names)


def test_the_readme_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = blocks(ROOT / "README.md")
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["pooled"].shape == (3, 64)
    assert not names["pooled"][1].any()
    if find_spec("deepctr_torch") is not None:
        exec(second, names)
        assert "AttentionSequencePoolingLayer" in capsys.readouterr().out


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="mkdocs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "z_1 = W_1 [q, k_t, q-k_t, q \\odot k_t]" in api
    assert ":math:" not in api
