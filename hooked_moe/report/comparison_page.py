"""The page of two runs side by side: comparison.html, with comparison.csv and figures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hooked_moe.analysis.run_comparison import Row, RunComparison
from hooked_moe.report.blocks import Block, Folded, Lead, Page, Paragraph, Section, Table, TableRow, table_row
from hooked_moe.report.comparison_words import (
    headline,
    name_of,
    outcome_changes,
    random_cost_sentence,
    realised,
    verdict_text,
)
from hooked_moe.report.figures.names import label
from hooked_moe.report.figures.run_differences import run_differences
from hooked_moe.report.number_text import (
    DASH,
    enumeration,
    interval,
    nats,
    preset_share,
    sentence_case,
    share,
    share_interval,
    signed,
)
from hooked_moe.report.page import render_page
from hooked_moe.report.savings import EFFECT_TITLES
from hooked_moe.report.sections import figure
from hooked_moe.tables import write_csv_atomic, write_text_atomic


def write_comparison(found: RunComparison, directory: Path) -> Path:
    """Write comparison.html, comparison.csv and figures/ into `directory`, which is made; returns the page's path."""
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    write_csv_atomic(found.table(), directory / "comparison.csv")
    first, second = (run.name for run in found.runs)
    page = Page(f"Two audits: {first} and {second}", tuple(_opening(found)), tuple(_sections(found, directory / "figures")))
    write_text_atomic(render_page(page), directory / "comparison.html")
    return directory / "comparison.html"


def _opening(found: RunComparison) -> Iterator[Block]:
    yield Lead(headline(found), " ".join((*found.notes, found.pairing.note)))
    first, second = found.runs
    yield Paragraph(f" {first.name}; second: {second.name}. Differences are first less second.", "First:")
    yield Paragraph(f" {random_cost_sentence(found)}", "Random cost.")
    changes = outcome_changes(found)
    text = (
        f" {sentence_case(enumeration(changes))}." if changes else " None: every criterion has the same outcome in both audits."
    )
    yield Paragraph(text, "Changed outcomes.")


def _sections(found: RunComparison, figures: Path) -> Iterator[Section]:
    rows = realised(found)
    drawing = run_differences([dict(row) for row in rows])
    folded = [
        Folded(sentence_case(EFFECT_TITLES[effect]), (_saving_table(own),), on_paper=False)
        for effect in EFFECT_TITLES
        if effect != "delta_loss" and (own := [row for row in found.savings if row["effect"] == effect])
    ]
    picture = figure(1, drawing, drawing.save(figures))
    yield Section("savings", "What each criterion saves", (picture, Paragraph(_HOW), _saving_table(rows), *folded))
    yield Section("random", "The cost of a random removal", (_cost_table(found.costs),))
    if found.ranks:
        yield Section("ranks", "Do the criteria rank the experts alike?", (Paragraph(_RANKS), _rank_table(found.ranks)))
    if found.prunings:
        yield Section("pruning", "What prunings cost", (Paragraph(_PRUNINGS), _pruning_table(found.prunings)))
    entries = tuple(table_row(*row) for row in found.differing)
    yield Section(
        "differs",
        "What differs between the runs",
        (Paragraph(_DIFFERS), Table(("entry of the manifest", "first", "second"), entries, "words")),
    )
    absent = tuple(_absent(found))
    if absent:
        yield Section("absent", "What is not compared", absent)


_HOW = (
    "Saved: the mean cost of removing an active expert at random less that of removing the one that the criterion prunes "
    "first, as a share of the random cost. The 95% interval of a difference is from resampling documents (bootstrap-t), of "
    "paired runs both at once. The verdict is that of the wider interval, which holds for all criteria of the table together:"
    " one run saves more where it excludes 0, they are alike where it lies within a tenth of the random cost, and all else is"
    " undecided. Scores were learned by each run from all of its own text."
)
_RANKS = (
    "Spearman's correlation over the experts of a layer between the two runs, mean over layers, and its range. Experts are "
    "matched by number, which means something for one model on two texts, or for checkpoints, tunings and prunings of one "
    "training; experts of separate trainings have no counterparts, and correlate at about 0 however alike the models are."
)
_PRUNINGS = (
    "Rise in loss when the same share of the experts is removed for good by the same ranking, each with its own 95% interval."
    " The rises are not paired."
)
_DIFFERS = "All entries that are not the same in both manifests; checksums are shortened. What is not listed is the same."


def _saving_table(rows: list[Row]) -> Table:
    columns = (
        *("criterion", "first", "95% interval", "second", "95% interval", "difference", "95% interval"),
        *("for all criteria", "verdict"),
    )
    lines = []
    for row in rows:
        sides = (
            text
            for side in ("first", "second")
            for text in (share(row[side]), share_interval(row[f"{side}_low"], row[f"{side}_high"]))
        )
        ends = (share_interval(row[f"difference_low{both}"], row[f"difference_high{both}"]) for both in ("", "_together"))
        lines.append(table_row(name_of(row), *sides, share(row["difference"]), *ends, verdict_text(row["verdict"])))
    return Table(columns, tuple(lines), "savings")


def _cost_table(rows: list[Row]) -> Table:
    columns = ("effect", "first (nats)", "95% interval", "second (nats)", "95% interval", "difference", "95% interval")
    lines = []
    for row in rows:
        sides = (
            text
            for side in ("first", "second")
            for text in (nats(row[side]), interval(row[f"{side}_low"], row[f"{side}_high"], 4))
        )
        ends = interval(row["difference_low"], row["difference_high"], 4)
        lines.append(table_row(EFFECT_TITLES[row["effect"]], *sides, signed(row["difference"], 4), ends))
    return Table(columns, tuple(lines), "plain")


def _rank_table(rows: list[Row]) -> Table:
    columns = ("criterion", "mean of layers", "lowest", "highest")
    lines = (
        table_row(
            "mean measured effect" if row["criterion"] == "mean_delta" else label(row["criterion"]),
            *(signed(row[name], 2) for name in ("mean", "lowest", "highest")),
        )
        for row in rows
    )
    return Table(columns, tuple(lines), "plain")


def _pruning_table(rows: list[Row]) -> Table:
    lines: list[TableRow] = []
    for part in sorted({row["share"] for row in rows}):
        lines.append(TableRow(heading=f"{preset_share(part)} pruned"))
        for row in (row for row in rows if row["share"] == part):
            name = label(row["ranking"]) + ("" if row["per"] == "layer" else f" ({row['per']})")
            sides = (
                text
                for side in ("first", "second")
                for text in (nats(row[f"{side}_rise"]), interval(row[f"{side}_rise_low"], row[f"{side}_rise_high"], 4))
            )
            lines.append(table_row(name, *sides))
    return Table(("ranking", "first (nats)", "95% interval", "second (nats)", "95% interval"), tuple(lines), "cells")


def _absent(found: RunComparison) -> Iterator[Paragraph]:
    if not found.ranks:
        yield Paragraph(
            " The models differ in shape, so that no expert of one has a counterpart in the other.", "Ranks of experts."
        )
    if not found.prunings:
        yield Paragraph(" Not both runs have pruned by the same ranking and share: `hooked-moe prune` does.", "Prunings.")
    if not any(row["effect"] == "kl" for row in found.savings):
        yield Paragraph(f" Not both runs have it {DASH} the effect table lacks the column kl.", "Expected loss.")
