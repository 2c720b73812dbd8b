"""The paper's protocol on the page: a map of its outcomes, rankings by layers, and the tables behind it."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hooked_moe.report.blocks import (
    Block,
    Folded,
    Key,
    Paragraph,
    Section,
    Table,
    TableCell,
    TableRow,
    table_row,
)
from hooked_moe.report.figures.names import FAMILY_TITLES, label
from hooked_moe.report.number_text import interval, p_value, signed
from hooked_moe.report.outcome_words import PROTOCOL_WORDS
from hooked_moe.report.sections import MOST_LAYERS_WITH_NUMBERS, outcome_key

Row = dict[str, Any]  # of cells.csv

_POPULATION_TITLES = {"sample": "sampled positions", "all": "every position"}


def protocol_sections(cells: Sequence[Row]) -> Iterable[Section]:
    """One section for each scope and population, the paper's sample first."""
    for scope in dict.fromkeys(row["scope"] for row in cells):
        for population, name in _POPULATION_TITLES.items():
            rows = [row for row in cells if (row["scope"], row["population"]) == (scope, population)]
            if rows:
                title = f"The paper's tests: {name}" + ("" if scope == "position" else f", removed in the whole {scope}")
                blocks = _blocks(rows, on_paper=(scope, population) == ("position", "sample"))
                yield Section(f"protocol-{scope}-{population}", title, blocks)


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
    """When an outcome is positive, and what the p-values do not say."""
    families = ", ".join(
        f"{row['alpha']:g}/{row['n_tests']} for the {FAMILY_TITLES.get(family, family)}"
        for family, (row, *_) in _by(cells, "family")
    )
    power = (
        " Power is the probability that the t-test detects d = 0.2 at this level, and the d for 0.8 is what it detects with "
        "probability 0.8: a sample that detects nothing shows no absence."
        if cells[0]["population"] == "sample"
        else ""
    )
    return (
        "Agreement rule of the paper: the t-test and Wilcoxon's test pass with one sign at the Bonferroni level, "
        f"{families}.{power} The p-values in the tables are uncorrected, but for the one of max T: the sign flip over documents "
        "that corrects for its family. They say whether experts that a ranking separates differ on other tokens like these, not "
        "whether the criterion is better than a nonsense one, for which the unit is the expert: see the savings. d divides by "
        "the scatter of one realised token, so it does not tell what a pruning costs. More is in cells.csv."
    )


def _key(cells: Sequence[Row]) -> Key:
    outcomes = {row["outcome"] for row in cells}
    return outcome_key({outcome: words for outcome, words in PROTOCOL_WORDS.items() if outcome in outcomes})


def _map(cells: Sequence[Row]) -> Table:
    layers = sorted({row["layer"] for row in cells})
    numbers = len(layers) <= MOST_LAYERS_WITH_NUMBERS
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
    words, d = PROTOCOL_WORDS[row["outcome"]], signed(row["d_position"], 2)
    small = d if numbers and row["outcome"] != "refused" else ""
    return TableCell(words.mark, css=words.css, small=small, title=f"{words.name}, d = {d}")


def _outcome(row: Row) -> TableCell:
    words = PROTOCOL_WORDS[row["outcome"]]
    return TableCell(words.name, css=words.css, badge=True)


# Title, the value that tells whether there is anything to show, and how it is shown.
_COLUMNS: tuple[tuple[str, str, Callable[[Row], str | TableCell]], ...] = (
    ("layer", "layer", lambda row: str(row["layer"])),
    ("outcome", "layer", _outcome),
    ("d", "d_position", lambda row: signed(row["d_position"], 3)),
    ("95% interval", "d_position_low", lambda row: interval(row["d_position_low"], row["d_position_high"], 3)),
    ("p, t-test", "p_t", lambda row: p_value(row["p_t"])),
    ("p, Wilcoxon", "p_wilcoxon", lambda row: p_value(row["p_wilcoxon"])),
    ("p, max T", "p_max_t", lambda row: p_value(row["p_max_t"])),
)
# Of d over single positions, which is what a sample tests; over all positions the tests have documents as their unit.
_POWER_COLUMNS: tuple[tuple[str, str, Callable[[Row], str | TableCell]], ...] = (
    ("power at d = 0.2", "power_at_d02", lambda row: f"{row['power_at_d02']:.2f}"),
    ("d for 0.8", "minimal_detectable_d", lambda row: f"{row['minimal_detectable_d']:.3f}"),
)


def _table(cells: Sequence[Row]) -> Table:
    """Every number of the cells; columns that are undefined throughout (the sample has no document) are left out."""
    tested = [row for row in cells if row["outcome"] != "refused"]
    known = (*_COLUMNS, *_POWER_COLUMNS) if cells[0]["population"] == "sample" else _COLUMNS
    columns = [column for column in known if not all(math.isnan(row[column[1]]) for row in tested)]
    columns = columns or list(_COLUMNS[:2])
    rows = []
    for ranking, line in _by(cells, "ranking"):
        rows.append(TableRow(heading=label(ranking)))
        for row in line:
            if row["outcome"] == "refused":
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
