"""The examples of the documentation's pages on libraries run, and fuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from swap_cases import import_or_skip

from recattn.bench.libraries import LIBRARIES

PAGES = Path(__file__).parents[1] / "docs" / "libraries"
MODULES = {
    "deepctr-torch": "deepctr_torch.models.dien",
    "fuxictr": "fuxictr.pytorch.layers",
    "recbole": "recbole.model.layers",
    "torch-rechub": "torch_rechub.models.ranking.din",
    "torch-easy-rec": "tzrec.modules.sequence",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_example_of_a_page_runs(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    import_or_skip(MODULES[library])
    text = (PAGES / f"{library}.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 11
    names: dict[str, Any] = {}
    exec(example, names)
    printed = capsys.readouterr().out
    assert "yes" in printed
    assert "no " not in printed.split("reason")[1]
    if "pooled" in names:
        names["pooled"].sum().backward()


def test_every_library_has_a_page() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == set(LIBRARIES) == set(MODULES)
