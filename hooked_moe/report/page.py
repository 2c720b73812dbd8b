"""What the report's HTML is made of: sections, tables, values, and the page around them with its style sheet.

The page is one file without scripts that loads nothing; it fits a phone, and paper.
"""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_moe.report.number_text import DASH


@dataclass(frozen=True)
class Section:
    """A part of the page: the anchor that the contents point to, a title for people, and HTML."""

    anchor: str
    title: str
    body: str


def html_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole file: `lead` (HTML) on top, contents, sections. `title` is plain text."""
    contents = "".join(f'<li><a href="#{one.anchor}">{html.escape(one.title)}</a></li>' for one in sections)
    body = [lead, f'<nav aria-label="contents"><ol>{contents}</ol></nav>']
    body += [f'<section id="{one.anchor}"><h2>{html.escape(one.title)}</h2>{one.body}</section>' for one in sections]
    return PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(body))


def html_table(columns: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """Head and rows (HTML) in a box that scrolls sideways where the screen is narrow."""
    head = "".join(f"<th>{name}</th>" for name in columns)
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def html_row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def group_row(text: str, columns: int) -> str:
    """A row that heads the rows below it."""
    return f'<tr class="group"><th colspan="{columns}">{html.escape(text)}</th></tr>'


def folded(title: str, body: str, on_paper: bool) -> str:
    """A part that opens on a click; printed open, or not at all."""
    kind = "" if on_paper else ' class="screen"'
    return f"<details{kind}><summary>{html.escape(title)}</summary>{body}</details>"


def html_value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return html.escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if np.isnan(value):
        return DASH
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.2e}"


def html_pairs(value: dict[str, Any]) -> str:
    """A nested dictionary as dotted names and values."""
    rows = []

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, inner in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            text = node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
            rows.append(html_row((html.escape(prefix), html.escape(text))))

    walk("", value)
    return f'<div class="scroll" tabindex="0"><table class="pairs"><tbody>{"".join(rows)}</tbody></table></div>'


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: #00497a; }
code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em;
  background: #f3f3f3; padding: .05em .25em; }
section { margin: 2.8rem 0 0; }
figure { margin: 1rem 0 0; }
.summary { border-left: .25rem solid #0072B2; padding-left: .9rem; }
.summary ul { margin: .5rem 0; padding-left: 1.2rem; max-width: 48rem; } .summary li { margin: .35rem 0; }
.summary { margin-top: 1.2rem; } .summary h2 { margin-bottom: .2rem; } .conclusion { border-left-color: #D55E00; }
nav { margin: 1.4rem 0 0; font-size: .9rem; }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0; padding: .5rem 0;
  border: solid #ccc; border-width: 1px 0; }
.absent { color: #555; }
picture, img { display: block; width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #3a3a3a; margin-top: .4rem; max-width: 52rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .5rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1.5px solid #333; font-weight: 600; vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 1px solid #999; }
th:first-child, td:first-child, .cells :is(th, td):nth-child(2), .words th, .words td, .pairs td { text-align: left; }
.group th { text-align: left; border-bottom: 0; border-top: 1px solid #ccc; padding-top: .5rem; }
.plain th { white-space: normal; }
.words td:last-child, .pairs td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
.words td, .pairs td { vertical-align: top; }
.map td { text-align: center; padding: .12rem .3rem; min-width: 2rem; border: 1px solid #fff; }
.map th { text-align: center; border-bottom: 0; }
.map td:first-child, .map .group th { text-align: left; }
.map td:first-child { position: sticky; left: 0; background: #fff; padding-right: .8rem; }
.deep td { padding: .12rem 0; min-width: .9rem; } .deep td:first-child { padding-right: .5rem; }
.deep thead th { font-size: .62rem; padding: 0; }
.map small { font-size: .72rem; }
.valid { background: #b9d7ee; color: #00345a; } .reversed { background: #f6cdb0; color: #6a2a00; }
.equivalent { background: #e4e4e4; color: #333; } .undecided { background: #fdf3c4; color: #4d4200; }
.refused { background: #fff; color: #555; }
.cells { font-size: .78rem; } .cells :is(th, td) { padding: .15rem .34rem; } .cells thead th { white-space: normal; }
.cells span { padding: .05rem .4rem; border-radius: .2rem; }
.key { font-size: .88rem; } .key span { display: inline-block; padding: 0 .45rem; margin-right: .3rem; border-radius: .2rem; }
.bayes .word { white-space: normal; } .bayes td:nth-child(7) { text-align: left; }
.bar { display: inline-block; height: .65rem; background: #0072B2; vertical-align: baseline; }
details { margin: .5rem 0; } summary { cursor: pointer; color: #00497a; font-weight: 600; font-size: .92rem; }
@media (max-width: 600px) {
  body { padding: 1rem .8rem 3rem; } h1 { font-size: 1.3rem; }
  .map td:first-child { white-space: normal; min-width: 7rem; max-width: 9rem; }
  .deep td { padding: .12rem 0; min-width: .9rem; } .deep td:first-child { padding-right: .5rem; }
.deep thead th { font-size: .62rem; padding: 0; }
.map small { display: none; }
  .bayes td:first-child { white-space: normal; min-width: 7rem; }
}
@media print {
  @page { margin: 14mm 12mm; }
  html { font-size: 9.5pt; } body { max-width: none; padding: 0; }
  nav, .screen, #columns { display: none; }
  .scroll { overflow: visible; } table, .cells { font-size: 7pt; } :is(th, td), .cells :is(th, td) { padding: .08rem .25rem; }
  .words td:last-child, .pairs td:last-child { min-width: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
  figure picture { max-width: 88%; }
  figure, tr, li, .map { break-inside: avoid; } h2, h3, summary, .key, .group { break-after: avoid; }
  thead { display: table-header-group; }
  td, th, .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
