"""The paper's released raw data, read in nats: a section of the page, and a sentence for each model."""

from collections.abc import Sequence
from typing import Any

from hooked_moe.report.blocks import Block, Paragraph, Section, Table, TableRow, table_row
from hooked_moe.report.figures.names import label
from hooked_moe.report.number_text import interval, nats, p_value, share, signed

Row = dict[str, Any]

POOLED = "all"  # the row of a model whose metrics are pooled

_NOTE = (
    "The paper's authors released each comparison that they made: 200 positions for each of four statistics and five layers. "
    "Their tests ask, cell by cell, for a difference that is large against the scatter of single tokens. Here the same "
    "comparisons are pooled over layers and read as mean costs, with intervals and sign flips over paragraphs."
)
_CAVEATS = (
    "To keep in mind: these effects are of removals from the whole sequence, with statistics that count padding, and for "
    "DeepSeek in half precision. Layers and statistics were pooled after the data had been seen, and the same positions serve "
    "in every layer."
)


def reread_section(rows: Sequence[Row]) -> Section:
    columns = ("metric", "paragraphs", "highest", "lowest", "difference (nats)", "95% interval", "p, sign flip", "p, t-test")
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines.append(TableRow(heading=model))
        for row in rows:
            if row["model"] == model:
                lines.append(
                    table_row(
                        "all four" if row["metric"] == POOLED else label(row["metric"]),
                        f"{row['n_paragraphs']:,}",
                        nats(row["high"]),
                        nats(row["low"]),
                        signed(row["difference"], 4),
                        interval(row["difference_low"], row["difference_high"], 4),
                        p_value(row["p_sign_flip"]),
                        p_value(row["p_t"]),
                    )
                )
    sentences = (Paragraph(sentence) for sentence in reread_sentences(rows))
    blocks: tuple[Block, ...] = (Paragraph(_NOTE), *sentences, Table(columns, tuple(lines)), Paragraph(_CAVEATS))
    return Section("reread", "Where the published protocol differs: its raw data read in nats", blocks)


def reread_sentences(rows: Sequence[Row]) -> list[str]:
    """What the pooled row of each model says."""
    return [_sentence(row) for row in rows if row["metric"] == POOLED]


def _sentence(row: Row) -> str:
    ends = interval(row["difference_low"], row["difference_high"], 4)
    numbers = f"{signed(row['difference'], 4)} nats, 95% interval {ends}, p = {p_value(row['p_sign_flip'])} by sign flip"
    if row["p_sign_flip"] > 0.05 or row["difference_low"] <= 0 <= row["difference_high"]:
        return f"For {row['model']} the released sample says nothing either way: highest less lowest is {numbers}."
    if row["difference"] < 0:
        return f"For {row['model']} the expert that a statistic ranks lowest costs more than the one ranked highest ({numbers})."
    return (
        f"For {row['model']} the expert that a statistic ranks lowest costs {_fraction(row)} the one ranked highest ({numbers}), "
        "in the data from which the absence of an effect was concluded."
    )


def _fraction(row: Row) -> str:
    return f"{share(row['low'] / row['high'])} of" if row["low"] >= 0 else "less than nothing, against a positive cost of"
