"""A page in one file: text, tables and figures in, HTML out. Every text is escaped here, so no caller has to."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from isw_plugin.report.tables import Table

__all__ = ["Picture", "Section", "render"]


@dataclass(frozen=True)
class Picture:
    """A PNG file, what it shows in words for those who cannot see it, and how to read it."""

    file: Path
    alt: str
    note: str
    colors: bool = False  # mean something, so they are not turned in the dark


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what is below it: side by side where there is room, unless ``wide``."""

    title: str
    text: str
    picture: Picture | None = None
    table: Table | None = None
    wide: bool = False


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<h1>$title</h1>
$caption<dl>
$facts</dl>
$file</header>
<nav aria-label="Contents">
<ul>
$contents</ul>
</nav>
<main>
$sections</main>
<footer><p>$footer</p></footer>
</body>
</html>
""")

_SECTION = Template("""\
<section id="$id" aria-labelledby="$id-title">
<h2 id="$id-title">$title</h2>
<p>$text</p>
<div class="$layout">
$content</div>
</section>
""")

_PICTURE = Template("""\
<figure>
<div class="scroll" tabindex="0">
<img class="$kind" src="data:image/png;base64,$data" alt="$alt">
</div>
<figcaption>$note</figcaption>
</figure>
""")

_TABLE = Template("""\
<div class="scroll table" tabindex="0" role="region" aria-label="$caption">
<table>
<caption>$caption</caption>
<thead><tr>$head</tr></thead>
<tbody>
$body</tbody>
</table>
</div>
<p class="files">$file</p>
""")

_STYLE = """\
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #595959; --line: #d0d0d0; --back: #fff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #a8a8a8; --line: #444; --back: #16181c; --card: #22252b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 0 0 .25rem; }
p { max-width: 46rem; margin: .25rem 0 1rem; }
a { color: inherit; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); gap: .5rem;
  margin: 1rem 0; }
dl div { background: var(--card); border-radius: .5rem; padding: .5rem .75rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-weight: 600; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: 0 0 1rem; padding: 0; }
section { border-top: 1px solid var(--line); padding: 1.25rem 0; }
.pair, .wide { display: grid; gap: 1.5rem; align-items: start; }
.pair > *, .wide > * { min-width: 0; }
figure { margin: 0; }
img { display: block; width: auto; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .5rem; }
@media (prefers-color-scheme: dark) { img { filter: brightness(.85); }
  img.chart { filter: invert(.9) hue-rotate(180deg); } }
figcaption, footer { color: var(--soft); font-size: .85rem; }
figcaption { margin-top: .25rem; }
.files { margin: .25rem 0 0; font-size: .85rem; }
.scroll { overflow-x: auto; }
.table { overflow-y: auto; max-height: 40rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { color: var(--soft); padding-bottom: .25rem; text-align: left; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 400; min-width: 6rem; }
thead th { background: var(--back); position: sticky; top: 0; vertical-align: bottom; }
@media (max-width: 36rem) { figcaption::after { content: " Tap the figure to enlarge it; then it scrolls sideways."; }
  .scroll:focus img { max-width: none; width: 48rem; } }
@media (max-width: 40rem) { dl { grid-template-columns: repeat(auto-fit, minmax(min(9rem, 100%), 1fr)); } }
@media (min-width: 62rem) { .pair { grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); } }
@media print { .scroll, .table { max-height: none; overflow: visible; } section { break-inside: avoid; } }
"""


def render(
    title: str,
    caption: str,
    facts: Mapping[str, str],
    sections: Mapping[str, Section],
    footer: str = "",
    values: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML that needs no other file; its tables can be saved from it as CSV.

    Args:
        facts: Name -> value, shown on top.
        sections: Id (letters, digits, dashes) -> section, in order.
        values: All numbers as JSON values, to be saved from the page.
    """
    return _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        caption=f"<p>{escape(caption)}</p>\n" if caption else "",
        facts="".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>\n" for k, v in facts.items()),
        contents="".join(
            f'<li><a href="#{escape(id_)}">{escape(section.title)}</a></li>\n' for id_, section in sections.items()
        ),
        sections="".join(_section(id_, section) for id_, section in sections.items()),
        file=f"<p>{_file('report.json', 'application/json', json.dumps(values, indent=1))}</p>\n" if values else "",
        footer=escape(footer),
    )


def _section(id_: str, section: Section) -> str:
    content = (_picture(section.picture) if section.picture else "") + (
        _table(section.table, id_) if section.table else ""
    )
    return _SECTION.substitute(
        id=escape(id_),
        layout="wide" if section.wide else "pair",
        title=escape(section.title),
        text=escape(section.text),
        content=content,
    )


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode()
    return _PICTURE.substitute(
        data=data, kind="colors" if picture.colors else "chart", alt=escape(picture.alt), note=escape(picture.note)
    )


def _table(table: Table, id_: str) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "".join(_row(row) for row in table.rows)
    lines = io.StringIO()
    csv.writer(lines).writerows([table.columns, *table.rows])
    file = _file(f"{id_}.csv", "text/csv", lines.getvalue())
    return _TABLE.substitute(caption=escape(table.caption), head=head, body=body, file=file)


def _file(name: str, kind: str, content: str) -> str:
    """A link that saves a file, which is within the page."""
    data = base64.b64encode(content.encode()).decode()
    return f'<a download="{escape(name)}" href="data:{kind};charset=utf-8;base64,{data}">{escape(name)}</a>'


def _row(row: Sequence[str]) -> str:
    name, *cells = (escape(cell) for cell in row)
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
