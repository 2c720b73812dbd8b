"""What follows from a run, as sentences that are generated from its tables and say what they say.

They keep three questions apart: what a criterion saves in the mean, whether it orders the active experts of a token, and what a
pruning costs. None is an answer to another.
"""

import math
from collections.abc import Callable, Iterable

from hooked_moe.analysis.rankings import TOLD_THE_TOKEN
from hooked_moe.report.blocks import Paragraph
from hooked_moe.report.figures.names import label
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.number_text import enumeration, interval, layer_list, nats, preset_share, sentence_case, share, signed
from hooked_moe.report.savings import KL, LOSS, Row, Savings, is_measured, named, read_savings

LITTLE_ORDER = 0.1  # a rank correlation below is close to no order


def conclude(inputs: Inputs) -> tuple[Paragraph, ...]:
    """The conclusions that the tables allow."""
    savings = read_savings(inputs)
    sentences = [sentence for conclusion in _ON_SAVINGS for sentence in conclusion(savings)]
    return (*sentences, *_cost(inputs, savings), *_prediction(inputs))


def _alternatives(savings: Savings) -> Iterable[Paragraph]:
    """The other criteria that help."""
    best = savings.recommended
    others = [row for row in savings.with_outcome("helps") if best and row["ranking"] != best["ranking"]]
    if not best or not others:
        return
    text = f" {enumeration(named(others))} of the random cost."
    overlapping = [label(row["ranking"]) for row in others if row["saving_share_high"] >= best["saving_share_low"]]
    if overlapping:
        intervals = "The interval of {} overlaps" if len(overlapping) == 1 else "The intervals of {} overlap"
        text += f" {intervals.format(enumeration(overlapping))} that of {label(best['ranking'])}."
    yield Paragraph(text, "Also shown to help:")


def _unhelpful(savings: Savings) -> Iterable[Paragraph]:
    """The criteria that are negligible, harm, or are undecided beside one that helps."""
    negligible, harming, undecided = (savings.with_outcome(outcome) for outcome in ("negligible", "harms", "undecided"))
    if harming:
        pronoun = "it" if len(harming) == 1 else "them"
        unpublished = [row for row in harming if row["direction"] == "none published"]
        text = f" {enumeration(named(harming))}. Pruning by {pronoun} would take first the experts that matter more."
        for row in unpublished:
            turned = share(row["highest_cost"] / row["random_cost"])
            name = sentence_case(label(row["ranking"]))
            text += f" {name} has no published direction: its highest-ranked expert costs {turned} of a random one."
        yield Paragraph(text, "Shown to harm:")
    if negligible and savings.recommended:
        text = f" {enumeration(named(negligible))}: the whole interval lies within a tenth of the random cost."
        yield Paragraph(text, "Negligible:")
    if undecided and savings.recommended:
        yield Paragraph(f" {enumeration(named(undecided))}.", "Undecided on these data:")
    unmeasured = [label(row["ranking"]) for row in savings.totals() if not is_measured(row)]
    if unmeasured and savings.n_measured:
        yield Paragraph(f" {enumeration(unmeasured)}; the table of savings says why.", "Not judged:")


def _by_layer(savings: Savings) -> Iterable[Paragraph]:
    """Whether the recommendation holds layer by layer."""
    best = savings.recommended
    rows = savings.by_layer(best["ranking"]) if best else []
    if not best or not rows:
        return
    helping = [row for row in rows if row["outcome"] == "helps"]
    shares = [row["saving_share"] for row in rows if not math.isnan(row["saving_share"])]
    spread = f", and saves {share(min(shares))} to {share(max(shares))} of the random cost there" if len(shares) > 1 else ""
    others = [int(row["layer"]) for row in rows if row["outcome"] != "helps"]
    where = f" It is not shown to in {layer_list(others)}." if others else ""
    text = f" {sentence_case(label(best['ranking']))} helps in {len(helping)} of {len(rows)} layers{spread}.{where}"
    yield Paragraph(text, "By layer.")


def _oracle(savings: Savings) -> Iterable[Paragraph]:
    """How much a better fixed ranking could add."""
    best = savings.recommended
    oracle = next(iter(savings.totals(LOSS, ("oracle",))), None)
    if not best or oracle is None or math.isnan(best["share_of_best"]):
        return
    text = (
        f" A ranking by the mean effects measured on other documents saves {share(oracle['saving_share'])}; "
        f"{label(best['ranking'])} reaches {share(best['share_of_best'])} of that."
    )
    yield Paragraph(text, "Against the measured effects.")


def _order(savings: Savings) -> Iterable[Paragraph]:
    """Order is another question than the mean: realised and expected effects answer it differently."""
    realised = _most_correlated(savings, LOSS)
    if realised is None:
        return
    text = f" Within a position, no fixed criterion's rank correlation with the realised loss exceeds {_rho(realised)}"
    text += f" ({label(realised['ranking'])})"
    if realised["spearman"] < LITTLE_ORDER:
        text += ": how a removal changes the loss of the one token that followed is close to unpredictable in order"
    text += "."
    exact = savings.total("kl", LOSS)
    if exact is not None and not math.isnan(exact["spearman"]):
        text += f" Even the exact expected change of the same removals (KL) orders the realised ones with {_rho(exact)} only."
    expected = _most_correlated(savings, KL)
    if expected is not None:
        text += f" With the expected loss (KL) the highest is {_rho(expected)} ({label(expected['ranking'])})"
        token = _most_correlated(savings, KL, ("token",))
        text += f"; of the token's own scores it is {_rho(token)} ({label(token['ranking'])})." if token else "."
    yield Paragraph(text, "Order is another question than the mean.")


def _rho(row: Row) -> str:
    return signed(row["spearman"], 3)


def _most_correlated(savings: Savings, effect: str, families: tuple[str, ...] = ("paper", "extended")) -> Row | None:
    """The first-order estimates are left out: they know the token that followed."""
    rows = [row for row in savings.totals(effect, families) if row["ranking"] not in TOLD_THE_TOKEN]
    rows = [row for row in rows if not math.isnan(row["spearman"])]
    return max(rows, key=lambda row: float(row["spearman"]), default=None)


def _mechanism(savings: Savings) -> Iterable[Paragraph]:
    """How much of the criterion's effect runs through the rank of the routing weight."""
    best = savings.recommended
    if not best or math.isnan(best["slot_share"]):
        return
    low, high = best["within_slot_contrast_low"], best["within_slot_contrast_high"]
    ends = f"{signed(best['within_slot_contrast'], 4)} nats {interval(low, high, 4)}"
    within = "differ" if low > 0 or high < 0 else "are not shown to differ"
    text = (
        f" {share(best['slot_share'])} of the difference between the experts that {label(best['ranking'])} prunes last and first "
        f"runs through the slots they hold, the rank of the token's own routing weight. Within a slot they {within}: {ends}."
    )
    yield Paragraph(text, "How it works.")


_ON_SAVINGS: tuple[Callable[[Savings], Iterable[Paragraph]], ...] = (
    _alternatives,
    _unhelpful,
    _by_layer,
    _oracle,
    _order,
    _mechanism,
)


# --- pruning -----------------------------------------------------------------------------------------------------------------


def _cost(inputs: Inputs, savings: Savings) -> Iterable[Paragraph]:
    """What pruning by the recommended criterion costs, at each share that was tried."""
    best = savings.recommended
    rows = [row for row in inputs.rows("pruning.csv") if best and (row["ranking"], row["per"]) == (best["ranking"], "layer")]
    if not best or not rows:
        return
    parts = [
        f"{preset_share(row['share'])}: {nats(row['rise'])} nats {interval(row['rise_low'], row['rise_high'], 4)}, "
        f"{share(row['share_of_random'])} of pruning at random"
        for row in sorted(rows, key=lambda row: float(row["share"]))
    ]
    text = f" Rise in loss when {label(best['ranking'])} prunes a share of the experts of every layer. {'; '.join(parts)}."
    yield Paragraph(text, "What a pruning costs.")


def _prediction(inputs: Inputs) -> Iterable[Paragraph]:
    """How well the effect table predicts it."""
    rows = [row for row in inputs.rows("pruning_summary.csv") if row["population"] == "criteria"]
    if not rows:
        return
    rows.sort(key=lambda row: float(row["share"]))
    parts = [f"{preset_share(row['share'])}: {signed(row['spearman'], 2)}, {row['ratio']:.2f} times" for row in rows]
    text = (
        " The summed single-token effects of the experts removed, measured on other documents, against the measured rise. Rank "
        f"correlation over the criteria, and measured over predicted rise (median), by share pruned. {'; '.join(parts)}."
    )
    yield Paragraph(text, "The effect table predicts the cost.")
