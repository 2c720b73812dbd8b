"""What to do after reading the verdict: the next commands, from what was found and from what is not measured yet."""

from hooked_moe.analysis.pruning_orders import RANKINGS
from hooked_moe.report.blocks import Action
from hooked_moe.report.budgeted_sections import is_budgeted
from hooked_moe.report.figures.names import label
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.number_text import nats, preset_share, share
from hooked_moe.report.savings import Row, Savings, read_savings

SHARE = 0.25
"""Of the experts, in the commands shown."""


def actions(inputs: Inputs) -> tuple[Action, ...]:
    """The next steps, the first one first."""
    savings = read_savings(inputs)
    best = savings.recommended
    steps = [*_without_a_criterion(savings)] if best is None else [*_with(inputs, best)]
    if is_budgeted(inputs):
        return (*steps, Action("For what a sample cannot tell, and to compare runs, make all removals: leave out --budget."))
    return (*steps, Action("Ask the same of another model or text, and compare:", "hooked-moe compare-runs RUN OTHER_RUN"))


def _with(inputs: Inputs, best: Row) -> tuple[Action, ...]:
    """See what a pruning costs, then prune."""
    model, name = inputs.value("model", "name") or "MODEL", best["ranking"]
    rows = [row for row in inputs.rows("pruning.csv") if (row["ranking"], row["per"]) == (name, "layer")]
    if rows:
        row = min(rows, key=lambda row: abs(row["share"] - SHARE))
        cost = Action(
            f"Mind the cost: without {preset_share(row['share'])} of the experts of every layer the loss rises by "
            f"{nats(row['rise'])} nats, {share(row['share_of_random'])} of what pruning at random costs."
        )
    else:
        cost = Action(
            "See what pruning for good would cost, at several shares of the experts (with the corpus and settings of this run):",
            f"hooked-moe prune --model {model}",
        )
    if name not in RANKINGS:
        return (cost,)
    save = f"hooked-moe prune --model {model} --criterion {name} --shares {SHARE:g} --save pruned"
    return cost, Action(f"Then prune by {label(name)}; the smaller checkpoint is for transformers too:", save)


def _without_a_criterion(savings: Savings) -> tuple[Action, ...]:
    if savings.with_outcome("undecided"):
        return (Action("Prune by none of these yet: give the audit more documents, which narrow the intervals."),)
    return (
        (Action("Do not prune by these criteria: on this text they choose no better than chance."),) if savings.totals() else ()
    )
