"""What a run shows, in plain words: every sentence is generated from the derived tables, and says what they say."""

import math
from collections.abc import Callable, Iterable, Sequence

from hooked_moe.report.blocks import Block, Paragraph, Summary
from hooked_moe.report.conclusions import conclude
from hooked_moe.report.figures.names import label
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.number_text import enumeration, layer_list, share, signed
from hooked_moe.report.readings import FIXED, Row, best_fixed, ceiling_reading, known_mean, position_cells, verdict_cells
from hooked_moe.report.verdict_words import VERDICT_WORDS

_MOST_NAMED = 5  # rankings named in a sentence; the others are counted


def opening(inputs: Inputs) -> tuple[Block, ...]:
    """The top of the page: what was measured, what to conclude, and what was found."""
    conclusions = tuple(map(Paragraph, conclude(inputs)))
    findings = tuple(finding for find in FINDINGS for finding in find(inputs))
    blocks: list[Block] = [measured(inputs)]
    if conclusions:
        blocks.append(Summary("What to conclude", conclusions, "conclusion"))
    if findings:
        blocks.append(Summary("What was found", findings))
    return tuple(blocks)


def measured(inputs: Inputs) -> Paragraph:
    """Model, corpus and the size of one removal's effect against the noise floor."""
    text = ""
    if inputs.value("corpus", "name"):
        text += f" on {inputs.value('corpus', 'name')}"
        text += f" ({inputs.value('corpus', 'documents'):,} documents, {inputs.value('corpus', 'tokens'):,} tokens)"
    rows = [row for row in inputs.rows("layers.csv") if row["slot"] == -1]
    if not rows:
        return Paragraph(f"{text}. Removals of single experts were not measured.", inputs.model_name)
    count = sum(row["n_removals"] for row in rows)
    mean, size, positive = (
        sum(row[name] * row["n_removals"] for row in rows) / count for name in ("mean_delta", "mean_abs_delta", "share_positive")
    )
    text += (
        f": {count:,} removals of one active expert at one token, in {len(rows)} layers. One changes the loss of the next "
        f"token by {size:.4f} nats on average; {share(positive)} of them make it worse (mean {signed(mean, 4)})."
    )
    if inputs.noise_floor:
        text += f" The average is {size / inputs.noise_floor:,.0f} times the noise floor."
    return Paragraph(text, inputs.model_name)


# --- findings: a sentence for each derived table that the run has --------------------------------------------------------------


def fixed_criteria(inputs: Inputs) -> Iterable[Paragraph]:
    """How many cells of the fixed criteria are valid, equivalent to zero or undecided, and which predict."""
    for family, name in (("paper", "The paper's four criteria"), ("extended", "Further criteria")):
        cells = verdict_cells(inputs, (family,))
        if cells:
            yield Paragraph(f" ({_cell_count(cells)}): {_tally(cells)}.", name)


def token_scores(inputs: Inputs) -> Iterable[Paragraph]:
    """The ladder of per-token scores and the oracle, by verdicts and rank correlation."""
    parts = []
    for ranking in ("routing_weight", "gap_norm", "first_order", "oracle"):
        cells = [row for row in verdict_cells(inputs, ("token", "oracle")) if row["ranking"] == ranking]
        rho = known_mean(row["spearman"] for row in cells)
        if cells and not math.isnan(rho):
            valid = sum(row["verdict"] == "valid" for row in cells)
            parts.append(f"{label(ranking)} {signed(rho, 3)}, valid in {valid} of {len(cells)} layers")
    if not parts:
        return
    best = best_fixed(inputs)
    against = f" The best fixed criterion, {label(best[0])}, reaches {signed(best[1], 3)}." if best else ""
    listed = "; ".join(parts)
    text = f", by Spearman correlation with the effect (mean over layers): {listed}.{against}"
    yield Paragraph(text, "Per-token scores")


def sample_power(inputs: Inputs) -> Iterable[Paragraph]:
    """What the published protocol, a sample of positions, says on the same run, and what it could not have seen."""
    cells = [row for row in position_cells(inputs, "sample", ("paper",)) if row["verdict"] != "refused"]
    if not cells:
        return
    valid = sum(row["verdict"] == "valid" for row in cells)
    undecided = sum(row["verdict"] == "undecided" for row in cells)
    power, needed = cells[0]["power_at_d02"], cells[0]["minimal_detectable_d"]
    text = (
        f", the published protocol, {valid} of the {len(cells)} cells of the paper's criteria are valid and {undecided} "
        f"undecided. Such a cell detects d = 0.2 with probability {power:.2f} and needs d = {needed:.3f} for 0.8: its silence "
        "is no evidence of absence."
    )
    yield Paragraph(text, f"On {cells[0]['n']} sampled positions")


def ceiling(inputs: Inputs) -> Iterable[Paragraph]:
    """What any fixed ranking could explain, and how near the criteria come to it."""
    reading = ceiling_reading(inputs)
    if reading is None:
        return
    text = (
        f" No ranking fixed for the corpus can explain more than {share(reading.ceiling)} of the variance of effects within a "
        f"position (mean over layers). The best criterion, {label(reading.best)}, reaches {share(reading.best_share)} of that"
    )
    text += "." if math.isnan(reading.oracle_share) else f", the oracle {share(reading.oracle_share)}."
    yield Paragraph(text, "Static ceiling.")


def bayes(inputs: Inputs) -> Iterable[Paragraph]:
    """What each kind of ranking gains over chance in documents left out, and which criteria the stack rests on."""
    rows = inputs.rows("bayes.csv")
    leaders = []
    for families in (("token",), ("oracle",), FIXED):
        scored = [row for row in rows if row["family"] in families and not math.isnan(row["lodo_score"])]
        if scored:
            best = max(scored, key=lambda row: float(row["lodo_score"]))
            wrong_way = " (with β < 0)" if best["pl_beta"] < 0 else ""
            leaders.append(f"{label(best['criterion'])} {signed(best['lodo_score'], 4)}{wrong_way}")
    if not leaders:
        return
    text = (
        " Predicting the order of effects in documents left out, the best of each kind gain over chance, in nats per order: "
        f"{', '.join(leaders)}."
    )
    heavy = [row for row in rows if row["stacking_weight"] >= 0.01]
    heavy.sort(key=lambda row: -row["stacking_weight"])
    named = [f"{label(row['criterion'])} {share(row['stacking_weight'])}" for row in heavy[:3]]
    text += f" Of a stack of the fixed criteria and chance, the weight goes to {enumeration(named)}." if named else ""
    yield Paragraph(text, "Bayesian comparison.")


def scope(inputs: Inputs) -> Iterable[Paragraph]:
    """How far a removal from the whole sequence differs from one at the token."""
    rows = inputs.rows("scopes.csv")
    if not rows:
        return
    ratios = [row["mean_abs_sequence"] / row["mean_abs_position"] for row in rows if row["mean_abs_position"]]
    correlations = [row["correlation"] for row in rows]
    text = (
        " Removed from the whole sequence instead of at the token alone, the same experts change the loss "
        f"{_range(ratios, 2)} times as much by layer; the two effects correlate at {_range(correlations, 2)}."
    )
    yield Paragraph(text, "Scope.")


def several(inputs: Inputs) -> Iterable[Paragraph]:
    """What the order of removal does, halfway through the active experts."""
    rows = inputs.rows("progressive.csv")
    if not rows:
        return
    most = max(row["removed"] for row in rows)
    half = max(1, most // 2)
    means = {
        (order, removed): known_mean(row["mean"] for row in rows if (row["order"], row["removed"]) == (order, removed))
        for order in ("descending", "random", "ascending")
        for removed in (half, most)
    }
    words = {"descending": "highest weight first", "random": "at random", "ascending": "lowest weight first"}
    parts = [
        f"{signed(means[order, half], 3)} nats {word}" for order, word in words.items() if not math.isnan(means[order, half])
    ]
    total = next((means[order, most] for order in words if not math.isnan(means[order, most])), math.nan)
    text = (
        f" With {half} of {most} removed the mean loss change over layers is {', '.join(parts)}; with all {most}, "
        f"{signed(total, 3)}."
    )
    yield Paragraph(text, "Several experts at one token.")


FINDINGS: tuple[Callable[[Inputs], Iterable[Paragraph]], ...] = (
    fixed_criteria,
    token_scores,
    sample_power,
    ceiling,
    bayes,
    scope,
    several,
)


# --- wording ------------------------------------------------------------------------------------------------------------------


def _cell_count(cells: Sequence[Row]) -> str:
    over = "all positions" if cells[0]["population"] == "all" else f"{cells[0]['n']} sampled positions"
    return f"{len(cells)} cells of criterion \N{MULTIPLICATION SIGN} layer, over {over}"


def _tally(cells: Sequence[Row]) -> str:
    """Counts by verdict; which rankings are valid or reversed, and where."""
    parts = []
    for verdict in ("valid", "equivalent", "undecided", "reversed", "refused"):
        rows = [row for row in cells if row["verdict"] == verdict]
        if not rows and verdict in ("reversed", "refused"):
            continue
        named = f" ({_where(rows)})" if rows and verdict in ("valid", "reversed") else ""
        parts.append(f"{len(rows)} {VERDICT_WORDS[verdict].name}{named}")
    return ", ".join(parts)


def _where(cells: Sequence[Row]) -> str:
    layers: dict[str, list[int]] = {}
    for row in cells:
        layers.setdefault(row["ranking"], []).append(row["layer"])
    most_first = sorted(layers, key=lambda ranking: -len(layers[ranking]))
    named = [f"{label(ranking)} in {layer_list(layers[ranking])}" for ranking in most_first[:_MOST_NAMED]]
    return "; ".join(named) + (f"; and {len(layers) - _MOST_NAMED} more" if len(layers) > _MOST_NAMED else "")


def _range(values: Sequence[float], digits: int) -> str:
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return "an unknown number of"
    low, high = (f"{value:.{digits}f}" for value in (min(defined), max(defined)))
    return low if low == high else f"{low} to {high}"
