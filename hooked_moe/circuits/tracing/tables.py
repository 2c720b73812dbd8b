"""The tables of a tracing result; a case's values are means over its corrupted runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from hooked_moe.circuits.tracing.patches import PARTS, SITES
from hooked_moe.circuits.tracing.places import PLACES
from hooked_moe.circuits.tracing.rows import BatchRows
from hooked_moe.circuits.tracing.selection import halves
from hooked_moe.tables.schemas import schema_of

CASES = schema_of(
    ("case", pa.int32(), "1", "number of the case"),
    ("case_id", pa.int64(), "1", "the record's own number"),
    ("split", pa.string(), "1", "discovery: an expert is chosen on it; validation: it is tested on it"),
    ("relation", pa.string(), "1", "kind of fact"),
    ("subject", pa.string(), "1", "whom or what the fact is about"),
    ("prompt", pa.string(), "1", "the text that is completed"),
    ("true", pa.string(), "1", "the true answer"),
    ("foils", pa.string(), "1", "the wrong answers, of each corrupted run"),
    ("donors", pa.string(), "1", "the subjects that took the place of this one"),
    ("runs", pa.int32(), "1", "corrupted runs that the case is the mean of"),
    ("d_clean", pa.float64(), "logits", "logit of the true answer minus the foil's, clean run"),
    ("d_corrupt", pa.float64(), "logits", "the same in the corrupted run"),
    ("drop", pa.float64(), "logits", "d_clean - d_corrupt"),
    ("rank_clean", pa.float64(), "1", "tokens that are likelier than the true answer in the clean run"),
    ("sink_final", pa.bool_(), "1", "whether the last token has the longest residual stream after an early layer"),
)
"""One row per case."""
_POSITION = (
    ("position", pa.int32(), "index", "the token that is patched, counted from 0"),
    ("place", pa.string(), "1", "what it is in the prompt: " + "; ".join(f"{name}: {words}" for name, words in PLACES.items())),
)


def cases_table(parts: Sequence[BatchRows], seed: int, discovery: Collection[int] | None = None) -> pa.Table:
    """Split into halves by the seed, or by `discovery`: the case ids that an expert is chosen on."""
    rows: dict[int, list[tuple[BatchRows, int]]] = {}
    for part in parts:
        for row, run in enumerate(part.runs):
            rows.setdefault(run.case, []).append((part, row))
    columns: dict[str, list[Any]] = {name: [] for name in CASES.names}
    ids = [own[0][0].runs[own[0][1]].prompt.record.case_id for _, own in sorted(rows.items())]
    for (case, own), chosen_on in zip(sorted(rows.items()), _discovery(ids, seed, discovery), strict=True):
        part, row = own[0]
        record = part.runs[row].prompt.record
        runs = [part.runs[row] for part, row in own]
        clean, corrupt = np.mean([part.margins[row] for part, row in own], axis=0).tolist()
        values = {
            "case": case,
            "case_id": record.case_id,
            "split": "discovery" if chosen_on else "validation",
            "relation": record.relation,
            "subject": record.subject,
            "prompt": record.text,
            "true": record.true,
            "foils": "; ".join(dict.fromkeys(run.foil for run in runs)),
            "donors": "; ".join(run.donor.record.subject for run in runs if run.donor is not None),
            "runs": len(own),
            "d_clean": clean,
            "d_corrupt": corrupt,
            "drop": clean - corrupt,
            "rank_clean": float(part.rank_clean[row]),
            "sink_final": part.sink[row],
        }
        for name, value in values.items():
            columns[name].append(value)
    return pa.table(columns, schema=CASES)


def _discovery(ids: Sequence[int], seed: int, discovery: Collection[int] | None) -> Bool[np.ndarray, " case"]:
    return halves(len(ids), seed) if discovery is None else np.isin(ids, list(discovery))


def blocks_table(parts: Sequence[BatchRows], readings: Sequence[str]) -> pa.Table:
    """One row per case, position, layer and site; and one per case and position, layer -1, for the MLP outputs of all layers
    patched together."""
    unique, group = _groups(np.concatenate([part.spots for part in parts]))
    places = _first_of_each(group, [place for part in parts for place in part.places])
    by_spot = _means(group, np.concatenate([part.sites for part in parts]))
    all_moe = _means(group, np.concatenate([part.all_moe for part in parts]))
    n_spots, n_layers = by_spot.shape[:2]
    each = n_layers * len(SITES) + 1
    layers = [*np.repeat(np.arange(n_layers), len(SITES)), -1]
    columns: dict[str, Any] = {
        "case": np.repeat(unique[:, 0], each).astype(np.int32),
        "position": np.repeat(unique[:, 1], each).astype(np.int32),
        "place": [place for place in places for _ in range(each)],
        "layer": np.tile(layers, n_spots).astype(np.int32),
        "site": [*(SITES * n_layers), "all_moe"] * n_spots,
    }
    for number, name in enumerate(readings):
        values = np.concatenate([by_spot[..., number].reshape(n_spots, -1), all_moe[:, number, None]], axis=1)
        columns[column_of(name)] = values.reshape(-1)
    schema = schema_of(
        ("case", pa.int32(), "1", "number of the case"),
        *_POSITION,
        ("layer", pa.int32(), "1", "layer of the patch; -1: all of them"),
        (
            "site",
            pa.string(),
            "1",
            "what of the clean run is put in: " + ", ".join(SITES) + "; all_moe: every layer's MLP output",
        ),
        *_reading_fields(readings),
    )
    return pa.table(columns, schema=schema)


def experts_table(parts: Sequence[BatchRows], readings: Sequence[str]) -> pa.Table:
    """One row per case, position, layer and expert that is active in the clean run or in one of the corrupted ones."""
    spots, group = _groups(np.concatenate([part.spots for part in parts]))
    n_runs = dict(zip(map(tuple, spots.tolist()), np.bincount(group).tolist(), strict=True))
    place_of = dict(zip(n_runs, _first_of_each(group, [place for part in parts for place in part.places]), strict=True))
    values = {name: np.concatenate([part.expert_values[name] for part in parts]) for name in parts[0].expert_values}
    unique, row = _groups(np.concatenate([part.expert_keys for part in parts]))
    at = [tuple(spot) for spot in unique[:, :2].tolist()]
    per_case = np.array([n_runs[spot] for spot in at])

    def mean(column: Float[np.ndarray, " row"]) -> Float[np.ndarray, " unique"]:
        """Over the case's runs; an expert that is active in neither run of a pair counts with zero."""
        return np.bincount(row, np.nan_to_num(column), len(unique)) / per_case

    columns: dict[str, Any] = {
        name: unique[:, axis].astype(np.int32) for axis, name in enumerate(("case", "position", "layer", "expert"))
    }
    columns["place"] = [place_of[spot] for spot in at]
    columns["clean_active"] = mean(values["clean_active"]) > 0
    for name in ("corrupt_active", "weight_clean", "weight_corrupt", "norm_delta"):
        columns[name] = mean(values[name])
    for number, reading in enumerate(readings):
        columns[column_of(reading)] = mean(values["rescue"][:, number])
    columns["direct"] = mean(values["direct"])
    for name in (*PARTS, "first_order", "necessity"):
        undefined = np.bincount(row, np.isnan(values[name]), len(unique)) > 0
        columns[name] = np.where(undefined, np.nan, mean(values[name]))
    return pa.table(columns, schema=_experts_schema(readings))


def _experts_schema(readings: Sequence[str]) -> pa.Schema:
    return schema_of(
        ("case", pa.int32(), "1", "number of the case"),
        *_POSITION,
        ("layer", pa.int32(), "1", "layer of the expert"),
        ("expert", pa.int32(), "1", "number of the expert"),
        ("clean_active", pa.bool_(), "1", "whether the clean run's token goes to it"),
        ("corrupt_active", pa.float64(), "1", "share of the corrupted runs whose token goes to it"),
        ("weight_clean", pa.float64(), "1", "routing weight in the clean run; 0 where it is not active"),
        ("weight_corrupt", pa.float64(), "1", "routing weight in the corrupted runs"),
        ("norm_delta", pa.float64(), "1", "length of the patch"),
        *_reading_fields(readings),
        ("rescue_routing", pa.float64(), "logits", "rescue by what the routing changed: (w_clean - w_corrupt) E_corrupt"),
        ("rescue_content", pa.float64(), "logits", "rescue by what its output changed: w_clean (E_clean - E_corrupt)"),
        ("rescue_random", pa.float64(), "logits", "rescue by a random vector of the patch's length; nan where it is not active"),
        (
            "rescue_equal_norm",
            pa.float64(),
            "logits",
            "rescue by its patch at the length of the shorter of two patches: its own, and that of the expert with the nearest "
            "routing weight; nan where it is not active",
        ),
        ("matched_equal_norm", pa.float64(), "logits", "rescue by that other expert's patch at the same length"),
        ("direct", pa.float64(), "logits", "what the patch writes into the logit difference itself, past all later layers"),
        (
            "first_order",
            pa.float64(),
            "logits",
            "gradient of the logit difference times the patch",
        ),
        (
            "necessity",
            pa.float64(),
            "logits",
            "change of the clean logit difference when it is removed from the token; nan where it is not active",
        ),
    )


def column_of(reading: str) -> str:
    return "rescue" if reading == "logit_difference" else f"rescue_{reading}"


def _reading_fields(readings: Sequence[str]) -> list[tuple[str, pa.DataType, str, str]]:
    fields = {
        "logit_difference": ("logit of the true answer minus the foil's, patched minus corrupted", "logits"),
        "log_prob": ("log-probability of the true answer, patched minus corrupted", "nats"),
        "rank": ("places that the true answer rises", "1"),
        "kl": ("KL(clean || corrupted) - KL(clean || patched)", "nats"),
    }
    return [(column_of(name), pa.float64(), *reversed(fields[name])) for name in readings]


def _groups(keys: Int[np.ndarray, "row key"]) -> tuple[Int[np.ndarray, "unique key"], Int[np.ndarray, " row"]]:
    """The different keys in order, and which of them each row has."""
    shape = tuple(keys.max(0) + 1)
    unique, group = np.unique(np.ravel_multi_index(tuple(keys.T), shape), return_inverse=True)
    return np.stack(np.unravel_index(unique, shape), axis=1), group.reshape(-1)


def _first_of_each(group: Int[np.ndarray, " row"], values: Sequence[str]) -> list[str]:
    _, first = np.unique(group, return_index=True)
    return [values[row] for row in first]


def _means(group: Int[np.ndarray, " row"], values: Float[np.ndarray, "row *rest"]) -> Float[np.ndarray, "unique *rest"]:
    flat = values.reshape(len(values), -1)
    sums = np.zeros((group.max() + 1, flat.shape[1]))
    np.add.at(sums, group, flat)
    return (sums / np.bincount(group)[:, None]).reshape(-1, *values.shape[1:])
