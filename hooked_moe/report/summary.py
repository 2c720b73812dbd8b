"""What a run shows, in plain words: every sentence is generated from the derived tables, and says what they say."""

import math
from collections.abc import Callable, Iterable, Sequence

from hooked_moe.analysis.rankings import ROUTING_WEIGHT
from hooked_moe.report.actions import actions
from hooked_moe.report.blocks import Block, Figure, Links, Opening, Paragraph, Summary
from hooked_moe.report.budgeted_sections import budget_notice, is_budgeted
from hooked_moe.report.conclusions import conclude
from hooked_moe.report.figures.names import FIXED_FAMILIES, label
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.lead import lead
from hooked_moe.report.number_text import enumeration, layer_list, share, signed
from hooked_moe.report.readings import Row, ceiling_reading, known_mean, position_cells
from hooked_moe.report.reread import reread_sentences
from hooked_moe.report.savings import read_savings

_MOST_NAMED = 5  # rankings named in a sentence; the others are counted
_SMALLEST_CEILING = 0.001  # shares of a smaller ceiling are noise


def opening(inputs: Inputs, figure: tuple[Figure, ...], links: tuple[Links, ...] = ()) -> tuple[Block, ...]:
    """The top of the page: the verdict, its picture, what to do, other pages; then conclusions, what was measured and found."""
    verdict = lead(read_savings(inputs))
    conclusions, findings = conclude(inputs), tuple(finding for find in FINDINGS for finding in find(inputs))
    blocks: list[Block] = [Opening(verdict.headline, figure, actions(inputs), verdict.text)] if verdict else [*figure]
    blocks += budget_notice(inputs)
    blocks += links
    if conclusions:
        blocks.append(Summary("What to conclude", conclusions, "conclusion"))
    if not is_budgeted(inputs):
        blocks.append(measured(inputs))
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


def paper_protocol(inputs: Inputs) -> Iterable[Paragraph]:
    """What the agreement rule detects, on the paper's sample and over all positions, and what the sample could not have seen."""
    sample = _detected(inputs, "sample")
    if sample:
        first = next(row for row in position_cells(inputs, "sample", ("paper",)) if row["outcome"] != "refused")
        text = (
            f" On {first['n']} sampled positions, its agreement rule detects a difference in {sample}. Such a cell detects "
            f"d = 0.2 with probability {first['power_at_d02']:.2f} and needs d = {first['minimal_detectable_d']:.3f} for 0.8: "
            "its silence is no evidence of absence."
        )
        yield Paragraph(text, "The paper's protocol.")
    whole = _detected(inputs, "all")
    if whole:
        yield Paragraph(f" Over all positions, with documents as the unit, it detects one in {whole}.", "The same tests.")


def released_data(inputs: Inputs) -> Iterable[Paragraph]:
    """What the paper's released raw data say when they are read in nats."""
    for sentence in reread_sentences(inputs.rows("reread.csv")):
        yield Paragraph(f" {sentence}", "The paper's released data.")


def ceiling(inputs: Inputs) -> Iterable[Paragraph]:
    """What any fixed ranking could explain, and what the criteria explain when they are used linearly."""
    reading = ceiling_reading(inputs)
    if reading is None:
        return
    text = (
        f" {share(reading.ceiling)} of the variance of realised effects within a position lies between experts (mean over "
        "layers): no ranking fixed for the corpus can explain more of it."
    )
    if reading.ceiling >= _SMALLEST_CEILING:
        text += f" Used linearly, {label(reading.best)} explains {share(reading.best_share)} of that"
        text += "." if math.isnan(reading.oracle_share) else f", the oracle {share(reading.oracle_share)}."
    yield Paragraph(text + " Savings are means; a share of variance does not bound them.", "Static ceiling.")


def bayes(inputs: Inputs) -> Iterable[Paragraph]:
    """What each kind of ranking gains over chance in documents left out, and which criteria the stack rests on."""
    rows = inputs.rows("bayes.csv")
    leaders = []
    for families in (("token",), ("oracle",), FIXED_FAMILIES):
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


FINDINGS: tuple[Callable[[Inputs], Iterable[Paragraph]], ...] = (paper_protocol, released_data, ceiling, bayes, scope, several)


# --- wording ------------------------------------------------------------------------------------------------------------------


def _detected(inputs: Inputs, population: str) -> str:
    """How many cells of the paper's criteria, and of the control, the agreement rule detects; empty where all were refused."""
    parts = []
    for name, families, rankings in (("the paper's criteria", ("paper",), None), ("the control", ("token",), (ROUTING_WEIGHT,))):
        cells = [row for row in position_cells(inputs, population, families) if rankings is None or row["ranking"] in rankings]
        tested = [row for row in cells if row["outcome"] != "refused"]
        if tested:
            detected = [row for row in tested if row["outcome"] in ("positive", "negative")]
            where = f" ({_where(detected)})" if detected and rankings is None else ""
            parts.append(f"{len(detected)} of {len(tested)} cells of {name}{where}")
    return " and ".join(parts) if any("criteria" in part for part in parts) else ""


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
