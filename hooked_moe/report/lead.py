"""The first words of the page: which criterion to prune by, what that saves, and how sure it is."""

from hooked_moe.report.blocks import Lead
from hooked_moe.report.figures.names import label
from hooked_moe.report.number_text import enumeration, nats, p_value, sentence_case, share
from hooked_moe.report.savings import KL, MARGIN, Row, Savings, named, saving_text

_FIRST = {"prune lowest": "the lowest first", "prune highest": "the highest first"}


def lead(savings: Savings) -> Lead | None:
    """None for a run without savings."""
    if not savings.totals():
        return None
    if not savings.n_measured:
        return Lead("No criterion could be judged on these data.", f"The table of savings notes: {savings.totals()[0]['note']}.")
    best = savings.recommended
    return _recommendation(savings, best) if best else _no_recommendation(savings)


def _recommendation(savings: Savings, best: Row) -> Lead:
    order = _FIRST.get(best["direction"], "with care: it has no published direction, and the order was chosen on these data")
    headline = (
        f"Prune by {label(best['ranking'])}, {order}: removing the active expert that it would prune first costs "
        f"{share(best['lowest_cost'] / best['random_cost'])} of removing one at random."
    )
    text = (
        f"It saves {saving_text(best)} of the random cost of {nats(best['random_cost'])} nats (95% interval over "
        f"{best['n_documents']:,} documents). {_permutation(savings, best)}{_expected(savings, best)}"
    )
    return Lead(headline, text)


def _permutation(savings: Savings, best: Row) -> str:
    return (
        f"With its scores permuted over the experts, which makes it nonsense, it reaches as much with p = "
        f"{p_value(best['p_family'])} (corrected for the {savings.n_measured} criteria shown)."
    )


def _expected(savings: Savings, best: Row) -> str:
    """Whether the expected loss says the same."""
    expected = savings.total(best["ranking"], KL)
    if expected is None:
        return ""
    agrees = expected["outcome"] == best["outcome"]
    verb = "saves" if agrees else f"is {expected['outcome']}, with"
    return f" By the expected loss (KL) it {verb} {saving_text(expected)}."


def _no_recommendation(savings: Savings) -> Lead:
    undecided, harming = savings.with_outcome("undecided"), savings.with_outcome("harms")
    harm = f" {sentence_case(enumeration(named(harming)))} would prune the wrong experts first." if harming else ""
    if not undecided:
        return Lead(
            "Prune by none of these criteria: none saves more than a tenth of what removing an active expert at random costs.",
            f"For {len(savings.with_outcome('negligible'))} of {savings.n_measured} criteria the whole 95% interval of the "
            f"saving lies within {share(MARGIN)} of the random cost.{harm}",
        )
    top = undecided[0]
    return Lead(
        f"No criterion is shown to help: {len(undecided)} of {savings.n_measured} are undecided on these data.",
        f"{sentence_case(label(top['ranking']))} saves most among them, {saving_text(top)} of the random cost (95% interval over "
        f"{top['n_documents']:,} documents). {_why_undecided(top)}{harm}",
    )


def _why_undecided(top: Row) -> str:
    if top["note"]:
        return f"The table of savings notes: {top['note']}."
    if top["saving_share_low"] > MARGIN:
        return (
            f"The interval lies above {share(MARGIN)}, but criteria with permuted scores reach as much with "
            f"p = {p_value(top['p_family'])}: more documents would not settle that, more experts or layers could."
        )
    return "More documents would narrow the intervals."
