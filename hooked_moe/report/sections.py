"""The sections of the page beside the verdicts: figures, the tables next to them, checks, and the manifest."""

import base64
import json
import math
from typing import Any

from hooked_moe.report.blocks import (
    Block,
    Figure,
    Folded,
    Heading,
    Key,
    KeyEntry,
    Missing,
    Paragraph,
    Section,
    Table,
    TableCell,
    TableRow,
    table_row,
)
from hooked_moe.report.derived_files import DERIVED_FILES
from hooked_moe.report.figures.drawing import Drawing, Pictures
from hooked_moe.report.figures.names import FAMILY_TITLES, label
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.number_text import DASH, interval, log_bayes_factor, share, signed, value_text
from hooked_moe.report.outcome_words import OutcomeWords

MOST_LAYERS_WITH_NUMBERS = 12
"""Of a map by layers; beyond, it shows the marks alone."""


def not_measured(inputs: Inputs) -> Section | None:
    """Every derived table that the run lacks, and the command that measures it; None where it lacks none."""
    absent = [name for name in DERIVED_FILES if name not in inputs.tables]
    blocks = tuple(
        Missing(
            "Not measured",
            f"{DERIVED_FILES[name].about} ({inputs.reasons.get(name) or f'{name} is absent'}).",
            inputs.command(name),
        )
        for name in absent
    )
    return Section("absent", "What was not measured", blocks) if absent else None


def outcome_key(words_by_outcome: dict[str, OutcomeWords]) -> Key:
    """What the marks of a map mean."""
    entries = (KeyEntry(words.mark, words.css, f"{words.name}: {words.meaning}.") for words in words_by_outcome.values())
    return Key(tuple(entries))


def figure(number: int, drawing: Drawing, pictures: Pictures) -> Figure:
    """A drawing as a figure of the page."""
    wide, narrow = ("data:image/svg+xml;base64," + base64.b64encode(svg).decode() for svg in (pictures.wide, pictures.narrow))
    return Figure(number, drawing.name, drawing.title, drawing.caption, wide, narrow)


def plain_table(rows: list[dict[str, Any]]) -> Table:
    """A derived table as it is."""
    columns = tuple(name.replace("_", " ") for name in rows[0])
    return Table(columns, tuple(table_row(*map(value_text, row.values())) for row in rows), "plain")


# --- kinds of text --------------------------------------------------------------------------------------------------------


def domain_table(rows: list[dict[str, Any]]) -> Table:
    """domains.csv, a row for each kind of text."""
    columns = (
        *("kind of text", "documents", "positions", "loss (nats)", "mean effect (nats)", "mean size (nats)"),
        *("top minus bottom (nats)", "d", "95% interval"),
    )
    lines = []
    for row in rows:
        effects = (signed(row[name], 4) for name in ("mean_delta", "mean_abs_delta", "top_minus_bottom"))
        ends = interval(row["d_position_low"], row["d_position_high"], 3)
        counts = (f"{row['n_documents']:,}", f"{row['n_positions']:,}", f"{row['baseline_loss']:.3f}")
        lines.append(table_row(row["domain"], *counts, *effects, signed(row["d_position"], 3), ends))
    return Table(columns, tuple(lines), "plain")


# --- Bayesian comparison ------------------------------------------------------------------------------------------------


def bayes_blocks(rows: list[dict[str, Any]]) -> tuple[Block, ...]:
    """Plackett-Luce models and stacking, a row for each ranking, the best first within its family."""
    columns = ("ranking", "β", "± sd", "BF₁₀", "gain", "stacking weight", "")
    note = (
        "A Plackett-Luce model of the order in which removals hurt, read from both ends alike, per standard deviation of the "
        "ranking's ranks: "
        "β and its standard deviation, clustered by document; the Bayes factor against β = 0 (Savage-Dickey); the gain "
        "in log score over chance for documents left out, in nats per order; and the weight in the stack of fixed criteria and "
        "chance that predicts such documents best. Per-token scores and the oracle are not stacked."
    )
    used, available = (max(row[name] for row in rows) for name in ("n_positions_used", "n_positions_available"))
    if used < available:
        note += f" Fitted to {used:,} of {available:,} positions, evenly spread; the others were left out for time."
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        lines.append(TableRow(heading=FAMILY_TITLES.get(family, family)))
        members = [row for row in rows if row["family"] == family]
        members.sort(key=lambda row: -math.inf if math.isnan(row["lodo_score"]) else row["lodo_score"], reverse=True)
        lines += [_bayes_row(row, len(columns)) for row in members]
    return Paragraph(note), Table(columns, tuple(lines), "bayes")


def _bayes_row(row: dict[str, Any], n_columns: int) -> TableRow:
    name = label(row["criterion"])
    if row["note"]:
        return table_row(name, TableCell(row["note"], css="word", columns=n_columns - 1))
    weight = row["stacking_weight"]
    return table_row(
        name,
        signed(row["pl_beta"], 3),
        value_text(row["pl_sd"]),
        log_bayes_factor(row["pl_log_bf10"]),
        signed(row["lodo_score"], 4),
        share(weight),
        TableCell("", bar=None if math.isnan(weight) else weight),
    )


# --- verification and manifest -------------------------------------------------------------------------------------------


def verification(inputs: Inputs) -> Section:
    """The checks that gated the measurement, and the noise floor beside the size of an effect."""
    blocks: list[Block] = []
    checks = inputs.value("verification")
    if checks:
        columns = ("check", "result", "value", "threshold", "detail")
        blocks.append(Table(columns, tuple(_check_row(check) for check in checks), "words"))
    else:
        blocks.append(Missing("Not recorded", "the manifest has no verification."))
    floor = inputs.value("noise_floor")
    if floor:
        blocks += [
            Heading("Noise floor"),
            Paragraph(
                "The largest loss change of a removal that removes nothing, under another batch composition: an effect of this "
                "size is rounding."
            ),
            _floor_table(floor),
            *_above_floor(inputs),
        ]
    else:
        blocks.append(Missing("Not recorded", "the manifest has no noise floor."))
    return Section("verification", "Verification and noise floor", tuple(blocks))


def _floor_table(floor: dict[str, Any]) -> Table:
    known = {"max_abs_nats": "largest change (nats)", "windows": "windows read", "tokens_per_window": "tokens of each"}
    rows = (table_row(words, value_text(floor[name])) for name, words in known.items() if name in floor)
    return Table((), tuple(rows), "pairs")


_CHECK_RESULTS = {True: TableCell("passed"), False: TableCell("FAILED", css="failed"), None: TableCell("not run")}


def _check_row(check: dict[str, Any]) -> TableRow:
    result = _CHECK_RESULTS[check.get("passed")]
    value, threshold = (DASH if check.get(key) is None else value_text(check[key]) for key in ("value", "threshold"))
    return table_row(str(check.get("name", "")), result, value, threshold, str(check.get("detail", "")))


def _above_floor(inputs: Inputs) -> tuple[Block, ...]:
    """How far effects exceed the noise floor, by layer."""
    rows = [row for row in inputs.rows("layers.csv") if row["slot"] == -1]
    if not rows or inputs.noise_floor is None:
        return ()
    columns = ["layer", "mean |Δ loss|", "times the floor"]
    shares = [row.get("share_above_floor", math.nan) for row in rows]
    if not all(math.isnan(value) for value in shares):
        columns.append("removals above it")
    lines = []
    for row, above in zip(rows, shares, strict=True):
        size = row["mean_abs_delta"]
        cells = (str(row["layer"]), value_text(size), f"{size / inputs.noise_floor:,.0f}", share(above))
        lines.append(table_row(*cells[: len(columns)]))
    return (Table(tuple(columns), tuple(lines)),)


def manifest(inputs: Inputs) -> Section:
    """What the manifest says beside the checks and the noise floor."""
    entries = {key: value for key, value in inputs.manifest.items() if key not in ("verification", "noise_floor")}
    if not entries:
        return Section("manifest", "Manifest", (Missing("Not recorded", "this run has no manifest.json."),))
    about = "Model, text, protocol, versions and checksums: what another run needs to give the same bytes."
    folded = Folded("manifest.json, entry by entry", (_pairs(entries),), on_paper=False)
    return Section("manifest", "Manifest", (Paragraph(about), folded))


def _pairs(value: dict[str, Any]) -> Table:
    """A nested dictionary as dotted names and values."""
    rows: list[TableRow] = []

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, inner in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            rows.append(table_row(prefix, node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)))

    walk("", value)
    return Table((), tuple(rows), "pairs")
