"""What the report's HTML is made of: tables, values, and the page around them with its style sheet.

The page is one file without scripts that loads nothing; it fits a phone, and paper.
"""

import html
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from hooked_moe.cell_text import DASH


def html_page(title: str, sections: Iterable[str]) -> str:
    """The whole file; `title` is text already escaped."""
    return PAGE.format(title=title, style=STYLE, body="\n".join(sections))


def html_table(columns: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


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
            rows.append(f"<tr><td>{html.escape(prefix)}</td><td>{html.escape(text)}</td></tr>")

    walk("", value)
    return f'<div class="scroll"><table class="pairs"><tbody>{"".join(rows)}</tbody></table></div>'


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; font-family: ui-monospace, Menlo, Consolas, monospace; }
p { max-width: 46rem; }
section, figure { margin: 2.6rem 0 0; }
.headline { font-size: 1.1rem; border-left: .25rem solid #D55E00; padding-left: .9rem; }
.headline p { margin: 0; } .headline ul { margin: .7rem 0 0; padding-left: 1.2rem; max-width: 45rem; }
.absent { color: #666; font-style: italic; }
picture, img { display: block; width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #444; margin-top: .4rem; max-width: 52rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .55rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1.5px solid #333; font-weight: 600; }
tbody tr:last-child td { border-bottom: 1px solid #999; }
th:first-child, td:first-child, .word, .cells th:nth-child(6), .words th, .words td, .pairs td { text-align: left; }
.group th { text-align: left; border-bottom: 0; border-top: 1px solid #ccc; padding-top: .5rem; }
.plain th { white-space: normal; vertical-align: bottom; }
.words td:last-child, .pairs td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
.words td, .pairs td { vertical-align: top; }
.positive, .negative, .tests_disagree { font-weight: 600; }
.positive { color: #00543f; } .negative { color: #8a3c00; } .tests_disagree { color: #00497a; } .not_detected { color: #666; }
@media (max-width: 600px) { body { padding: 1rem .8rem 3rem; } h1 { font-size: 1.3rem; } .headline { font-size: 1rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  .scroll { overflow: visible; } table { font-size: 7.2pt; } th, td { padding: .1rem .3rem; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } thead { display: table-header-group; }
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
