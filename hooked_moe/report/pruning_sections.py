"""What a pruning costs, beside what the effect table predicts."""

from collections.abc import Sequence
from typing import Any

from hooked_moe.analysis.pruning import ADDITIVE_SHARE
from hooked_moe.report.blocks import Block, Folded, Paragraph, Section, Table, TableRow, table_row
from hooked_moe.report.figures.names import label
from hooked_moe.report.number_text import DASH, interval, nats, preset_share, share, signed

Row = dict[str, Any]

_KINDS = {"criterion": "criteria", "oracle": "oracles", "table": "chosen by the effect table", "random": "at random"}


def pruning_section(rows: Sequence[Row], summary: Sequence[Row], figure: Sequence[Block]) -> Section:
    """Rises in loss by ranking and share; `figure` draws them against their predictions."""
    note = (
        "Experts are removed for good, the same share in every layer unless a row says otherwise, and the loss is read on "
        f"documents that chose nothing ({max(row['n_documents'] for row in rows)} of them). The predicted rise is the sum of the "
        "single-token effects of the experts removed, measured on the other documents: it is known before anything is pruned. "
        "It leaves out how removals interact: beyond "
        f"{preset_share(ADDITIVE_SHARE)} of a layer's experts the rise exceeds it."
    )
    blocks: list[Block] = [Paragraph(note), *figure]
    if summary:
        blocks += [Paragraph(_SUMMARY_NOTE), _summary_table(summary)]
    blocks += [_by_share(rows), Folded("All numbers of the prunings", (_table(rows),), on_paper=False)]
    return Section("pruning", "What a pruning will cost", tuple(blocks))


_SUMMARY_NOTE = (
    "How well the prediction does, over the criteria and over random masks: the rank correlation of predicted and measured rise, "
    "the median of measured over predicted, and the share of prunings whose measured rise lies in the predicted interval."
)


_BEYOND = "a forecast beyond what adds up"


def _summary_table(summary: Sequence[Row]) -> Table:
    columns = ("pruned", "over", "rank correlation", "measured / predicted", "in the interval")
    rows = []
    for row in summary:
        numbers = (signed(row["spearman"], 2), f"{row['ratio']:.2f}", share(row["coverage"]))
        mark = f" ({_BEYOND})" if row["share"] > ADDITIVE_SHARE else ""
        rows.append(table_row(f"{preset_share(row['share'])}{mark}", row["population"], *numbers))
    return Table(columns, tuple(rows))


def _shares(rows: Sequence[Row]) -> list[float]:
    return sorted({row["share"] for row in rows})


def _name(row: Row) -> str:
    return label(row["ranking"]) + ("" if row["per"] == "layer" else f" ({row['per']})")


def _by_share(rows: Sequence[Row]) -> Table:
    """A line for each ranking, the cheapest at the middle share first: the rise in nats, and in percent of random."""
    shares = _shares(rows)
    middle = shares[len(shares) // 2]
    lines = []
    for kind, title in _KINDS.items():
        members = [row for row in rows if row["kind"] == kind]
        if not members:
            continue
        lines.append(TableRow(heading=title))
        by_key = {(_name(row), row["share"]): row for row in members}
        names = sorted({name for name, _ in by_key}, key=lambda name: _rise(by_key.get((name, middle))))
        for name in names:
            lines.append(table_row(name, *(_rise_text(by_key.get((name, part))) for part in shares)))
    return Table(("rise in loss (nats; % of random)", *(f"{preset_share(part)} pruned" for part in shares)), tuple(lines))


def _rise(row: Row | None) -> float:
    return row["rise"] if row else float("inf")


def _rise_text(row: Row | None) -> str:
    return f"{nats(row['rise'])} ({share(row['share_of_random'])})" if row else DASH


def _table(rows: Sequence[Row]) -> Table:
    columns = ("ranking", "rise", "95% interval", "of random", "predicted", "95% interval", "measured / predicted")
    lines = []
    for part in _shares(rows):
        beyond = f": {_BEYOND}" if part > ADDITIVE_SHARE else ""
        lines.append(TableRow(heading=f"{preset_share(part)} pruned{beyond}"))
        for row in sorted((row for row in rows if row["share"] == part), key=_rise):
            lines.append(
                table_row(
                    _name(row),
                    nats(row["rise"]),
                    interval(row["rise_low"], row["rise_high"], 4),
                    share(row["share_of_random"]),
                    nats(row["predicted"]),
                    interval(row["predicted_low"], row["predicted_high"], 4),
                    f"{row['rise'] / row['predicted']:.2f}" if row["predicted"] > 0 else DASH,
                )
            )
    return Table(columns, tuple(lines), "cells")
