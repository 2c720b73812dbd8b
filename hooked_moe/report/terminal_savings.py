"""What the criteria save, as a table for a console: the last words of an audit."""

import textwrap
from collections.abc import Sequence

import pyarrow as pa

from hooked_moe.analysis.cells import Cell
from hooked_moe.analysis.rankings import ROUTING_WEIGHT
from hooked_moe.report.figures.names import label
from hooked_moe.report.lead import lead
from hooked_moe.report.number_text import DASH, nats, p_value, share
from hooked_moe.report.savings import FAMILIES, KL, LOSS, Row, Savings, is_measured

WIDTH = 100
_MOST_NAME = 31


def terminal_savings(savings: pa.Table, cells: Sequence[Cell] | None) -> str:
    """savings.csv in 100 columns, by falling saving, with the verdict above it and the paper's protocol below it; `cells` None
    where that was not asked."""
    read = Savings(savings.to_pylist())
    verdict = lead(read)
    if verdict is None:
        raise ValueError("the table of savings has no row for all layers together; analyse the run again")
    first = read.totals(LOSS, FAMILIES)[0]
    lines = [
        *textwrap.wrap(verdict.headline, WIDTH),
        "",
        f"Saved by removing the active expert pruned first instead of one at random ({nats(first['random_cost'])} nats), in % of",
        f"that cost, with a 95% interval over {first['n_documents']:,} documents; p by permutation over experts, corrected",
        f"  {'':<{_MOST_NAME}} {'realised loss':<17} {'expected (KL)':<17} {'p':>6}  {'outcome':<10} in layers",
    ]
    lines += [_line(read, row) for row in read.totals()]
    lines += [_line(read, row) for row in read.totals(LOSS, ("token", "oracle")) if is_measured(row)]
    if cells is not None:
        lines += ["", *textwrap.wrap(protocol_line(cells), WIDTH)]
    return "\n".join(lines) + "\n"


def _line(savings: Savings, row: Row) -> str:
    expected = savings.total(row["ranking"], KL)
    layers = savings.by_layer(row["ranking"])
    alike = sum(layer["outcome"] == row["outcome"] for layer in layers)
    columns = (
        f"{label(row['ranking']):<{_MOST_NAME}}",
        f"{_saving(row):<17}",
        f"{_saving(expected) if expected else DASH:<17}",
        f"{p_value(row['p_family']):>6} ",
        f"{row['outcome']:<10}",
        f"{alike} of {len(layers)}",
    )
    return f"  {' '.join(columns)}"[:WIDTH]


def _saving(row: Row) -> str:
    """ "62% [58, 66]"."""
    if not is_measured(row):
        return f"{DASH:>5}"
    low, high = (share(row[f"saving_share_{end}"]).removesuffix("%") for end in ("low", "high"))
    return f"{share(row['saving_share']):>5} [{low}, {high}]"


def protocol_line(cells: Sequence[Cell]) -> str:
    """What the paper's agreement rule detects in its sample: its four criteria, and the control."""
    sample = [cell for cell in cells if (cell.scope, cell.population) == ("position", "sample") and cell.outcome != "refused"]
    parts = []
    for name, chosen in (
        ("its four criteria", [cell for cell in sample if cell.family == "paper"]),
        ("the token's own routing weight", [cell for cell in sample if cell.ranking == ROUTING_WEIGHT]),
    ):
        detected = sum(cell.outcome in ("positive", "negative") for cell in chosen)
        parts.append(f"{detected} of {len(chosen)} cells of {name}")
    if not sample:
        return "The paper's protocol was refused: see cells.csv."
    return (
        f"The paper's protocol ({sample[0].n} sampled positions; t-test and Wilcoxon's test agree after Bonferroni's correction) "
        f"detects a difference in {' and '.join(parts)}."
    )
