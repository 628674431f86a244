"""The README's Python runs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_every_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 2
    names: dict[str, Any] = {}
    for block in BLOCKS:
        if "deepctr_torch" in block and find_spec("deepctr_torch") is None:
            pytest.skip("deepctr-torch is not installed")
        exec(block, names)
    assert names["pooled"].shape == (3, 64)
    assert not names["pooled"][1].any()
    assert "AttentionSequencePoolingLayer" in capsys.readouterr().out
