"""How often the intervals of a budgeted audit hold what an exhaustive one finds, on the tables of finished audits.

python -m benchmarks.budget_calibration results/tiny-olmoe/RUN results/tiny-qwen-moe/RUN     # writes BUDGET.md
python -m benchmarks.budget_calibration results/tiny-olmoe/RUN --draws 20 --show             # prints what it finds instead

Every draw is a budgeted audit of the run: removals drawn from its estimates, their effects looked up in its table, means and
savings estimated with their intervals. What all removals give is the truth. For the intervals over documents a draw takes as many
documents at random, with replacement, and draws removals in each by itself; the truth is then what all documents give.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.tables import Table, write_or_print
from hooked_moe.statistics import ratio_bootstrap
from hooked_moe.statistics.difference_estimates import (
    N_BINS,
    SamplingVariance,
    SavingVariance,
    Z,
    corrections,
    error_ratios,
    fold_of,
    half_width_over_documents,
    size_bin,
)
from hooked_moe.statistics.removal_sample import RemovalSample, gap_term, least_probabilities, removal_size, sample_factor
from hooked_moe.tables.effect_grid import effect_chunks

HERE = Path(__file__).resolve().parent
SHARES = (0.01, 0.03)
EFFECTS = {"delta_loss": "realised loss", "kl": "expected loss (KL)"}
_COLUMNS = ("expert", "delta_loss", "kl", "routing_weight", "gap_norm", "first_order", "first_order_curved")


@dataclass(frozen=True)
class Audit:
    """An exhaustive table, flat: a row for each removal."""

    name: str
    n_layers: int
    n_experts: int
    n_slots: int
    axis: np.ndarray
    expert: np.ndarray
    document: np.ndarray
    effects: dict[str, np.ndarray]
    base: dict[str, np.ndarray]
    features: np.ndarray
    size: np.ndarray
    first: dict[str, np.ndarray]
    """By ranking: whether it prunes this expert first at its position."""

    @classmethod
    def read(cls, run: Path) -> Audit:
        chunks = [chunk.measured() for chunk in effect_chunks(run / "effects.parquet", _COLUMNS)]
        document = np.concatenate([chunk.document for chunk in chunks])
        arrays = {name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in _COLUMNS}
        shape = arrays["expert"].shape
        axis = np.broadcast_to(np.arange(shape[1])[None, :, None], shape)
        bend = arrays["first_order_curved"].astype(np.float64) - arrays["first_order"]
        square = np.square(arrays["gap_norm"], dtype=np.float64)
        scale = (np.abs(bend).sum(axis=(0, 2)) / square.sum(axis=(0, 2)))[None, :, None]
        n_experts = int(arrays["expert"].max()) + 1
        cell = (axis * n_experts + arrays["expert"]).ravel()
        first = _pruned_first(arrays, cell, shape[1] * n_experts)
        return cls(
            run.parent.name,
            shape[1],
            n_experts,
            shape[2],
            axis.ravel(),
            arrays["expert"].ravel().astype(np.int64),
            np.broadcast_to(document[:, None, None], shape).ravel(),
            {name: arrays[name].ravel().astype(np.float64) for name in EFFECTS},
            {"delta_loss": arrays["first_order"].ravel().astype(np.float64), "kl": np.zeros(cell.size)},
            np.stack([bend.ravel(), gap_term(arrays["gap_norm"], scale).ravel()], axis=1),
            removal_size(arrays["first_order"], arrays["first_order_curved"], arrays["gap_norm"], scale).ravel(),
            first,
        )

    @property
    def cell(self) -> np.ndarray:
        return self.axis * self.n_experts + self.expert

    @property
    def n_cells(self) -> int:
        return self.n_layers * self.n_experts


def _pruned_first(arrays: dict[str, np.ndarray], cell: np.ndarray, n_cells: int) -> dict[str, np.ndarray]:
    """Published criteria, nonsense, and the token's own scores."""
    count = np.bincount(cell, minlength=n_cells).astype(np.float64)
    mean_gap, mean_weight = (
        np.bincount(cell, arrays[name].ravel(), n_cells) / np.maximum(count, 1) for name in ("gap_norm", "routing_weight")
    )
    random = np.random.default_rng(0)
    by_expert = {
        "REAP": mean_gap,
        "weighted EAN": mean_gap * count,
        "mean routing weight": mean_weight,
        "utilization": count,
        **{f"nonsense {number}": random.random(n_cells) for number in (1, 2)},
    }
    shape = arrays["expert"].shape
    keys = {name: scores[cell].reshape(shape) for name, scores in by_expert.items()}
    keys |= {"routing weight": arrays["routing_weight"], "gap norm": arrays["gap_norm"]}
    result = {}
    for name, key in keys.items():
        slot = shape[2] - 1 - key[:, :, ::-1].argmin(axis=2)
        first = np.zeros(shape, bool)
        np.put_along_axis(first, slot[..., None], True, 2)
        result[name] = first.ravel()
    return result


class Design:
    """A share of an audit's removals to be drawn."""

    def __init__(self, audit: Audit, share: float) -> None:
        self.audit = audit
        count = np.bincount(audit.cell, minlength=audit.n_cells).reshape(audit.n_layers, audit.n_experts)
        least = least_probabilities(count, share)
        factor = sample_factor(least[audit.axis, audit.expert], audit.size, share)
        self.p = RemovalSample(np.zeros(audit.n_layers), least, factor).probability(audit.axis, audit.expert, audit.size)
        self.fold, self.bin = fold_of(audit.document), size_bin(audit.size)
        self.spread = audit.size**2 * (1 - self.p) / self.p
        groups = [np.ones(len(self.p), bool), *audit.first.values()]
        self.layer_spread = np.stack([self._by(audit.axis, audit.n_layers, rows) for rows in groups])
        self.cell_spread = self._by(audit.cell, audit.n_cells, groups[0])
        self.sums = np.stack([self._estimates(rows) for rows in groups])
        self.cell_sums = self._cell_estimates()

    def _by(self, group: np.ndarray, n: int, rows: np.ndarray) -> np.ndarray:
        key = group[rows] * N_BINS + self.bin[rows]
        return np.bincount(key, self.spread[rows], n * N_BINS).reshape(n, N_BINS)

    def _estimates(self, rows: np.ndarray) -> np.ndarray:
        """Sums of first order and of both features, [layer, fold, 3]."""
        columns = np.column_stack([self.audit.base["delta_loss"], self.audit.features])[rows]
        key = self.audit.axis[rows] * 2 + self.fold[rows]
        return np.stack([np.bincount(key, column, self.audit.n_layers * 2) for column in columns.T], axis=1).reshape(-1, 2, 3)

    def _cell_estimates(self) -> np.ndarray:
        columns = np.column_stack([self.audit.base["delta_loss"], self.audit.features])
        key = self.audit.cell * 2 + self.fold
        return np.stack([np.bincount(key, column, self.audit.n_cells * 2) for column in columns.T], axis=1).reshape(-1, 2, 3)


@dataclass
class Coverage:
    """Whether intervals held the truth: by kind, [draw, group]."""

    held: dict[str, list[np.ndarray]]
    width: dict[str, list[np.ndarray]]

    def add(self, kind: str, estimate: np.ndarray, truth: np.ndarray, half: np.ndarray) -> None:
        self.held.setdefault(kind, []).append(np.abs(estimate - truth) <= half)
        self.width.setdefault(kind, []).append(half)

    def rows(self) -> Iterator[list[str]]:
        for kind, held in self.held.items():
            table = np.array(held, float)
            by_group = np.sort(table.mean(axis=0))
            worst = by_group[: max(1, round(len(by_group) / 10))].mean()
            error = table.mean(axis=1).std(ddof=1) / np.sqrt(len(table))
            yield [
                kind,
                str(len(by_group)),
                f"{100 * table.mean():.1f} ± {100 * error:.1f}",
                f"{100 * worst:.1f}",
                f"{100 * by_group[0]:.1f}",
            ]


def sampling_coverage(design: Design, draws: range, seed: int) -> Coverage:
    """Of sampling intervals, and, for comparison, of those that each group's own removals alone give."""
    audit, result = design.audit, Coverage({}, {})
    n = np.bincount(audit.axis, minlength=audit.n_layers).astype(np.float64)
    count = np.bincount(audit.cell, minlength=audit.n_cells).astype(np.float64)
    seen, k = count > 0, audit.n_slots
    groups = list(audit.first.values())
    everything = np.ones(len(design.p), bool)
    layer_of_cell = np.repeat(np.arange(audit.n_layers), audit.n_experts)
    truths = {
        effect: (
            np.bincount(audit.cell, y, audit.n_cells) / np.maximum(count, 1),
            np.stack([np.bincount(audit.axis[rows], y[rows], audit.n_layers) for rows in (everything, *groups)]),
        )
        for effect, y in audit.effects.items()
    }
    for number in tqdm(draws, desc=audit.name, mininterval=5):
        drawn = np.flatnonzero(np.random.default_rng([seed, number]).random(len(design.p)) < design.p)
        p, axis, fold = design.p[drawn], audit.axis[drawn], design.fold[drawn]
        features, size, cell = audit.features[drawn], audit.size[drawn], audit.cell[drawn]
        first = np.stack([np.ones(len(drawn), bool), *(rows[drawn] for rows in groups)])
        for effect, label in EFFECTS.items():
            missed = audit.effects[effect][drawn] - audit.base[effect][drawn]
            beta = corrections(missed, features, p, size, axis, fold, audit.n_layers)
            error = missed - (features * beta[axis, fold]).sum(axis=1)
            ratios = error_ratios(error, p, size, axis, audit.n_layers)
            weights = np.concatenate([np.full((*beta.shape[:2], 1), float(effect == "delta_loss")), beta], axis=2)
            v = error**2 * (1 - p) / p**2

            def by(group: np.ndarray, size_: int, values: np.ndarray) -> np.ndarray:
                return np.bincount(group, values, size_)

            truth, exact = truths[effect]
            total = (design.cell_sums * weights[layer_of_cell]).sum(axis=(1, 2)) + by(cell, audit.n_cells, error / p)
            own = SamplingVariance(
                by(cell, audit.n_cells, v),
                by(cell, audit.n_cells, v**2),
                (design.cell_spread * ratios[layer_of_cell]).sum(axis=1),
            )
            estimate = (total / np.maximum(count, 1))[seen]
            for kind, square in (("experts", own.moderated()), ("experts, their own removals alone", own.own)):
                result.add(f"{label}: {kind}", estimate, truth[seen], Z * np.sqrt(square[seen]) / count[seen])
            by_layer = np.stack([by(axis[g], audit.n_layers, (error / p)[g]) for g in first])
            totals = (design.sums * weights[None]).sum(axis=(2, 3)) + by_layer
            model = (design.layer_spread * ratios[None]).sum(axis=2)
            variance = SamplingVariance(
                np.stack([by(axis[g], audit.n_layers, v[g]) for g in first]),
                np.stack([by(axis[g], audit.n_layers, v[g] ** 2) for g in first]),
                model,
            )
            result.add(f"{label}: layers", totals[0] / n, exact[0] / n, Z * np.sqrt(variance.moderated()[0]) / n)
            for name, joined in (("in a layer", False), ("over all layers", True)):
                t, e = (x.sum(axis=1, keepdims=True) if joined else x for x in (totals, exact))
                drawing = saving_variance(variance, k, joined)
                share, true = (1 - k * x[1:] / x[:1] for x in (t, e))
                for kind, less, scale, got, right in (
                    ("savings", np.zeros(share.shape), 1.0, t[:1] / k - t[1:], e[:1] / k - e[1:]),
                    ("shares saved", share, t[:1] / k, share, true),
                ):
                    _, moderated = drawing.of(less)
                    half = Z * np.sqrt(moderated) / scale
                    result.add(f"{label}: {kind} {name}", got.ravel(), right.ravel(), half.ravel())
    return result


def saving_variance(groups: SamplingVariance, k: int, joined: bool) -> SavingVariance:
    """From groups [group, layer], the first of all removals; `joined` over the layers."""
    parts = [x.sum(axis=1, keepdims=True) if joined else x for x in (groups.own, groups.own_square, groups.model)]
    of_all, of_first = (SamplingVariance(*(x[rows] for x in parts)) for rows in (slice(0, 1), slice(1, None)))
    return SavingVariance(of_all, of_first, k)


def relative_widths(audit: Audit, share: float, found: Coverage) -> list[list[str]]:
    """How much wider an interval over documents is than that of an exhaustive audit: mean over layers, median over experts."""
    rows = []
    for effect, label in EFFECTS.items():
        ratios = []
        for group, n, kind in ((audit.axis, audit.n_layers, "layers"), (audit.cell, audit.n_cells, "experts")):
            documents = int(audit.document.max()) + 1
            key = audit.document.astype(np.int64) * n + group
            total, count = (
                np.bincount(key, weights, documents * n).reshape(documents, n)
                for weights in (audit.effects[effect], np.ones(len(key)))
            )
            seen = count.sum(axis=0) > 0
            mean = _ratio(total.sum(axis=0), count.sum(axis=0))
            error = np.sqrt(((total - mean * count) ** 2).sum(axis=0) * documents / (documents - 1)) / np.maximum(
                count.sum(axis=0), 1
            )
            sampling = np.mean(found.width[f"{label}: {kind}"], axis=0) / Z
            ratios.append(
                np.sqrt(1 + np.divide(sampling, error[seen], out=np.full(seen.sum(), np.nan), where=error[seen] > 0) ** 2)
            )
        rows.append([audit.name, f"{share:.0%}", label, f"{ratios[0].mean():.2f}", f"{np.nanmedian(ratios[1]):.2f}"])
    return rows


def document_coverage(design: Design, draws: range, seed: int) -> Coverage:
    """Of the intervals over documents, which are to hold what all documents of their kind would give."""
    audit, result = design.audit, Coverage({}, {})
    documents = int(audit.document.max()) + 1
    shape = (documents, audit.n_cells)
    key = audit.document.astype(np.int64) * audit.n_cells + audit.cell
    count = np.bincount(key, minlength=documents * audit.n_cells).reshape(shape)
    often = (count > 0).sum(axis=0) >= 10
    by_layer = np.repeat(np.arange(audit.n_layers), audit.n_experts)
    columns = (audit.base["delta_loss"], *audit.features.T)
    exact_sums = {effect: np.bincount(key, y, count.size).reshape(shape) for effect, y in audit.effects.items()}
    estimates = np.stack([np.bincount(key, column, count.size).reshape(shape) for column in columns], axis=2)
    grouped = GroupSums(audit)
    exact_grouped = {effect: grouped.of(y) for effect, y in audit.effects.items()}
    for number in tqdm(draws, desc=f"{audit.name}, documents", mininterval=5):
        random = np.random.default_rng([seed, 1, number])
        times = np.bincount(random.integers(0, documents, documents), minlength=documents)
        sums: dict[str, list[np.ndarray]] = {effect: [] for effect in EFFECTS}
        exact: dict[str, list[np.ndarray]] = {effect: [] for effect in EFFECTS}
        own = {effect: np.zeros((2, audit.n_cells)) for effect in EFFECTS}
        model = {effect: np.zeros(audit.n_cells) for effect in EFFECTS}
        by_group: dict[str, list[np.ndarray]] = {effect: [] for effect in EFFECTS}
        own_of_groups = {effect: np.zeros((2, *grouped.count.shape[::2])) for effect in EFFECTS}
        model_of_groups = {effect: np.zeros(grouped.count.shape[::2]) for effect in EFFECTS}
        counts = []
        copies = [np.flatnonzero(times > copy) for copy in range(int(times.max()))]
        for copy in range(int(times.max())):  # each with removals of its own
            chosen = times > copy
            drawn = np.flatnonzero(random.random(len(design.p)) < design.p)
            p, axis, fold = design.p[drawn], audit.axis[drawn], design.fold[drawn]
            for effect in EFFECTS:
                missed = audit.effects[effect][drawn] - audit.base[effect][drawn]
                beta = corrections(missed, audit.features[drawn], p, audit.size[drawn], axis, fold, audit.n_layers)
                error = missed - (audit.features[drawn] * beta[axis, fold]).sum(axis=1)
                weights = np.concatenate([np.full((*beta.shape[:2], 1), float(effect == "delta_loss")), beta], axis=2)
                total = (estimates * weights[by_layer][:, fold_of(np.arange(documents))].swapaxes(0, 1)).sum(axis=2)
                sums[effect].append((total + np.bincount(key[drawn], error / p, count.size).reshape(shape))[chosen])
                exact[effect].append(exact_sums[effect][chosen])
                by_group[effect].append(grouped.estimated(weights, drawn, error / p)[:, chosen])
                v = np.where(chosen[audit.document[drawn]], error**2 * (1 - p) / p**2, 0.0)
                own[effect] += [np.bincount(audit.cell[drawn], x, audit.n_cells) for x in (v, v**2)]
                ratios = error_ratios(error, p, audit.size[drawn], axis, audit.n_layers)
                model[effect] += (design.cell_spread * ratios[by_layer]).sum(axis=1) * chosen.mean()
                own_of_groups[effect] += [grouped.of(x, drawn).sum(axis=1) for x in (v, v**2)]
                model_of_groups[effect] += (design.layer_spread * ratios[None]).sum(axis=2) * chosen.mean()
            counts.append(count[chosen])
        n = np.concatenate(counts)
        for effect, label in EFFECTS.items():
            total = np.concatenate(sums[effect])
            truth = np.bincount(audit.cell, audit.effects[effect], audit.n_cells)
            of_layers, n_layers = (x.reshape(len(x), audit.n_layers, -1).sum(axis=2) for x in (total, n))
            layer_truth = _ratio(truth.reshape(audit.n_layers, -1).sum(1), count.sum(0).reshape(audit.n_layers, -1).sum(1))
            expert_truth, everything = _ratio(truth, count.sum(0))[often], np.concatenate(exact[effect])
            _add_bootstrap(result, f"{label}: layers", of_layers, n_layers, layer_truth)
            _add_bootstrap(result, f"{label}: experts, bootstrap alone", total[:, often], n[:, often], expert_truth)
            _add_bootstrap(result, f"{label}: experts, all removals made", everything[:, often], n[:, often], expert_truth)
            group_truth = exact_grouped[effect].sum(axis=1), grouped.count.sum(axis=1)
            again = np.concatenate(copies)
            drawing = SamplingVariance(own_of_groups[effect][0], own_of_groups[effect][1], model_of_groups[effect])
            estimated, exactly = np.concatenate(by_group[effect], axis=1), exact_grouped[effect][:, again]
            savings = partial(_add_savings, result, label, count=grouped.count[:, again], truth=group_truth, k=audit.n_slots)
            savings(estimated, drawing=drawing)
            savings(exactly, drawing=None)
            sampling = SamplingVariance(own[effect][0], own[effect][1], model[effect])
            mean = _ratio(total.sum(0), n.sum(0))
            half = half_width_over_documents(total, n, sampling.own, sampling.moderated())
            result.add(f"{label}: experts", mean[often], expert_truth, half[often])
    return result


class GroupSums:
    """Sums by document and layer: of all removals, and of those that each ranking makes first, [group, document, layer]."""

    def __init__(self, audit: Audit) -> None:
        self.rows = np.stack([np.ones(len(audit.size), bool), *audit.first.values()])
        self.shape = (int(audit.document.max()) + 1, audit.n_layers)
        self.key = audit.document.astype(np.int64) * audit.n_layers + audit.axis
        self.fold = fold_of(np.arange(self.shape[0]))
        self.count = self.of(np.ones(len(audit.size)))
        columns = (audit.base["delta_loss"], *audit.features.T)
        self.estimates = np.stack([self.of(column) for column in columns], axis=-1)

    def of(self, values: np.ndarray, drawn: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Of a value for each removal, or for each that was drawn."""
        key, rows = self.key[drawn], self.rows[:, drawn]
        size = self.shape[0] * self.shape[1]
        return np.stack([np.bincount(key[own], values[own], size).reshape(self.shape) for own in rows])

    def estimated(self, weights: np.ndarray, drawn: np.ndarray, missed: np.ndarray) -> np.ndarray:
        """From the estimates' weights [layer, fold, column], and what they missed of the removals drawn, by probability."""
        return (self.estimates * weights[:, self.fold].swapaxes(0, 1)).sum(axis=-1) + self.of(missed, drawn)


def _add_savings(
    result: Coverage,
    label: str,
    sums: np.ndarray,
    *,
    count: np.ndarray,
    truth: tuple[np.ndarray, np.ndarray],
    k: int,
    drawing: SamplingVariance | None,
) -> None:
    """Of savings and shares saved, in a layer and over all of them.

    `sums` and `count` are of the documents drawn, [group, document, layer]; `truth` are both of all documents, [group, layer];
    `drawing` is how uncertain sums are by which removals were drawn. None: all were.
    """
    for name, joined in (("in a layer", False), ("over all layers", True)):
        t, n, true, true_n = (x.sum(axis=-1, keepdims=True) if joined else x for x in (sums, count, *truth))
        saved, right = t[:1] / k - t[1:], true[:1] / k - true[1:]
        for kind, under, expected in (
            ("savings", n[1:], right / true_n[1:]),
            ("shares saved", np.broadcast_to(t[:1] / k, saved.shape), right / (true[:1] / k)),
        ):
            over_, under_ = (x.swapaxes(0, 1) for x in (saved, under))
            flat_over, flat_under = (x.reshape(len(x), -1) for x in (over_, under_))
            what = f"{label}: {kind} {name}"
            kind_of_bootstrap = f"{what}, {'all removals made' if drawing is None else 'bootstrap alone'}"
            _add_bootstrap(result, kind_of_bootstrap, flat_over, flat_under, expected.ravel())
            if drawing is not None:
                ratio = over_.sum(axis=0) / under_.sum(axis=0)
                less = ratio if kind == "shares saved" else np.zeros(ratio.shape)
                half = half_width_over_documents(over_, under_, *saving_variance(drawing, k, joined).of(less))
                result.add(what, ratio.ravel(), expected.ravel(), half.ravel())


def _add_bootstrap(result: Coverage, kind: str, over: np.ndarray, under: np.ndarray, truth: np.ndarray) -> None:
    interval = ratio_bootstrap(over, under, n_resamples=500)
    result.add(kind, (interval.low + interval.high) / 2, truth, (interval.high - interval.low) / 2)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return over / np.maximum(under, 1)


def main(argv: Sequence[str] | None = None) -> list[Table]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of exhaustive audits")
    parser.add_argument("--draws", type=int, default=1000, help="of each run and share (default: 1000)")
    parser.add_argument("--document-draws", type=int, default=200, help="of documents and removals, of each run (default: 200)")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the page instead of writing it")
    parser.add_argument("--out", type=Path, default=HERE / "BUDGET.md")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    tables: list[Table] = []
    widths: list[list[str]] = []
    columns = ["intervals of", "groups", "hold the truth, %", "worst tenth of groups, %", "worst group, %"]
    for run in args.runs:
        audit = Audit.read(run)
        for share in args.shares:
            design = Design(audit, share)
            found = sampling_coverage(design, range(args.draws), args.seed)
            note = f"{args.draws:,} draws of {share:.0%} of {len(audit.size):,} removals. Nominal: 95%."
            tables.append(Table(f"{audit.name}, {share:.0%}: sampling intervals", note, columns, list(found.rows())))
            widths += relative_widths(audit, share, found)
        if args.document_draws:
            found = document_coverage(Design(audit, args.shares[0]), range(args.document_draws), args.seed)
            note = (
                f"{args.document_draws:,} draws of {audit.document.max() + 1} documents with replacement, and of "
                f"{args.shares[0]:.0%} of the removals in each; experts that occur in ten documents or more; savings "
                "by the rankings of the sampling intervals. Bootstrap alone: without the moderated variance of what was drawn."
            )
            tables.append(
                Table(f"{audit.name}, {args.shares[0]:.0%}: intervals over documents", note, columns, list(found.rows()))
            )
    tables.insert(0, width_table(widths))
    page = "\n".join([*_heading(args, time.perf_counter() - started), *map(str, tables)])
    write_or_print(page, None if args.show else args.out)
    return tables


def width_table(rows: list[list[str]]) -> Table:
    return Table(
        "What a share buys",
        "The width of an interval over documents, relative to that of an audit of all removals.",
        ["model", "share", "effect", "means of layers", "means of experts (median)"],
        rows,
    )


def _heading(args: argparse.Namespace, seconds: float) -> Iterator[str]:
    yield "# Calibration of budgeted audits\n"
    runs = " ".join(f"results/{run.resolve().parent.name}/RUN" for run in args.runs)
    options = f"--shares {' '.join(map(str, args.shares))} --draws {args.draws} --document-draws {args.document_draws}"
    command = f"python -m benchmarks.budget_calibration {runs} {options}"
    yield f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {seconds / 60:.0f} minutes.\n"
    yield (
        "A budgeted audit removes a sample of the experts and estimates the rest (`hooked_moe/statistics/removal_sample.py`, "
        "`difference_estimates.py`). Here it is drawn again and again from finished exhaustive audits. Coverage is a mean over "
        "groups and draws, ± its Monte Carlo standard error; the worst tenth are the groups whose own coverage is lowest. For "
        "comparison: normal intervals from an expert's own removals alone, which are too narrow wherever none of the few that "
        "cost most was drawn.\n"
    )


if __name__ == "__main__":
    main()
