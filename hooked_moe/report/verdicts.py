"""The cells on the page: a map of verdicts, rankings by layers, and the tables behind it."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hooked_moe.report.blocks import (
    Block,
    Folded,
    Key,
    KeyEntry,
    Paragraph,
    Section,
    Table,
    TableCell,
    TableRow,
    table_row,
)
from hooked_moe.report.figures.names import FAMILY_TITLES, label
from hooked_moe.report.number_text import bayes_factor, interval, p_value, signed
from hooked_moe.report.verdict_words import VERDICT_WORDS

Row = dict[str, Any]  # of cells.csv

_POPULATION_TITLES = {"all": "every position", "sample": "sampled positions"}
_MOST_LAYERS_WITH_NUMBERS = 12  # beyond, the map shows the marks alone


def verdict_sections(cells: Sequence[Row]) -> Iterable[Section]:
    """One section for each scope and population, all positions first."""
    for scope in dict.fromkeys(row["scope"] for row in cells):
        for population, name in _POPULATION_TITLES.items():
            rows = [row for row in cells if (row["scope"], row["population"]) == (scope, population)]
            if rows:
                title = f"Verdicts: {name}" + ("" if scope == "position" else f", removed in the whole {scope}")
                blocks = _blocks(rows, on_paper=(scope, population) == ("position", "all"))
                yield Section(f"verdicts-{scope}-{population}", title, blocks)


def _blocks(cells: Sequence[Row], on_paper: bool) -> tuple[Block, ...]:
    tables = (
        Folded(f"Table: {FAMILY_TITLES.get(family, family)}", (_table(rows),), on_paper) for family, rows in _by(cells, "family")
    )
    return Paragraph(_unit(cells)), _key(cells), _map(cells), Paragraph(_rule(cells)), *tables


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
    """When a cell is valid, and when it is equivalent to zero."""
    families = ", ".join(
        f"{row['alpha']:g}/{row['n_tests']} for the {FAMILY_TITLES.get(family, family)}"
        for family, (row, *_) in _by(cells, "family")
    )
    return (
        "Agreement rule: the t-test and Wilcoxon's test pass with one sign at the Bonferroni level, "
        f"{families}. A d within \N{PLUS-MINUS SIGN}{cells[0]['equivalence_bound']:g} counts as equivalent to zero, "
        "whatever its p. Power and the d for 0.8 are those of the t-test, at the unit that it tests. The tables have every "
        "number. Their p-values are uncorrected, but for the one of max T: the sign flip over documents that corrects for its "
        "family. More is in cells.csv."
    )


def _key(cells: Sequence[Row]) -> Key:
    verdicts = {row["verdict"] for row in cells}
    return Key(
        tuple(
            KeyEntry(words.mark, verdict, f"{words.name}: {words.meaning}.")
            for verdict, words in VERDICT_WORDS.items()
            if verdict in verdicts
        )
    )


def _map(cells: Sequence[Row]) -> Table:
    layers = sorted({row["layer"] for row in cells})
    numbers = len(layers) <= _MOST_LAYERS_WITH_NUMBERS
    rows = []
    for family, members in _by(cells, "family"):
        rows.append(TableRow(heading=FAMILY_TITLES.get(family, family)))
        for ranking, line in _by(members, "ranking"):
            by_layer = {row["layer"]: row for row in line}
            rows.append(table_row(label(ranking), *(_mark(by_layer.get(layer), numbers) for layer in layers)))
    return Table(("layer", *map(str, layers)), tuple(rows), "map" if numbers else "map deep")


def _mark(row: Row | None, numbers: bool) -> TableCell:
    if row is None:
        return TableCell("")
    words, d = VERDICT_WORDS[row["verdict"]], signed(row["d_position"], 2)
    small = d if numbers and row["verdict"] != "refused" else ""
    return TableCell(words.mark, css=row["verdict"], small=small, title=f"{words.name}, d = {d}")


# Title, the value that tells whether there is anything to show, and how it is shown.
_COLUMNS: tuple[tuple[str, str, Callable[[Row], str | TableCell]], ...] = (
    ("layer", "layer", lambda row: str(row["layer"])),
    ("verdict", "layer", lambda row: TableCell(row["verdict"], css=row["verdict"], badge=True)),
    ("d", "d_position", lambda row: signed(row["d_position"], 3)),
    ("95% interval", "d_position_low", lambda row: interval(row["d_position_low"], row["d_position_high"], 3)),
    ("p, t-test", "p_t", lambda row: p_value(row["p_t"])),
    ("p, Wilcoxon", "p_wilcoxon", lambda row: p_value(row["p_wilcoxon"])),
    ("p, max T", "p_max_t", lambda row: p_value(row["p_max_t"])),
    ("p, TOST", "p_tost", lambda row: p_value(row["p_tost"])),
    ("Spearman", "spearman", lambda row: signed(row["spearman"], 3)),
    ("95% interval", "spearman_low", lambda row: interval(row["spearman_low"], row["spearman_high"], 3)),
    ("BF₁₀", "bf10", lambda row: bayes_factor(row["bf10"])),
    ("BF₊₀", "bf_directional", lambda row: bayes_factor(row["bf_directional"])),
    ("power at 0.2", "power_at_d02", lambda row: f"{row['power_at_d02']:.2f}"),
    ("d for 0.8", "minimal_detectable_d", lambda row: f"{row['minimal_detectable_d']:.3f}"),
)


def _table(cells: Sequence[Row]) -> Table:
    """Every number of the cells; columns that are undefined throughout (the sample has no document) are left out."""
    tested = [row for row in cells if row["verdict"] != "refused"]
    columns = [column for column in _COLUMNS if not all(math.isnan(row[column[1]]) for row in tested)]
    columns = columns or list(_COLUMNS[:2])
    rows = []
    for ranking, line in _by(cells, "ranking"):
        rows.append(TableRow(heading=label(ranking)))
        for row in line:
            if row["verdict"] == "refused":
                rows.append(table_row(str(row["layer"]), TableCell(f"refused: {row['note']}", columns=len(columns) - 1)))
            else:
                rows.append(table_row(*(show(row) for _, _, show in columns)))
    return Table(tuple(title for title, _, _ in columns), tuple(rows), "cells")


def _by(cells: Sequence[Row], column: str) -> list[tuple[str, list[Row]]]:
    """The rows by the value of a column, in the order of their first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in cells:
        groups.setdefault(row[column], []).append(row)
    return list(groups.items())
