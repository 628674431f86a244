"""Docstrings write formulas as Sphinx does; this turns them into what MathJax finds in a page."""

import re
from typing import Any

import griffe

_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +\S.*\n|\s*\n)+)", re.MULTILINE)


class RstMath(griffe.Extension):
    """Rewrites `.. math::` blocks and `:math:` roles of all docstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _BLOCK.sub(_display, obj.docstring.value + "\n")
            obj.docstring.value = re.sub(r":math:`([^`]+)`", r"\\\\(\1\\\\)", text).rstrip()


def _display(match: re.Match[str]) -> str:
    formulas = re.split(r"\n\s*\n", match[2].strip())
    lines = ("\\\\[ " + " ".join(formula.split()) + " \\\\]" for formula in formulas)
    return "".join(f"{match[1]}{line}\n\n" for line in lines)
