"""The sections of the page beside the cells: figures, the tables next to them, checks, manifest, and what is not measured."""

import base64
import html
import math
from typing import Any

from hooked_moe.report.figures.drawing import Drawing
from hooked_moe.report.figures.names import FAMILY_TITLES, label
from hooked_moe.report.inputs import SOURCES, Inputs
from hooked_moe.report.number_text import DASH, log_bayes_factor, share, signed
from hooked_moe.report.page import Section, group_row, html_pairs, html_row, html_table, html_value


def not_measured(inputs: Inputs, name: str) -> str:
    """What stands in the place of a derived table that is absent."""
    why = inputs.reasons.get(name) or f"{name} is absent"
    return (
        f'<p class="absent"><b>Not measured</b>: {SOURCES[name].about} ({html.escape(why)}). '
        f"Measure it with <code>{html.escape(inputs.command(name))}</code> and the settings of this run.</p>"
    )


def figure(number: int, drawing: Drawing, picture: bytes) -> str:
    """A figure, wide and narrow, with its caption; `picture` is the wide svg."""
    wide, narrow = (base64.b64encode(svg).decode() for svg in (picture, drawing.render("svg", narrow=True)["svg"]))
    kind = "data:image/svg+xml;base64,"
    title = html.escape(drawing.title) + ("" if drawing.title.endswith("?") else ".")
    return (
        f'<figure id="{drawing.name}"><picture><source media="(max-width: 600px)" srcset="{kind}{narrow}">'
        f'<img src="{kind}{wide}" alt="{html.escape(drawing.title)}"></picture>'
        f"<figcaption><b>Figure {number}. {title}</b> {html.escape(drawing.caption)} "
        f"Numbers: <code>figures/{drawing.name}.csv</code>.</figcaption></figure>"
    )


def bayes_table(rows: list[dict[str, Any]]) -> str:
    """Plackett-Luce and stacking, a row for each ranking, the best first within its family."""
    columns = ("ranking", "&beta;", "&plusmn; sd", "BF<sub>10</sub>", "gain", "stacking weight", "")
    note = (
        "A Plackett-Luce model of the order in which removals hurt, read from both ends alike, per standard deviation of the "
        "ranking's ranks: "
        "&beta; and its standard deviation, clustered by document; the Bayes factor against &beta; = 0 (Savage-Dickey); the gain "
        "in log score over chance for documents left out, in nats per order; and the weight in the stack of fixed criteria and "
        "chance that predicts such documents best. Scores of the very token and the oracle are not stacked."
    )
    used, available = (max(row[name] for row in rows) for name in ("n_positions_used", "n_positions_available"))
    if used < available:
        note += f" Fitted to {used:,} of {available:,} positions, evenly spread; the others were left out for time."
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        lines.append(group_row(FAMILY_TITLES.get(family, family), len(columns)))
        members = [row for row in rows if row["family"] == family]
        for row in sorted(
            members, key=lambda row: -math.inf if math.isnan(row["lodo_score"]) else row["lodo_score"], reverse=True
        ):
            if row["note"]:
                reason = f'<td colspan="{len(columns) - 1}" class="word">{html.escape(row["note"])}</td>'
                lines.append(f"<tr><td>{label(row['criterion'])}</td>{reason}</tr>")
                continue
            weight = row["stacking_weight"]
            bar = "" if math.isnan(weight) else f'<span class="bar" style="width:{6 * weight:.2f}rem"></span>'
            values = (
                label(row["criterion"]),
                signed(row["pl_beta"], 3),
                html_value(row["pl_sd"]),
                log_bayes_factor(row["pl_log_bf10"]),
                signed(row["lodo_score"], 4),
                share(weight),
                bar,
            )
            lines.append(html_row(values))
    return f"<p>{note}</p>{html_table(columns, lines, 'bayes')}"


def plain_table(rows: list[dict[str, Any]]) -> str:
    """A derived table as it is."""
    columns = (name.replace("_", " ") for name in rows[0])
    return html_table(columns, [html_row(html_value(value) for value in row.values()) for row in rows], "plain")


def verification(inputs: Inputs) -> Section:
    """The checks that gated the measurement, and the noise floor beside the size of an effect."""
    parts = []
    checks = inputs.value("verification")
    if checks:
        rows = []
        for check in checks:
            passed = check.get("passed")
            word = "not run" if passed is None else ("passed" if passed else "<b>FAILED</b>")
            value, threshold = (DASH if check.get(key) is None else html_value(check[key]) for key in ("value", "threshold"))
            rows.append(
                html_row((html.escape(check.get("name", "")), word, value, threshold, html.escape(check.get("detail", ""))))
            )
        parts.append(html_table(("check", "result", "value", "threshold", "detail"), rows, "words"))
    else:
        parts.append('<p class="absent"><b>Not recorded</b>: the manifest has no verification.</p>')
    floor = inputs.value("noise_floor")
    if floor:
        parts.append(
            "<h3>Noise floor</h3><p>The largest loss change of a removal that removes nothing, under another batch composition: "
            "an effect of this size is rounding.</p>" + html_pairs(floor)
        )
        parts.append(_above_floor(inputs))
    else:
        parts.append('<p class="absent"><b>Not recorded</b>: the manifest has no noise floor.</p>')
    return Section("verification", "Verification and noise floor", "".join(parts))


def _above_floor(inputs: Inputs) -> str:
    rows = [row for row in inputs.rows("layers.csv") if row["slot"] == -1]
    if not rows or inputs.noise_floor is None:
        return ""
    columns = ["layer", "mean |&Delta; loss|", "times the floor"]
    shares = [row.get("share_above_floor", math.nan) for row in rows]
    if not all(math.isnan(value) for value in shares):
        columns.append("removals above it")
    lines = []
    for row, above in zip(rows, shares, strict=True):
        cells = (
            str(row["layer"]),
            html_value(row["mean_abs_delta"]),
            f"{row['mean_abs_delta'] / inputs.noise_floor:,.0f}",
            share(above),
        )
        lines.append(html_row(cells[: len(columns)]))
    return html_table(columns, lines)


def manifest(inputs: Inputs) -> Section:
    known = {key: value for key, value in inputs.manifest.items() if key not in ("verification", "noise_floor")}
    body = html_pairs(known) if known else '<p class="absent"><b>Not recorded</b>: this run has no manifest.json.</p>'
    return Section("manifest", "Manifest", body)
