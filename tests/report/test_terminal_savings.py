"""The table that an audit ends with."""

from dataclasses import replace

import pyarrow as pa
import pytest

from hooked_moe.analysis.cell import Cell, refused_cell
from hooked_moe.analysis.criteria import CRITERIA, PAPER_CRITERIA
from hooked_moe.analysis.rankings import ORACLE, TOKEN_LADDER
from hooked_moe.report.figures.names import label
from hooked_moe.report.lead import lead
from hooked_moe.report.savings import Savings
from hooked_moe.report.terminal_savings import WIDTH, terminal_savings
from tests.support.synthetic_savings import SCENARIOS, savings_rows

N_LAYERS = 3


def cells() -> list[Cell]:
    """The paper's criteria and the control in the sample: detected in layer 2."""
    refused = [
        refused_cell("position", "sample", ranking, layer, 12, 0.05)
        for ranking in (*PAPER_CRITERIA, "routing_weight")
        for layer in range(N_LAYERS)
    ]
    return [replace(cell, n=200, outcome="positive" if cell.layer == 2 else "not_detected") for cell in refused]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_table_fits_the_console_and_names_every_ranking_with_its_outcome(scenario):
    rows = savings_rows(SCENARIOS[scenario], N_LAYERS)
    lines = terminal_savings(pa.Table.from_pylist(rows), cells()).splitlines()
    assert max(map(len, lines)) <= WIDTH
    for ranking in (*CRITERIA, *TOKEN_LADDER, ORACLE):
        total = Savings(rows).total(ranking)
        assert total is not None
        line = next(line for line in lines if line.startswith(f"  {label(ranking)} "))
        assert f" {total['outcome']} " in line
        assert f"{N_LAYERS}" in line.split()[-1]
    verdict = lead(Savings(rows))
    assert verdict is not None
    assert " ".join(lines).startswith(verdict.headline)


def test_the_papers_protocol_comes_after_the_savings_in_a_sentence():
    table = pa.Table.from_pylist(savings_rows(SCENARIOS["helpful"], N_LAYERS))
    text = " ".join(terminal_savings(table, cells()).split())
    assert text.endswith(
        "detects a difference in 4 of 12 cells of its four criteria and 1 of 3 cells of the token's own routing weight."
    )
    assert "The paper's protocol (200 sampled positions;" in text
    assert "The paper's protocol was refused: see cells.csv." in terminal_savings(table, [])


def test_a_table_without_totals_is_refused():
    rows = [row for row in savings_rows(SCENARIOS["helpful"], N_LAYERS) if row["layer"] != "all"]
    with pytest.raises(ValueError, match="no row for all layers together; analyse the run again"):
        terminal_savings(pa.Table.from_pylist(rows), [])
