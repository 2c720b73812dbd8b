"""What the page of a budgeted run says of its budget: how much was measured, and what the intervals hold."""

import math
from collections.abc import Iterable

from hooked_moe.report.blocks import Paragraph, Section, Table, TableRow, table_row
from hooked_moe.report.figures.names import label
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.number_text import interval, share, share_interval, signed
from hooked_moe.report.savings import EFFECT_TITLES, LOSS, Row, read_savings

FILE = "budgeted.csv"


def is_budgeted(inputs: Inputs) -> bool:
    return FILE in inputs.tables


def budget_notice(inputs: Inputs) -> Iterable[Paragraph]:
    """The words that stand above all numbers of the page; none where every removal was made."""
    if not is_budgeted(inputs):
        return
    made, total = _counts(inputs)
    seed = inputs.value("parts", "sampled", "seed")
    text = (
        f" {made:,} of {total:,} removals were made ({share(made / total)}), drawn at random with seed {seed}, those that could "
        "cost much more often than others. All means, and savings in nats, are estimates without bias, of these and a cheap "
        "estimate of every removal; a share is the ratio of two. Intervals say what other documents of the kind would give: they "
        "hold both the choice of documents and that of removals. What a sample cannot tell (orders within a position, spreads, "
        "shares of variance, tests of single positions) is left out."
    )
    yield Paragraph(text, "A budgeted audit.")


def budget_section(inputs: Inputs) -> Iterable[Section]:
    """Estimates of layers and of the recommended criterion, with both intervals."""
    if not is_budgeted(inputs):
        return
    rows = inputs.rows(FILE)
    note = (
        "The sampling interval is for what all removals of these very documents would give; the interval, for what other "
        "documents of the kind would. The share drawn is that part of the wider one's variance which making more removals would "
        "take away. budgeted.csv has the same for every expert and ranking; benchmarks/BUDGET.md, how often such intervals hold "
        "the truth."
    )
    lines: list[TableRow] = []
    for effect, title in EFFECT_TITLES.items():
        lines.append(TableRow(heading=f"{title}: mean over the removals of a layer, nats"))
        lines += [_line(row["layer"], row, 4) for row in rows if (row["effect"], row["kind"]) == (effect, "layer")]
        lines += _of_recommended(inputs, rows, effect, title)
        lines += _of_experts(rows, effect, title)
    columns = ("", "estimate", "sampling interval", "interval", "share drawn", "removals made")
    yield Section("budget", "What the budget bought", (Paragraph(note), Table(columns, tuple(lines), "cells")))


def _of_recommended(inputs: Inputs, rows: list[Row], effect: str, title: str) -> list[TableRow]:
    best = read_savings(inputs).recommended
    if best is None:
        return []
    own = [row for row in rows if (row["effect"], row["kind"], row["name"]) == (effect, "saving_share", best["ranking"])]
    heading = TableRow(heading=f"{title}: saved by {label(best['ranking'])}, by layer")
    return [heading, *(_line(row["layer"], row, None) for row in own)] if own else []


def _of_experts(rows: list[Row], effect: str, title: str) -> list[TableRow]:
    """The expert whose interval is of middling width stands for all."""
    experts = [row for row in rows if (row["effect"], row["kind"]) == (effect, "expert") and not math.isnan(row["low"])]
    if not experts:
        return []
    experts.sort(key=lambda row: float(row["high"] - row["low"]))
    middle = experts[len(experts) // 2]
    heading = TableRow(heading=f"{title}: an expert with an interval of middling width, nats")
    return [heading, _line(f"layer {middle['layer']}, expert {middle['name']}", middle, 4)]


def _line(name: str, row: Row, digits: int | None) -> TableRow:
    """`digits` None: shares."""
    ends = ((row["sampling_low"], row["sampling_high"]), (row["low"], row["high"]))
    if digits is None:
        estimate, intervals = share(row["estimate"]), [share_interval(*pair) for pair in ends]
    else:
        estimate, intervals = signed(row["estimate"], digits), [interval(*pair, digits) for pair in ends]
    sampling, both = (high - low for low, high in ends)
    drawn = min(1.0, (sampling / both) ** 2) if both > 0 else math.nan
    return table_row(name, estimate, *intervals, share(drawn), f"{row['n_drawn']:,}")


def _counts(inputs: Inputs) -> tuple[int, int]:
    """Removals made, and all there were."""
    made = next(
        row["n_drawn"] for row in inputs.rows(FILE) if (row["effect"], row["kind"], row["layer"]) == (LOSS, "layer", "all")
    )
    return int(made), sum(row["n_removals"] for row in inputs.rows("experts.parquet"))
