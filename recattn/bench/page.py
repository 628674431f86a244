"""Results as one HTML page that needs nothing else, light or dark as its reader has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from recattn.bench.report import COLUMNS, LEFT, Section, failures, rows

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --page: #ffffff; --dim: #5b6472; --line: #d5dae1; --own: #e8f2fa;
        --bad: #b00020 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --page: #14181f; --dim: #9aa4b2; --line: #343b46; --own: #17303f; --bad: #ff8a80 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
       max-width: 78rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.5rem } .summary { font-size: 1.1rem }
.dim, .legend { color: var(--dim) } code, pre { font: 13px/1.5 ui-monospace, monospace } pre { white-space: pre-wrap }
.scroll { overflow-x: auto } figure { margin: 1rem 0 } svg { height: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .18rem .7rem; text-align: right; white-space: nowrap }
thead th { border-bottom: 1px solid var(--line) }
.left { text-align: left } tr.own td { background: var(--own) } tr.bad td, .bad { color: var(--bad) }
tr.mode td { font-style: italic; text-align: left; padding-top: .7rem; color: var(--dim) }
"""


def page(
    title: str,
    summary: Sequence[str],
    pictures: Sequence[str],
    tables: Sequence[str],
    *,
    environment: Mapping[str, str],
    command: str,
    legend: str,
) -> str:
    """The whole page.

    Args:
        summary: what came out, in a sentence, and then in a list.
        pictures: SVG elements.
        tables: HTML, as the functions below make it.
        environment: what is known of the machine.
        command: that made the figures.
    """
    paragraphs = f'<p class="summary">{escape(summary[0])}</p>' + _list(summary[1:], "notes")
    known = "".join(
        f'<tr><td class="left">{escape(name)}</td><td class="left">{escape(value)}</td></tr>'
        for name, value in environment.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{paragraphs}
{"".join(f"<figure>{picture}</figure>" for picture in pictures)}
<p class="legend">{escape(legend)}</p>
{"".join(tables)}
<h2>Where this comes from</h2>
<pre>{escape(command)}</pre>
<div class="scroll"><table><tbody>{known}</tbody></table></div>
</body>
</html>
"""


def section(content: Section) -> str:
    """One case of `recattn bench`."""
    head = "".join(f"<th{_left(column)}>{escape(column)}</th>" for column in COLUMNS)
    body = []
    for mode, group in groupby(content.measured, key=lambda m: m.mode):
        body.append(f'<tr class="mode"><td colspan="{len(COLUMNS)}">{escape(mode)}</td></tr>')
        for m, cells in rows(list(group)):
            kind = ' class="bad"' if m.error else ' class="own"' if m.provider == "recattn" else ""
            figures = "".join(
                f"<td{_left(column)}>{escape(cell)}</td>" for column, cell in zip(COLUMNS, cells, strict=True)
            )
            body.append(f"<tr{kind}>{figures}</tr>")
    return _table(content.title, head, body) + _list(failures(content.measured), "bad")


def table(title: str, cells: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Any other table: the first row is the heading."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in cells[0])
    body = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells[1:]]
    return _table(title, head, body) + _list(notes, "dim")


def _table(title: str, head: str, body: Sequence[str]) -> str:
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<h2>{escape(title)}</h2><div class="scroll">{inner}</div>'


def _list(lines: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _left(column: str) -> str:
    return ' class="left"' if column in LEFT else ""
