"""From the responses of the factor study's runs to effects of the factors, and to what the runs in hand confound.

Runs of one seed each are the units: the documents of an audit do not enter here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hooked_moe.analysis.factors import DESIGN, FACTORS
from hooked_moe.analysis.responses import ALL_LAYERS
from hooked_moe.statistics import DegenerateSample
from hooked_moe.statistics.contrasts import effect_outcome, factor_effects
from hooked_moe.statistics.factorial import Word, informative_order

MINIMUM_ROUTED_PART = 0.1
"""Nats that a layer's routed experts must be worth together, on average, for a run to count."""
ANY_ROUTED_PART = -np.inf
"""In the place of that: every run is taken, as a description outside the rule that was written down."""
RUN, SHUFFLED = "run", "shuffled"
HALF = 8
"""The first half of the runs tells the main effects apart; a few more leave no error to judge by."""


class Primary(NamedTuple):
    """A response named before the runs were made, and how small an effect on it is negligible."""

    label: str
    bound: float


PRIMARY = {
    "reap_saving_kl": Primary("saving of REAP, expected effect", 0.10),
    "control_d": Primary("d of the routing weight", 0.10),
    "last_layer_control_d": Primary("that d, last layer less others", 0.10),
    "last_layer_log_delta": Primary("log mean |Δ loss|, last less others", 0.10),
    "log_mean_kl": Primary("log mean KL of a removal", 0.10),
    "log_kl_ceiling": Primary("log KL's variance between experts", 0.05),
    "best_paper_spearman": Primary("best rank correlation of the four", 0.05),
    "prune_reap_over_random": Primary("pruning: REAP over random", 0.10),
}
COLUMN_OF = {"reap_saving_kl": "saving_reap_kl", "control_d": "d_control"}
"""Columns of responses.csv whose names differ from those under which responses were announced."""
_IDENTITY = ("kind", "seed", "run", *FACTORS, "layer")


class RunsInHand(NamedTuple):
    """Design points with at least one run that counts, in the order in which they are made."""

    runs: list[int]
    seeds: list[int]
    levels: Float[np.ndarray, "run factor"]
    not_counted: list[tuple[int, int]]
    """(run, seed) whose routed experts are worth too little."""


def response_columns(responses: pa.Table) -> list[str]:
    """The responses of a table: primary ones first, under the names they were announced by."""
    others = [name for name in responses.column_names if name not in (*_IDENTITY, *COLUMN_OF.values(), *PRIMARY)]
    return [*PRIMARY, *others]


class Analysis(NamedTuple):
    """Effects of the runs that are taken, or why there are none; and what these runs confound."""

    effects: pa.Table | None
    aliases: pa.Table
    why_not: str


def runs_made(responses: pa.Table) -> list[dict[str, Any]]:
    """Each run of one seed once, with the responses of its layers together."""
    rows: list[dict[str, Any]] = responses.to_pylist()
    return [row for row in rows if row["kind"] == RUN and row["layer"] == ALL_LAYERS]


def counts(run: dict[str, Any]) -> bool:
    """Whether a run counts by the rule that was written down before: its experts are worth enough."""
    return bool(run["routed_part"] >= MINIMUM_ROUTED_PART)


def some_do_not_count(responses: pa.Table) -> bool:
    """Whether there are runs that the rule leaves out."""
    return not all(map(counts, runs_made(responses)))


def analysed(responses: pa.Table, least: float = MINIMUM_ROUTED_PART) -> Analysis:
    """The effects of the runs whose routed part is worth at least this, where these runs can tell the factors apart."""
    try:
        runs = runs_in_hand(responses, least).runs
        return Analysis(effects_table(responses, least), alias_table(runs), "")
    except DegenerateSample as reason:
        return Analysis(None, alias_table(range(len(DESIGN.levels()))), str(reason))


def runs_in_hand(responses: pa.Table, least: float = MINIMUM_ROUTED_PART) -> RunsInHand:
    """The runs to estimate from. Raises `DegenerateSample` for runs that cannot tell seven factors apart.

    All that count, where there are 11 or more: nine or ten leave no error to judge by. Else one of the design's two orthogonal
    halves, if all of it counts. A seed that has not made them all yet is left to `seed_deviation`, if another has.
    """
    rows = runs_made(responses)
    weak = [(row["run"], row["seed"]) for row in rows if not row["routed_part"] >= least]
    counted = {row["run"] for row in rows if (row["run"], row["seed"]) not in weak}
    levels = DESIGN.levels()
    order = informative_order(levels)
    sets = [[run for run in order if run in counted], order[:HALF], order[HALF:]]
    runs = next((chosen for chosen in sets if counted.issuperset(chosen) and _tell_factors_apart(levels[chosen])), None)
    if runs is None:
        needed = f"{HALF} are needed" if len(counted) < HALF else f"{HALF + 3}, or the right {HALF}, are needed"
        one, several = ("counts", "count") if least > ANY_ROUTED_PART else ("is made", "are made")
        had = f"{len(counted)} run {one}" if len(counted) == 1 else f"{len(counted)} runs {several}"
        raise DegenerateSample(f"{had} so far; {needed} to tell {len(FACTORS)} factors apart")
    made = {(row["run"], row["seed"]) for row in rows if row["run"] in runs} - set(weak)
    seeds = sorted({seed for _, seed in made})
    complete = [seed for seed in seeds if all((run, seed) in made for run in runs)]
    return RunsInHand(runs, complete or seeds, levels[runs], weak)


def _tell_factors_apart(levels: Float[np.ndarray, "run factor"]) -> bool:
    """Whether these runs give all main effects, and an error to judge them by: an orthogonal half does (Lenth's)."""
    X = np.column_stack([np.ones(len(levels)), levels])
    if len(X) < HALF + 3:
        return bool(np.array_equal(X.T @ X, HALF * np.eye(X.shape[1])))
    return bool(np.linalg.matrix_rank(X) == X.shape[1])


def effects_table(responses: pa.Table, least: float = MINIMUM_ROUTED_PART) -> pa.Table:
    """One row per response and factor: the effect, its 95% interval and Holm-corrected p, what may be said of it, and the size
    that this many runs would find. Responses that are undefined in a run, or alike in all, are left out."""
    hand = runs_in_hand(responses, least)
    rows: list[dict[str, Any]] = []
    for name in response_columns(responses):
        y = _values(responses, COLUMN_OF.get(name, name), hand)
        if np.isnan(y).all(axis=1).any() or np.nanstd(y) == 0:
            continue
        effects = factor_effects(hand.levels, y)
        bound = PRIMARY[name].bound if name in PRIMARY else np.nan
        for index, factor in enumerate(FACTORS.values()):
            low, high, p = (float(values[index]) for values in (effects.low, effects.high, effects.p_holm))
            rows.append(
                {
                    "response": name,
                    "primary": name in PRIMARY,
                    "factor": factor.name,
                    "label": factor.label,
                    "effect": float(effects.estimate[index]),
                    "low": low,
                    "high": high,
                    "p": float(effects.p[index]),
                    "p_holm": p,
                    "negligible_within": bound,
                    "outcome": effect_outcome(low, high, p, bound),
                    "detectable": effects.detectable,
                    "se": effects.se,
                    "df": effects.df,
                    "error": effects.method,
                    "n_runs": effects.n_runs,
                    "n_seeds": effects.n_seeds,
                }
            )
    return pa.Table.from_pylist(rows)


def alias_table(runs: Sequence[int]) -> pa.Table:
    """What cannot be told apart, computed: in the whole design, from its generators; in the runs in hand, from their levels.

    `in_these_runs` gives, for main effects, the interactions of two factors that an estimate also holds, with their coefficients.
    """
    levels = DESIGN.levels()[list(runs)]
    pairs = [Word(names) for names in combinations(DESIGN.factors, 2)]
    X = np.column_stack([np.ones(len(levels)), levels])
    Z = np.column_stack([DESIGN.column(pair)[list(runs)] for pair in pairs])
    mixed = np.linalg.lstsq(X, Z, rcond=None)[0][1:]
    rows = []
    for own in DESIGN.alias_sets():
        first = own[0]
        here = "" if len(first) > 1 else _terms(mixed[DESIGN.factors.index(next(iter(first)))], pairs)
        rows.append(
            {
                "effect": DESIGN.name_of(first),
                "aliases": ", ".join(map(DESIGN.name_of, own[1:])),
                "in_these_runs": here,
            }
        )
    return pa.Table.from_pylist(rows)


def seed_deviation(responses: pa.Table, name: str) -> tuple[float, int]:
    """Standard deviation between seeds of the same run, after each seed's own mean, over the runs made with several; and its
    degrees of freedom. (NaN, 0) where no run has two seeds."""
    rows = runs_made(responses)
    seeds = sorted({row["seed"] for row in rows})
    by_run: dict[int, dict[int, float]] = {}
    for row in rows:
        by_run.setdefault(row["run"], {})[row["seed"]] = row[COLUMN_OF.get(name, name)]
    repeated = np.array([[values.get(seed, np.nan) for seed in seeds] for values in by_run.values() if len(values) > 1])
    if len(seeds) < 2 or len(repeated) < 2 or np.isnan(repeated).any():
        return np.nan, 0
    error = repeated - repeated.mean(axis=1, keepdims=True) - repeated.mean(axis=0, keepdims=True) + repeated.mean()
    df = (len(repeated) - 1) * (len(seeds) - 1)
    return float(np.sqrt((error**2).sum() / df)), df


def _terms(coefficients: Float[np.ndarray, " pair"], pairs: Sequence[Word]) -> str:
    return " ".join(
        f"{value:+.2g} {DESIGN.name_of(pair)}" for value, pair in zip(coefficients, pairs, strict=True) if abs(value) > 1e-9
    )


def _values(responses: pa.Table, column: str, hand: RunsInHand) -> Float[np.ndarray, "run seed"]:
    y = np.full((len(hand.runs), len(hand.seeds)), np.nan)
    for row in runs_made(responses):
        if row["run"] in hand.runs and row["seed"] in hand.seeds and (row["run"], row["seed"]) not in hand.not_counted:
            y[hand.runs.index(row["run"]), hand.seeds.index(row["seed"])] = row[column]
    return y
