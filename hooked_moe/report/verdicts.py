"""The cells on the page: a map of verdicts, rankings by layers, and the tables behind it."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hooked_moe.report.cell_text import VERDICTS
from hooked_moe.report.figures.names import FAMILY_TITLES, label
from hooked_moe.report.number_text import bayes_factor, interval, p_value, signed
from hooked_moe.report.page import Section, folded, group_row, html_row, html_table

Row = dict[str, Any]  # of cells.csv

_MEANINGS = {
    "valid": ("valid", "the ranking points at the expert that matters more, by the agreement rule"),
    "reversed": ("reversed", "it points at the one that matters less"),
    "equivalent": ("equivalent to none", "the 90% interval of d lies within the equivalence bound"),
    "undecided": ("undecided", "neither is shown"),
    "refused": ("refused", "inference is not possible; the table says why"),
}
POPULATIONS = {"all": "every position", "sample": "sampled positions"}
_WIDEST_WITH_NUMBERS = 12  # layers; beyond, the map shows the marks alone


def verdict_sections(cells: Sequence[Row]) -> Iterable[Section]:
    """One section for each scope and population, all positions first."""
    for scope in dict.fromkeys(row["scope"] for row in cells):
        for population, name in POPULATIONS.items():
            here = [row for row in cells if (row["scope"], row["population"]) == (scope, population)]
            if here:
                title = f"Verdicts: {name}" + ("" if scope == "position" else f", removed in the whole {scope}")
                yield Section(
                    f"verdicts-{scope}-{population}", title, _body(here, on_paper=(scope, population) == ("position", "all"))
                )


def _body(cells: Sequence[Row], on_paper: bool) -> str:
    parts = [f"<p>{_unit(cells)}</p>", _key(cells), _map(cells), f"<p>{_rule(cells)}</p>"]
    for family, rows in _by(cells, "family"):
        parts.append(folded(f"Table: {FAMILY_TITLES.get(family, family)}", _table(rows), on_paper))
    return "".join(parts)


def _unit(cells: Sequence[Row]) -> str:
    """What a number of the map is."""
    n = max(row["n"] for row in cells)
    unit = (
        f"over {n} positions drawn at random."
        if cells[0]["population"] == "sample"
        else f"over single positions, with {n} documents as the unit of inference."
    )
    undefined = max(row["n_undefined"] for row in cells)
    left_out = f" Up to {undefined:,} positions were left out of a cell for an undefined criterion." if undefined else ""
    return (
        "d: loss change with the highest-ranked active expert removed less that with the lowest-ranked, in standard "
        f"deviations of this difference, {unit}{left_out}"
    )


def _rule(cells: Sequence[Row]) -> str:
    """When a cell is valid, and when it is as good as none."""
    families = ", ".join(
        f"{row['alpha']:g}/{row['n_tests']} for the {FAMILY_TITLES.get(family, family)}"
        for family, (row, *_) in _by(cells, "family")
    )
    return (
        "Agreement rule: the t-test and Wilcoxon's test pass with one sign at the Bonferroni level, "
        f"{html.escape(families)}. d within \N{PLUS-MINUS SIGN}{cells[0]['equivalence_bound']:g} counts as equivalent to none, "
        "whatever its p. Power and the d for 0.8 are of the t-test, at the unit that it tests. The tables have every number, "
        "p-values uncorrected (t-test, Wilcoxon) but for max T, the sign flip over documents that corrects for its family; more "
        "is in <code>cells.csv</code>."
    )


def _key(cells: Sequence[Row]) -> str:
    found = {row["verdict"] for row in cells}
    words = [
        f'<span class="{name}">{VERDICTS[name][0]}</span>{text}: {meaning}.'
        for name, (text, meaning) in _MEANINGS.items()
        if name in found
    ]
    return f'<p class="key">{" ".join(words)}</p>'


def _map(cells: Sequence[Row]) -> str:
    layers = sorted({row["layer"] for row in cells})
    numbers = len(layers) <= _WIDEST_WITH_NUMBERS
    rows = []
    for family, members in _by(cells, "family"):
        rows.append(group_row(FAMILY_TITLES.get(family, family), len(layers) + 1))
        for ranking, line in _by(members, "ranking"):
            found = {row["layer"]: row for row in line}
            marks = "".join(_mark(found.get(layer), numbers) for layer in layers)
            rows.append(f"<tr><td>{label(ranking)}</td>{marks}</tr>")
    return html_table(("layer", *map(str, layers)), rows, "map" if numbers else "map deep")


def _mark(row: Row | None, numbers: bool) -> str:
    if row is None:
        return "<td></td>"
    mark, text = VERDICTS[row["verdict"]][0], _MEANINGS[row["verdict"]][0]
    d = signed(row["d_position"], 2)
    shown = f"{mark} <small>{d}</small>" if numbers and row["verdict"] != "refused" else mark
    return f'<td class="{row["verdict"]}" title="{text}, d = {d}">{shown}</td>'


# Title, the value that tells whether there is anything to show, and how it is shown.
_COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("layer", "layer", lambda row: str(row["layer"])),
    ("verdict", "layer", lambda row: f'<span class="{row["verdict"]}">{row["verdict"]}</span>'),
    ("d", "d_position", lambda row: signed(row["d_position"], 3)),
    ("95% interval", "d_position_low", lambda row: interval(row["d_position_low"], row["d_position_high"], 3)),
    ("p<sub>t</sub>", "p_t", lambda row: p_value(row["p_t"])),
    ("p<sub>W</sub>", "p_wilcoxon", lambda row: p_value(row["p_wilcoxon"])),
    ("p<sub>max T</sub>", "p_max_t", lambda row: p_value(row["p_max_t"])),
    ("p<sub>TOST</sub>", "p_tost", lambda row: p_value(row["p_tost"])),
    ("Spearman", "spearman", lambda row: signed(row["spearman"], 3)),
    ("95% interval", "spearman_low", lambda row: interval(row["spearman_low"], row["spearman_high"], 3)),
    ("BF<sub>10</sub>", "bf10", lambda row: bayes_factor(row["bf10"])),
    ("BF<sub>+0</sub>", "bf_directional", lambda row: bayes_factor(row["bf_directional"])),
    ("power at 0.2", "power_at_d02", lambda row: f"{row['power_at_d02']:.2f}"),
    ("d for 0.8", "minimal_detectable_d", lambda row: f"{row['minimal_detectable_d']:.3f}"),
)


def _table(cells: Sequence[Row]) -> str:
    """Every number of the cells; columns that are undefined throughout (the sample has no document) are left out."""
    tested = [row for row in cells if row["verdict"] != "refused"]
    columns = [column for column in _COLUMNS if not all(math.isnan(row[column[1]]) for row in tested)]
    columns = columns or list(_COLUMNS[:2])
    rows = []
    for ranking, line in _by(cells, "ranking"):
        rows.append(group_row(label(ranking), len(columns)))
        for row in line:
            if row["verdict"] == "refused":
                reason = f'<td colspan="{len(columns) - 1}">refused: {html.escape(row["note"])}</td>'
                rows.append(f"<tr><td>{row['layer']}</td>{reason}</tr>")
            else:
                rows.append(html_row(show(row) for _, _, show in columns))
    return html_table((title for title, _, _ in columns), rows, "cells")


def _by(cells: Sequence[Row], column: str) -> list[tuple[str, list[Row]]]:
    """The rows by the value of a column, in the order of their first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in cells:
        groups.setdefault(row[column], []).append(row)
    return list(groups.items())
