"""What the report reads off savings.csv: which criteria help, and by how much.

The effect is either "delta_loss", the change of the loss of the token that followed, or "kl", its expectation over the model's
own next-token distribution. Verdicts are those of the loss over all layers together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hooked_moe.report.figures.names import FIXED_FAMILIES, label
from hooked_moe.report.inputs import Inputs
from hooked_moe.report.number_text import share, share_interval
from hooked_moe.statistics import NEGLIGIBLE_SHARE

Row = dict[str, Any]

LOSS, KL = "delta_loss", "kl"
EFFECT_TITLES = {LOSS: "realised loss", KL: "expected loss (KL)"}
TOTAL = "all"
MARGIN = NEGLIGIBLE_SHARE
"""Share of the random cost within which a saving is negligible, as the analysis decides the outcomes."""


@dataclass(frozen=True)
class Savings:
    """The rows of savings.csv; empty where the run has none."""

    rows: Sequence[Row]

    def totals(self, effect: str = LOSS, families: Sequence[str] = FIXED_FAMILIES) -> list[Row]:
        """All layers together, a row for each ranking, by falling saving; those that were not measured last."""
        rows = [row for row in self.rows if (row["effect"], row["layer"]) == (effect, TOTAL) and row["family"] in families]
        return sorted(rows, key=lambda row: -row["saving_share"] if is_measured(row) else math.inf)

    def total(self, ranking: str, effect: str = LOSS) -> Row | None:
        return next((row for row in self.totals(effect, FAMILIES) if row["ranking"] == ranking), None)

    def by_layer(self, ranking: str, effect: str = LOSS) -> list[Row]:
        """One ranking, a row for each layer."""
        rows = [row for row in self.rows if (row["ranking"], row["effect"]) == (ranking, effect) and row["layer"] != TOTAL]
        return sorted(rows, key=lambda row: int(row["layer"]))

    def with_outcome(self, outcome: str) -> list[Row]:
        """The fixed criteria of an outcome, by falling saving; a criterion that was not measured has none."""
        return [row for row in self.totals() if row["outcome"] == outcome and is_measured(row)]

    @property
    def n_measured(self) -> int:
        """Fixed criteria that were measured."""
        return sum(map(is_measured, self.totals()))

    @property
    def recommended(self) -> Row | None:
        """The criterion that saves most among those that help; one with a published direction where there is any."""
        helping = self.with_outcome("helps")
        published = [row for row in helping if row["direction"] != "none published"]
        return next(iter(published or helping), None)


FAMILIES = (*FIXED_FAMILIES, "token", "oracle")


def read_savings(inputs: Inputs) -> Savings:
    return Savings(inputs.rows("savings.csv"))


def is_measured(row: Row) -> bool:
    return not math.isnan(row["saving_share"])


def saving_text(row: Row) -> str:
    """ "62% [58%, 66%]"; without the interval where the documents are too few for one."""
    if math.isnan(row["saving_share_low"]):
        return share(row["saving_share"])
    return f"{share(row['saving_share'])} {share_interval(row['saving_share_low'], row['saving_share_high'])}"


def named(rows: Sequence[Row], most: int = 6) -> list[str]:
    """The rankings with what they save; those beyond `most` are counted."""
    names = [f"{label(row['ranking'])} ({share(row['saving_share'])})" for row in rows[:most]]
    return [*names, f"{len(rows) - most} more"] if len(rows) > most else names
