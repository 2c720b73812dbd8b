"""How often every decision rule errs, and finds what is there, on effect tables whose truth is planted.

python -m benchmarks.calibration                  # 1,000 runs of each, six minutes on a quiet core; writes CALIBRATION.md
python -m benchmarks.calibration --runs 4000
python -m benchmarks.calibration --small          # seconds; shows that it works, and prints what it finds instead
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.stats
from tqdm import tqdm

from benchmarks import planted_effects as planted
from benchmarks import saving_rules
from benchmarks.decision_rules import ALPHA, BOUND, EVIDENCE, SAMPLE, Decisions, decisions
from benchmarks.planted_effects import planted_table
from benchmarks.tables import Table, write_or_print
from hooked_moe import statistics as stat
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.statistics.choice_model import PRIOR_SD

HERE = Path(__file__).resolve().parent
DOCUMENTS, FEW, TOKENS, RANKINGS = 48, 12, 40, 3
NOTHING, PLANTED = (0.0, 0.0, 0.0), (BOUND, 0.2, 0.0)
"""d over positions of the first ranking in each layer; rankings in layers of 0 are all blind."""
CELLS = RANKINGS * len(PLANTED)
STATIC_SPREAD = 0.15
T = TypeVar("T")


@dataclass(frozen=True)
class Rate:
    """A mean over runs, whose cells are not independent, with its Monte Carlo standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, per_run: Sequence[float] | np.ndarray) -> Rate:
        values = np.asarray(per_run, float)
        return cls(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))

    def above(self, nominal: float) -> bool:
        """By more than two Monte Carlo errors."""
        return self.mean - 2 * self.error > nominal

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}% ± {100 * self.error:.1f}"


class Runs:
    """What the rules said in each run of a scenario: rule -> [run, layer, ranking]."""

    def __init__(self, runs: int, documents: int, effects: Sequence[float], seed: int, processes: int = 1) -> None:
        self.effects = np.asarray(effects)
        work = functools.partial(_decided, documents, effects)
        told = _each(work, runs, seed, processes, f"{documents} documents, d = {effects}")
        self.said = {rule: np.array([one[rule] for one in told], float) for rule in told[0]}

    def rate(self, rule: str, effect: float) -> Rate:
        """Of cells whose first ranking has the effect; for effect 0, of all blind cells."""
        return Rate.of(np.nanmean(self._cells(rule, effect), axis=(1, 2)))

    def any(self, rule: str, effect: float = 0.0) -> Rate:
        """Of runs in which it speaks of any such cell."""
        return Rate.of(np.nanmax(self._cells(rule, effect), axis=(1, 2)))

    def false_discoveries(self, rule: str) -> Rate:
        """Share of blind cells among those found whose truth is known; 0 where none is found."""
        blind = np.nansum(self._cells(rule, 0.0), axis=(1, 2))
        seen = self.said[rule][:, self.effects != 0, 0].sum(axis=1)
        return Rate.of(blind / np.maximum(blind + seen, 1))

    def _cells(self, rule: str, effect: float) -> np.ndarray:
        layers = self.said[rule][:, self.effects == effect]
        return layers if effect == 0 else layers[:, :, :1]


def _decided(documents: int, effects: Sequence[float], run: int, random: np.random.Generator) -> Decisions:
    return decisions(planted_table(random, documents, effects, tokens=TOKENS, rankings=RANKINGS), run)


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = options().parse_args(argv)
    runs = args.runs or (20 if args.small else 1000)
    started = time.perf_counter()
    tables = calibrate(runs, args.seed, args.processes)
    page = "\n".join([*_heading(runs, args.seed, time.perf_counter() - started, args.processes), *map(str, tables)])
    write_or_print(page, None if args.small else args.out)
    return tables


def options() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--small", action="store_true", help="seconds; shows that it works, measures nothing")
    result.add_argument("--runs", type=int, help="of each scenario (default: 1000, with --small 20)")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--processes", type=int, default=1, help="the numbers are the same for any (default: 1)")
    result.add_argument("--out", type=Path, default=HERE / "CALIBRATION.md", help="the page (default: benchmarks/CALIBRATION.md)")
    return result


def calibrate(runs: int, seed: int = 0, processes: int = 1) -> list[Table]:
    blind = Runs(runs, DOCUMENTS, NOTHING, seed, processes)
    few = Runs(runs, FEW, NOTHING, seed + 1, processes)
    seeing = Runs(runs, DOCUMENTS, PLANTED, seed + 2, processes)
    return [
        single_cells(blind, few),
        families(blind, few, seeing),
        power(blind, seeing),
        equivalence(blind, seeing),
        verdicts(blind, seeing),
        bayes_factors(blind, few, seeing),
        ceilings(runs, seed + 3, processes),
        stacked(runs, seed + 5, processes),
        *saving_outcomes(runs, seed + 7, processes),
    ]


def single_cells(blind: Runs, few: Runs) -> Table:
    rules = {
        f"t over {SAMPLE} sampled positions": "sample: t",
        f"Wilcoxon over {SAMPLE} sampled positions": "sample: Wilcoxon",
        f"exact 95% interval of d over {SAMPLE} sampled positions excludes 0": "sample: d interval misses",
        "t over documents": "documents: t",
        "Wilcoxon over documents": "documents: Wilcoxon",
        "sign flip over documents": "documents: sign flip",
        "95% interval of d over all positions (jackknife over documents) excludes 0": "d: interval misses",
        "95% interval of within-position Spearman (bootstrap-t over documents) excludes 0": "Spearman: interval excludes 0",
        "Plackett-Luce, beta beyond 97.5% of t with documents - 1": "Plackett-Luce, beta",
        "for comparison, no rule of the audit: t over all positions": "all positions as if independent: t",
    }
    rows = [[text, *(_judged(runs.rate(rule, 0.0), ALPHA) for runs in (blind, few))] for text, rule in rules.items()]
    return Table(
        "One cell, nothing planted",
        f"How often a rule finds what is not there; nominal {ALPHA:.0%}.",
        ["rule", f"{DOCUMENTS} documents", f"{FEW} documents"],
        rows,
    )


def families(blind: Runs, few: Runs, seeing: Runs) -> Table:
    rules = ["Bonferroni", "Holm", "BH"]
    rows = []
    for unit in ("sample", "documents"):
        for rule in [*rules, "agreement", *(["max-T"] if unit == "documents" else [])]:
            name = f"{unit}: {rule}"
            found = [_judged(runs.any(name), ALPHA) for runs in (blind, few)]
            share = seeing.false_discoveries(name)
            rows.append(
                [name, *found, _judged(seeing.any(name), ALPHA) if rule != "BH" else "not its aim", _judged(share, ALPHA)]
            )
    return Table(
        f"A family of {CELLS} cells: any finding among the blind",
        f"Runs with a false finding; nominal {ALPHA:.0%}. Bonferroni, Holm and BH adjust the p of t; agreement wants t and "
        "Wilcoxon's test after Bonferroni. Last columns: two of the cells planted, as in the next table.",
        ["rule", f"{DOCUMENTS} documents", f"{FEW} documents", "two cells planted", "false discovery rate, two planted"],
        rows,
    )


def power(blind: Runs, seeing: Runs) -> Table:
    inflation = blind.rate("design effect", 0.0).mean
    rows = []
    for effect in PLANTED[:2]:
        by_document = effect * np.sqrt(TOKENS / inflation)
        for unit, n, d in (("sample", SAMPLE, effect), ("documents", DOCUMENTS, by_document)):
            predicted = f"{stat.power_paired_t(d, n, ALPHA / CELLS):.1%}"
            rows.append([f"{effect:g}", f"{unit}: Bonferroni", str(seeing.rate(f"{unit}: Bonferroni", effect)), predicted])
            rows += [
                [f"{effect:g}", f"{unit}: {rule}", str(seeing.rate(f"{unit}: {rule}", effect)), ""]
                for rule in ("Holm", "BH", "agreement", *(("max-T",) if unit == "documents" else ()))
            ]
        rows.append(
            [f"{effect:g}", "Spearman: interval excludes 0", str(seeing.rate("Spearman: interval excludes 0", effect)), ""]
        )
        rows.append([f"{effect:g}", "Plackett-Luce, beta (one test)", str(seeing.rate("Plackett-Luce, beta", effect)), ""])
    return Table(
        f"Power in a family of {CELLS} cells, {DOCUMENTS} documents of {TOKENS} positions",
        f"Planted: a d over positions of {PLANTED[0]:g} in one cell and of {PLANTED[1]:g} in another. Prediction: "
        "`power_paired_t`, which supposes normal differences; over documents d grows by sqrt(positions / design effect), the "
        f"design effect here being {inflation:.2f}.",
        ["planted d", "rule", "found", "predicted"],
        rows,
    )


def equivalence(blind: Runs, seeing: Runs) -> Table:
    rows = []
    for effect, runs in ((0.0, blind), (BOUND, seeing), (0.2, seeing)):
        rates = [runs.rate(f"{unit}: equivalent", effect) for unit in ("documents", "sample")]
        shown = [_judged(rate, ALPHA) for rate in rates] if effect == BOUND else list(map(str, rates))
        misses = runs.rate("d: interval misses", effect), runs.rate("sample: d interval misses", effect)
        rows.append([f"{effect:g}", *shown, *(_judged(rate, ALPHA) for rate in misses)])
    return Table(
        f"TOST on d, bound {BOUND:g} in d over positions",
        "`statistics.equivalence`, from which no verdict follows. "
        f"At the bound itself it may be declared in {ALPHA:.0%} of runs, at 0 it should be. The intervals may miss the planted d "
        f"in {ALPHA:.0%}.",
        [
            "planted d",
            "equivalent, all positions",
            f"equivalent, {SAMPLE} sampled",
            "95% interval of d misses it, all positions",
            f"the same, {SAMPLE} sampled",
        ],
        rows,
    )


def verdicts(blind: Runs, seeing: Runs) -> Table:
    names = ("valid", "undecided", "reversed")
    rows = [
        [f"{effect:g}", unit, *(str(runs.rate(f"{unit}: verdict {name}", effect)) for name in names)]
        for effect, runs in ((0.0, blind), (BOUND, seeing), (0.2, seeing))
        for unit in ("documents", "sample")
    ]
    meaning = "What a cell is said to show by the agreement rule (alpha over all cells of the family), the paper's protocol."
    return Table("Verdicts of the paper's protocol", meaning, ["planted d", "unit", *names], rows)


def bayes_factors(blind: Runs, few: Runs, seeing: Runs) -> Table:
    rows = [
        [
            rule,
            *(_judged(runs.rate(rule, 0.0), 1 / EVIDENCE) for runs in (blind, few)),
            *(str(seeing.rate(rule, d)) for d in PLANTED[:2]),
        ]
        for rule in ("JZS", "directional JZS", "Plackett-Luce, Savage-Dickey")
    ]
    return Table(
        f"Bayes factors above {EVIDENCE:g}",
        f"They have no nominal level; where nothing is, a Bayes factor exceeds {EVIDENCE:g} in at most 1 of {EVIDENCE:g} runs. "
        "JZS is over the slopes of documents, with prior scale .7071; Plackett-Luce has a normal prior of "
        f"standard deviation {PRIOR_SD:g}.",
        ["Bayes factor", f"nothing, {DOCUMENTS} documents", f"nothing, {FEW} documents", *(f"d = {d:g}" for d in PLANTED[:2])],
        rows,
    )


def ceilings(runs: int, seed: int, processes: int = 1) -> Table:
    rows = []
    for spread in (0.0, STATIC_SPREAD):
        work = functools.partial(_ceiling, spread)
        told = np.array(_each(work, runs, seed + int(spread > 0), processes, f"static ceiling, spread {spread:g}"))
        truth, estimate, reach, naive, oracle = told.T
        missed, above = np.abs(estimate - truth) > reach, estimate > reach
        bias = Rate.of(np.subtract(estimate, truth))
        means = [f"{100 * np.mean(x):.2f}%" for x in (truth, estimate)]
        rows.append(
            [
                *means,
                f"{100 * bias.mean:+.2f} ± {100 * bias.error:.2f}",
                _judged(Rate.of(missed), ALPHA),
                str(Rate.of(above)),
                *(f"{100 * np.mean(x):.2f}%" for x in (oracle, naive)),
            ]
        )
    return Table(
        f"Static ceiling, {DOCUMENTS} documents in 10 folds",
        "Share of the centred variance that experts explain: what is planted, what is estimated, and what least squares on the "
        f"same data would claim. The interval is share ± t(9) x se and may miss in {ALPHA:.0%}. The oracle is what the other "
        "folds predict.",
        [
            "planted",
            "ceiling, mean",
            "bias, points",
            "95% interval misses",
            "interval above 0",
            "oracle, mean",
            "least squares, mean",
        ],
        rows,
    )


def _ceiling(spread: float, run: int, random: np.random.Generator) -> tuple[float, float, float, float, float]:
    """True share, ceiling, reach of its interval, share by least squares, share of the oracle."""
    table = planted_table(random, DOCUMENTS, (0.0,), tokens=TOKENS, rankings=1, static_spread=spread)
    expert, delta = table.expert[0], table.delta[0]
    ceiling = stat.StaticCeiling(planted.EXPERTS)
    ceiling.add(table.document, expert, delta)
    found = ceiling.ceiling()
    reach = found.se * float(scipy.stats.t.ppf(1 - ALPHA / 2, ceiling.n_folds - 1))
    return float(table.static_share[0]), found.share, reach, _least_squares_share(expert, delta), ceiling.oracle().share


def _least_squares_share(expert: np.ndarray, delta: np.ndarray) -> float:
    indicator = np.eye(planted.EXPERTS)[expert]
    x = (indicator - indicator.mean(axis=1, keepdims=True)).reshape(-1, planted.EXPERTS)
    c = (delta - delta.mean(axis=1, keepdims=True)).ravel()
    products = x.T @ c
    return float(products @ np.linalg.pinv(x.T @ x, hermitian=True) @ products / (c @ c))


def stacked(runs: int, seed: int, processes: int = 1) -> Table:
    rows = []
    for effect in (0.0, BOUND):
        work = functools.partial(_stack, effect)
        told = np.array(_each(work, runs, seed + int(effect > 0), processes, f"stacking, d = {effect:g}"))
        rates = [*map(Rate.of, told[:, :3].T), *map(Rate.of, (told[:, 3:] > 0).T)]
        rows.append([f"{effect:g}", *map(str, rates)])
    return Table(
        f"Leave-one-document-out scores and stacking, {DOCUMENTS} documents of {TOKENS // 2} positions",
        "Mean weight in the stack, and how often a ranking predicts held-out documents better than chance does. "
        "No level belongs to either.",
        ["planted d", "weight, planted", "weight, another", "weight, chance", "planted beats chance", "another beats chance"],
        rows,
    )


def _stack(effect: float, run: int, random: np.random.Generator) -> np.ndarray:
    """Weights of two rankings, the first planted, and of chance; gain of the two over chance in log score."""
    table = planted_table(random, DOCUMENTS, (effect,), tokens=TOKENS // 2, rankings=2)
    ranks = [stat.standardised(stat.within_position_ranks(table.scores(0, ranking))) for ranking in range(2)]
    held_out = [stat.leave_one_document_out(one, table.delta[0], table.document) for one in ranks]
    columns = [*(scores.log_score for scores in held_out), held_out[0].chance]
    weight = stat.stacking_weights(np.stack(columns, axis=1)).weight
    return np.array([*weight, *((scores.log_score - scores.chance).sum() for scores in held_out)])


def _judged(rate: Rate, nominal: float) -> str:
    return f"**{rate}**" if rate.above(nominal) else str(rate)


def _each(work: Callable[[int, np.random.Generator], T], runs: int, seed: int, processes: int, name: str) -> list[T]:
    """The work of every run, each with its number and a generator that no other run or scenario shares."""
    children = np.random.SeedSequence(seed).spawn(runs)
    with ProcessPoolExecutor(processes) as pool:
        mapped = (pool.map if processes > 1 else map)(work, range(runs), map(np.random.default_rng, children))
        return list(tqdm(mapped, desc=name, total=runs, file=sys.stderr, mininterval=5))


def saving_outcomes(runs: int, seed: int, processes: int = 1) -> list[Table]:
    """The outcomes of savings, where experts differ: of criteria that know something, and of nonsense."""
    by_size = {}
    for number, documents in enumerate((FEW, DOCUMENTS)):
        work = functools.partial(saving_rules.told, documents)
        said = _each(work, runs, seed + number, processes, f"savings, {documents} documents")
        by_size[documents] = {name: Rate.of([one[name] for one in said]) for name in said[0]}
    truths = {**saving_rules.true_shares(), "oracle": float("nan")}
    outcomes = ("helps", "harms", "negligible", "undecided")
    rows = []
    for name, truth in truths.items():
        for documents, rates in by_size.items():
            missed = rates.get(f"{name}: interval misses")
            shown = [str(rates[f"{name}: {outcome}"]) for outcome in outcomes]
            share = "" if np.isnan(truth) else f"{truth:.0%}"
            rows.append([name, share, str(documents), *shown, "" if missed is None else _judged(missed, ALPHA)])
    size = f"{saving_rules.LAYERS} layers of {saving_rules.EXPERTS} experts top-{saving_rules.SLOTS}"
    knowing = Table(
        f"Outcomes of savings, {size}",
        "Experts differ, effects have the tails and skew of real ones; what criteria know is written as the share of the random "
        f"cost that they truly save. All {len(CRITERIA)} criteria are corrected for together. Intervals may miss the truth in "
        f"{ALPHA:.0%}.",
        ["criterion", "truly saves", "documents", *outcomes, "95% interval of the share misses"],
        rows,
    )
    rules = {
        "two-sided permutation p <= .05, one criterion": ("nonsense: p <= .05", ALPHA),
        "one criterion helps": ("nonsense: one helps", ALPHA / 2),
        f"any of {len(saving_rules.NONSENSE)} helps": ("nonsense: any helps", ALPHA),
        f"any of {len(saving_rules.NONSENSE)} harms": ("nonsense: any harms", ALPHA),
        "for comparison, no rule: the interval over documents alone lies above the bound": (
            "nonsense: interval beyond the bound",
            ALPHA / 2,
        ),
    }
    nonsense = Table(
        f"Nonsense: scores dealt to the experts at random, {size}",
        f"How often it passes. Nominal {ALPHA:.0%} for p and for any of a family, {ALPHA / 2:.1%} for one end.",
        ["rule", *(f"{documents} documents" for documents in by_size)],
        [[text, *(_judged(rates[rule], level) for rates in by_size.values())] for text, (rule, level) in rules.items()],
    )
    return [knowing, nonsense]


def _heading(runs: int, seed: int, seconds: float, processes: int) -> Iterator[str]:
    command = f"python -m benchmarks.calibration --runs {runs} --seed {seed}"
    yield "# Calibration of the decision rules\n"
    yield f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {seconds / 60:.0f} minutes, processes: {processes}.\n"
    yield (
        f"Every rate is over {runs:,} synthetic effect tables, ± its Monte Carlo standard error; **bold** where it exceeds the "
        "nominal level by more than two of these. Loss changes are heavy-tailed and alike within documents; what is planted, "
        "and how, is in `benchmarks/planted_effects.py`. Documents are shorter than real ones and their positions more alike, "
        "so that over all positions clustering counts for as much as it does in the shipped models; for sampled positions it "
        "then counts for more than it does there.\n"
    )


if __name__ == "__main__":
    main()
