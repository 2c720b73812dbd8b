"""What one audit says in a few numbers, layer by layer, so that audits of many models can be compared.

`audit_responses` reads them off the tables of a reduced audit (`hooked_moe.cli.reduced_audit`). Intervals, where there are any,
are over documents: they are of this one model, and answer no question about training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from hooked_moe.analysis.accumulators.rows import row_batches
from hooked_moe.analysis.criteria import PAPER_CRITERIA
from hooked_moe.analysis.rankings import TOLD_THE_TOKEN
from hooked_moe.statistics import ratio_bootstrap
from hooked_moe.tables import ROUTED_PARTS, current_file, read_csv

ALL_LAYERS = "all"
STUDIED = (*PAPER_CRITERIA, "reap")
"""The criteria whose numbers become responses, one by one."""
_CONTROL = "routing_weight"

Rows = Sequence[dict[str, Any]]


class Response(NamedTuple):
    """A number of one layer, or of "all": over all removals where it is a mean over removals, otherwise the mean over layers."""

    layer: str
    name: str
    value: float
    low: float = np.nan
    high: float = np.nan


def audit_responses(run: Path) -> list[Response]:
    """Every response of a run. Raises FileNotFoundError for a run without a table that they are read from."""
    return _with_summaries([*_rankings(run), *_sizes(run), *_progressive(run), *_routed(run)], list(_whole_model(run)))


def ranking_responses(run: Path) -> list[Response]:
    """Those alone that ask which expert: where experts are shuffled (`analysis.negative_control`), all are at chance."""
    return [response for response in _with_summaries(list(_rankings(run))) if not response.name.startswith("last_layer_")]


def _rankings(run: Path) -> Iterator[Response]:
    yield from _savings(run)
    yield from _cells(run)
    yield from _ceilings(run)
    yield from _top_slots(run)


def _with_summaries(layered: Sequence[Response], whole_model: Sequence[Response] = ()) -> list[Response]:
    """Responses by layer, and what they amount to over layers."""
    by_layer = [response for response in layered if response.layer != ALL_LAYERS]
    stated = {response.name for response in layered if response.layer == ALL_LAYERS}
    unstated = [name for name in dict.fromkeys(r.name for r in by_layer) if name not in stated and not name.startswith("p_")]
    means = [_mean_over_layers(name, by_layer) for name in unstated]
    return [*layered, *means, *_last_layer(by_layer), *whole_model]


def _rows(run: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_csv(current_file(run, name, "a reduced audit writes it")).to_pylist()
    return rows


def _savings(run: Path) -> Iterator[Response]:
    """Of the criteria studied: saving as a share of the random cost, permutation z, rank correlation, and whether it helps."""
    rows = _rows(run, "savings.csv")
    for row in rows:
        layer, name = str(row["layer"]), row["ranking"]
        suffix = "_kl" if row["effect"] == "kl" else ""
        if name in STUDIED:
            yield Response(
                layer, f"saving_{name}{suffix}", row["saving_share"], row["saving_share_low"], row["saving_share_high"]
            )
            yield Response(layer, f"z_{name}{suffix}", row["z"])
            yield Response(layer, f"spearman_{name}{suffix}", row["spearman"], row["spearman_low"], row["spearman_high"])
            if not suffix:
                yield Response(layer, f"helps_{name}", float(row["outcome"] == "helps"))
        elif name in TOLD_THE_TOKEN and not suffix:
            yield Response(layer, f"{name}_rho", row["spearman"], row["spearman_low"], row["spearman_high"])
    for layer in dict.fromkeys(str(row["layer"]) for row in rows):
        own = [row for row in rows if str(row["layer"]) == layer]
        criteria = [row for row in own if row["effect"] == "kl" and row["family"] in ("paper", "extended")]
        yield Response(layer, "best_share_of_oracle", _largest(row["share_of_best"] for row in criteria))
        paper = [row["spearman"] for row in own if row["effect"] == "delta_loss" and row["family"] == "paper"]
        yield Response(layer, "best_paper_spearman", _largest(paper))


def _cells(run: Path) -> Iterator[Response]:
    """d over all positions, and p of the test over documents, of the paper's statistics and of its control."""
    for row in _rows(run, "cells.csv"):
        name = row["ranking"]
        if row["scope"] == "position" and row["population"] == "all" and name in (*STUDIED, _CONTROL):
            label = "control" if name == _CONTROL else name
            layer = str(row["layer"])
            yield Response(layer, f"d_{label}", row["d_position"], row["d_position_low"], row["d_position_high"])
            yield Response(layer, f"p_{label}", row["p_t"])


def _ceilings(run: Path) -> Iterator[Response]:
    for file, name in (("ceiling.csv", "loss_ceiling"), ("ceiling_kl.csv", "log_kl_ceiling")):
        for layer, row in {str(row["layer"]): row for row in _rows(run, file)}.items():
            margin = 1.96 * row["ceiling_se"]
            yield Response(layer, name, row["ceiling"], row["ceiling"] - margin, row["ceiling"] + margin)


def _sizes(run: Path) -> Iterator[Response]:
    """Means over removals by layer, with logarithms of those whose scale is free."""
    columns = ("kl", "abs_delta", "delta", "rest_cosine")
    layers, total, count = _sums(run / "effects.parquet")
    total = np.concatenate([total, total.sum(axis=1, keepdims=True)], axis=1)
    count = np.concatenate([count, count.sum(axis=1, keepdims=True)], axis=1)
    interval = ratio_bootstrap(total, count[..., None])
    for axis, layer in enumerate((*layers, ALL_LAYERS)):
        for index, name in enumerate(columns):
            value, low, high = (float(ends[axis, index]) for ends in (interval.estimate, interval.low, interval.high))
            label = name if name == "rest_cosine" else f"mean_{name}"
            yield Response(str(layer), label, value, low, high)
            if name in ("kl", "abs_delta"):
                yield Response(str(layer), f"log_{label}", *(_log(end) for end in (value, low, high)))


def _sums(effects: Path) -> tuple[list[int], Float[np.ndarray, "document layer size"], Float[np.ndarray, "document layer"]]:
    """Sums over the measured removals of each document: kl, |delta|, delta, rest_cosine; and how many there are."""
    sums: dict[tuple[int, int], np.ndarray] = {}
    for rows in row_batches(effects, ("document", "layer", "delta_loss", "kl", "rest_cosine")):
        measured = ~np.isnan(rows["delta_loss"])
        delta = rows["delta_loss"][measured].astype(np.float64)
        sizes = [rows["kl"][measured], np.abs(delta), delta, np.nan_to_num(rows["rest_cosine"][measured]), np.ones_like(delta)]
        values = np.stack(sizes, axis=1)
        keys = np.stack([rows["document"][measured], rows["layer"][measured]], axis=1)
        pairs, inverse = np.unique(keys, axis=0, return_inverse=True)
        for index, (document, layer) in enumerate(pairs.tolist()):
            sums[document, layer] = sums.get((document, layer), 0) + values[inverse == index].sum(axis=0)
    layers = sorted({layer for _, layer in sums})
    documents = sorted({document for document, _ in sums})
    table = np.array([[sums[document, layer] for layer in layers] for document in documents])
    return layers, table[..., :-1], table[..., -1]


def _top_slots(run: Path) -> Iterator[Response]:
    """The share of the sum of |loss change| that the expert with the highest routing weight has."""
    rows = [row for row in _rows(run, "layers.csv") if row["slot"] >= 0]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        sizes = {row["slot"]: row["mean_abs_delta"] for row in rows if row["layer"] == layer}
        yield Response(str(layer), "top_slot_share", sizes[0] / sum(sizes.values()))


def _progressive(run: Path) -> Iterator[Response]:
    """Mean loss change without half, and without all, of a token's active experts, in random order."""
    rows = [row for row in _rows(run, "progressive.csv") if row["order"] == "random"]
    k = max(row["removed"] for row in rows)
    for row in rows:
        name = {max(1, k // 2): "half_removed", k: "all_removed"}.get(row["removed"])
        if name:
            yield Response(str(row["layer"]), name, row["mean"], row["mean_low"], row["mean_high"])


def _routed(run: Path) -> Iterator[Response]:
    """Rise of the loss without the whole routed part of a layer, at every token."""
    table = read_csv(current_file(run, "routed_parts.csv", "a reduced audit writes it"), ROUTED_PARTS)
    layers = sorted(set(table["layer"].to_pylist()))
    shape = (-1, len(layers))
    order = np.lexsort((table["layer"].to_numpy(), table["document"].to_numpy()))
    n, intact, removed = (table[name].to_numpy()[order].reshape(shape) for name in ROUTED_PARTS.names[2:])
    rise = removed - intact
    rise, n = (np.column_stack([values, values.mean(axis=1)]) for values in (rise, n))
    interval = ratio_bootstrap(rise, n)
    for axis, layer in enumerate((*layers, ALL_LAYERS)):
        yield Response(str(layer), "routed_part", *(float(x[axis]) for x in (interval.estimate, interval.low, interval.high)))
    loss = ratio_bootstrap(intact[:, :1], n[:, :1])
    yield Response(ALL_LAYERS, "held_out_loss", *(float(x[0]) for x in (loss.estimate, loss.low, loss.high)))


def _whole_model(run: Path) -> Iterator[Response]:
    rows = {row["ranking"]: row for row in _rows(run, "pruning.csv")}
    if not rows:  # a streamed model
        return
    reap = rows["reap"]
    yield Response(ALL_LAYERS, "prune_reap", reap["rise"], reap["rise_low"], reap["rise_high"])
    yield Response(ALL_LAYERS, "prune_random", reap["random_rise"])
    yield Response(ALL_LAYERS, "prune_reap_over_random", reap["share_of_random"])


def _last_layer(responses: Sequence[Response]) -> Iterator[Response]:
    """The last layer less the mean of the others: of the control, and of how large and how costly removals are."""
    for name, label in (("d_control", "control_d"), ("log_mean_abs_delta", "log_delta"), ("log_mean_kl", "log_kl")):
        values = {int(r.layer): r.value for r in responses if r.name == name}
        last = max(values, default=-1)
        others = [value for layer, value in values.items() if layer != last]
        if others:
            yield Response(ALL_LAYERS, f"last_layer_{label}", values[last] - float(np.mean(others)))


def _mean_over_layers(name: str, responses: Sequence[Response]) -> Response:
    return Response(ALL_LAYERS, name, float(np.mean([response.value for response in responses if response.name == name])))


def _largest(values: Any) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return max(defined) if defined else np.nan


def _log(value: float) -> float:
    return float(np.log(value)) if value > 0 else np.nan


def wide_rows(responses: Sequence[Response], **identity: Any) -> list[dict[str, Any]]:
    """A row per layer, "all" first, a column per response; `identity` goes before them."""
    names = sorted({response.name for response in responses})
    layers = sorted({response.layer for response in responses}, key=lambda layer: -1 if layer == ALL_LAYERS else int(layer))
    value = {(response.layer, response.name): response.value for response in responses}
    return [identity | {"layer": layer} | {name: value.get((layer, name), np.nan) for name in names} for layer in layers]
