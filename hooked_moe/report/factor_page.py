"""The page of the factor study: report.html beside effects.csv, aliases.csv and responses.csv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hooked_moe.analysis.factor_study import (
    ANY_ROUTED_PART,
    COLUMN_OF,
    MINIMUM_ROUTED_PART,
    PRIMARY,
    SHUFFLED,
    Analysis,
    analysed,
    counts,
    runs_made,
    seed_deviation,
    some_do_not_count,
)
from hooked_moe.analysis.factors import FACTORS
from hooked_moe.analysis.responses import ALL_LAYERS
from hooked_moe.report.blocks import Block, Heading, Lead, Page, Paragraph, Section, Table, table_row
from hooked_moe.report.figures.factors import described_effects, factor_effects
from hooked_moe.report.number_text import enumeration, p_value, signed
from hooked_moe.report.page import render_page
from hooked_moe.report.sections import figure, plain_table
from hooked_moe.tables import read_csv, required_file, write_text_atomic

_CHANCE = (
    "saving_reap",
    "saving_reap_kl",
    "spearman_reap_kl",
    "d_control",
    "log_kl_ceiling",
    "first_order_rho",
    "best_paper_spearman",
)
"""Responses shown of the negative control: at chance, all are 0."""
_ERRORS = {
    "seeds": "the deviation between seeds of the same run",
    "lenth": "Lenth's pseudo standard error of all contrasts, as there is one seed",
    "residual": "the residual of main effects, which also holds interactions",
}

Rows = Sequence[dict[str, Any]]


def write_factor_report(directory: Path) -> Path:
    """Write report.html and figures/ from the study's responses.csv; returns the page's path. FileNotFoundError without it."""
    responses = read_csv(required_file(directory, "responses.csv", "hooked-moe study factors writes it"))
    counting = analysed(responses)
    described = analysed(responses, ANY_ROUTED_PART) if some_do_not_count(responses) else None
    (directory / "figures").mkdir(exist_ok=True)
    for old in (directory / "figures").glob("factor_effects*"):
        old.unlink()
    page = Page(
        "Which training choice makes an expert matter?",
        tuple(_opening(responses, counting, described)),
        tuple(_sections(responses, counting, described, directory / "figures")),
    )
    write_text_atomic(render_page(page), directory / "report.html")
    return directory / "report.html"


def _opening(responses: pa.Table, counting: Analysis, described: Analysis | None) -> Iterator[Block]:
    runs = runs_made(responses)
    count = sum(map(counts, runs))
    seeds = len({row["seed"] for row in runs})
    made = f"{len(runs)} runs of {seeds} seed{'s' if seeds > 1 else ''}"
    rule = f"{count} of {made} count: their layers' routed experts are worth {MINIMUM_ROUTED_PART:g} nats or more on average."
    if counting.effects is None:
        nothing = "no effect can be estimated by the rule that was written down before"
        if described is None:
            yield Lead(f"{made} are made so far, and {nothing}.", f"{counting.why_not}. The responses are below.")
        else:
            below = "the responses are below" if described.effects is None else f"the effects of all runs are {_OUTSIDE}"
            text = f"{rule} {counting.why_not}. So nothing is established; {below}."
            yield Lead(f"{count} of {len(runs)} runs count: {nothing}.", text)
        return
    rows = [row for row in counting.effects.to_pylist() if row["primary"]]
    found = [row for row in rows if row["outcome"] == "effect"]
    negligible = sum(row["outcome"] == "negligible" for row in rows)
    sentences = enumeration([_sentence(row) for row in found])
    headline = (
        f"Established: {len(found)} effect{'s' if len(found) > 1 else ''} of {len(rows)}: {sentences}."
        if found
        else "No effect of a training choice is established."
    )
    first = rows[0]
    yield Lead(
        headline,
        f"{first['n_runs']} runs of {first['n_seeds']} seed{'s' if first['n_seeds'] > 1 else ''}; {negligible} effects are "
        f"negligible and {len(rows) - len(found) - negligible} undecided. Errors are from {_ERRORS[first['error']]}. Undecided "
        "means that this many runs cannot tell: the size that they would find stands beside every effect.",
    )
    if described is not None:
        yield Paragraph(f"{rule} The effects are of those; those of all runs are {_OUTSIDE}.")


_OUTSIDE = "a description outside that rule, and shown as that"


def _sentence(row: dict[str, Any]) -> str:
    return f"{row['label']} on {PRIMARY[row['response']].label} ({signed(row['effect'], 2)})"


def _shuffled(responses: pa.Table) -> list[dict[str, Any]]:
    """The negative control of each run."""
    rows: list[dict[str, Any]] = responses.to_pylist()
    return [row for row in rows if row["kind"] == SHUFFLED and row["layer"] == ALL_LAYERS]


def _sections(responses: pa.Table, counting: Analysis, described: Analysis | None, figures: Path) -> Iterator[Section]:
    if counting.effects is not None:
        drawing = factor_effects(counting.effects, _TITLES)
        blocks = (figure(1, drawing, drawing.save(figures)), Paragraph(_EFFECT_NOTE), _effect_table(responses, counting.effects))
        yield Section("effects", "Effects", blocks)
    if described is not None:
        yield Section("all-runs", "All runs, outside the rule", tuple(_described(responses, counting, described, figures)))
    yield Section("factors", "The factors", (_factor_table(),))
    yield Section("aliases", "What the design confounds", (Paragraph(_ALIAS_NOTE), plain_table(counting.aliases.to_pylist())))
    yield Section("runs", "Every run", (Paragraph(_RUN_NOTE), _run_table(runs_made(responses))))
    shuffled = _shuffled(responses)
    if shuffled:
        yield Section("chance", "Negative control", (Paragraph(_CHANCE_NOTE), _chance_table(responses, shuffled)))
    if counting.effects is not None:
        others = (Paragraph(_OTHERS_NOTE), _plain_effects(counting.effects))
        yield Section("others", "Responses that were not announced", others)


def _described(responses: pa.Table, counting: Analysis, described: Analysis, figures: Path) -> Iterator[Block]:
    yield Paragraph(_DESCRIBED_NOTE, strong="A description, not a finding.")
    if described.effects is None:
        yield Paragraph(f"All runs taken together do not give effects either: {described.why_not}.")
        return
    drawing = described_effects(described.effects, _TITLES)
    yield figure(1 if counting.effects is None else 2, drawing, drawing.save(figures))
    yield Paragraph(_EFFECT_NOTE)
    yield _effect_table(responses, described.effects, ruled=False)
    yield Heading("Responses that were not announced")
    yield Paragraph(_OTHERS_NOTE)
    yield _plain_effects(described.effects)
    if described.aliases != counting.aliases:
        yield Heading("What these runs confound")
        yield plain_table(described.aliases.to_pylist())


_TITLES = {name: primary.label for name, primary in PRIMARY.items()}
_DESCRIBED_NOTE = (
    f" Effects of all runs, also of those whose routed experts are worth less than {MINIMUM_ROUTED_PART:g} nats: where they do "
    "little, there is little that an audit could find, which is why the rule written down before leaves such runs out. The rule "
    "stays, so that nothing here is established or shown to be negligible."
)
_EFFECT_NOTE = (
    "High level less low level. p is corrected by Holm's method over the seven factors of a response. Detectable: the effect "
    "that this many runs would find with 80% chance at that level. Deviation between seeds: of the same run trained with another "
    "seed, where there are such runs. Intervals are over runs; documents do not enter."
)
_ALIAS_NOTE = (
    "Effects in one row share one column of the design, so that an estimate is their sum. The last column lists, for main "
    "effects, the interactions of two factors that the runs in hand mix into them: none once all 16 runs are made."
)
_RUN_NOTE = (
    f"A run counts if its layers' routed experts are worth {MINIMUM_ROUTED_PART:g} nats or more on average (routed part). "
    "Held-out loss is a covariate: a worse model is not a less redundant one."
)
_CHANCE_NOTE = (
    "The same audits with the effects of every position dealt to its active experts at random: every response that asks which "
    "expert is 0 in expectation. Mean over runs, and the mean of the runs as they are."
)
_OTHERS_NOTE = "Everything else that the audits give, without a correction over responses: to look at, not to conclude from."


def _factor_table() -> Table:
    rows = (table_row(factor.name, factor.label, factor.low, factor.high) for factor in FACTORS.values())
    return Table(("", "factor", "low (\N{MINUS SIGN})", "high (+)"), tuple(rows), "words")


def _effect_table(responses: pa.Table, effects: pa.Table, ruled: bool = True) -> Table:
    """`ruled`: what may be said of each by the rule."""
    columns = ("", "effect", "95% interval", "p (Holm)", "detectable", *(("negligible within", "outcome") if ruled else ()))
    rows = []
    for name, primary in PRIMARY.items():
        own = [row for row in effects.to_pylist() if row["response"] == name]
        if not own:
            continue
        deviation, df = seed_deviation(responses, name)
        heading = primary.label + ("" if np.isnan(deviation) else f" (deviation between seeds {deviation:.3f}, {df} df)")
        rows.append(table_row(heading, *[""] * (len(columns) - 1)))
        for row in own:
            ends = f"[{signed(row['low'], 3)}, {signed(row['high'], 3)}]"
            cells = (signed(row["effect"], 3), ends, p_value(row["p_holm"]), f"{row['detectable']:.3f}")
            rule = (f"{primary.bound:g}", row["outcome"]) if ruled else ()
            rows.append(table_row(f"  {row['factor']} {row['label']}", *cells, *rule))
    return Table(columns, tuple(rows), "words")


def _run_table(models: Rows) -> Table:
    shown = ("held_out_loss", "routed_part", *(COLUMN_OF.get(name, name) for name in PRIMARY))
    columns = ("seed", "run", *FACTORS, "counts", *(name.replace("_", " ") for name in shown))
    rows = []
    for row in models:
        levels = ("+" if row[factor] > 0 else "\N{MINUS SIGN}" for factor in FACTORS)
        cells = ("yes" if counts(row) else "no", *(f"{row[name]:.3f}" for name in shown))
        rows.append(table_row(str(row["seed"]), str(row["run"]), *levels, *cells))
    return Table(columns, tuple(rows), "plain")


def _chance_table(responses: pa.Table, shuffled: Rows) -> Table:
    models = runs_made(responses)
    rows = []
    for name in _CHANCE:
        values = np.array([row[name] for row in shuffled])
        true = float(np.mean([row[name] for row in models]))
        rows.append(
            table_row(
                name.replace("_", " "), signed(float(values.mean()), 3), signed(float(np.abs(values).max()), 3), signed(true, 3)
            )
        )
    return Table(("response", "shuffled: mean", "largest size", "as they are: mean"), tuple(rows), "words")


def _plain_effects(effects: pa.Table) -> Table:
    rows = [row for row in effects.to_pylist() if not row["primary"]]
    columns = ("response", *(f"{factor.name} {factor.label}" for factor in FACTORS.values()), "detectable")
    body = []
    for name in dict.fromkeys(row["response"] for row in rows):
        own = [row for row in rows if row["response"] == name]
        marks = (f"{signed(row['effect'], 3)}{'*' if row['p_holm'] <= 0.05 else ''}" for row in own)
        body.append(table_row(name.replace("_", " "), *marks, f"{own[0]['detectable']:.3f}"))
    return Table(columns, tuple(body), "plain")
