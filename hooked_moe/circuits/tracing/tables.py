"""The tables of a tracing result, made of what the batches measured; a case's values are means over its corrupted runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.circuits.tracing.measure import Measured
from hooked_moe.circuits.tracing.patches import SITES
from hooked_moe.tables.schemas import schema_of

CASES = schema_of(
    ("case", pa.int32(), "1", "number of the case"),
    ("case_id", pa.int64(), "1", "the record's own number"),
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


def cases_table(measured: Sequence[Measured]) -> pa.Table:
    rows: dict[int, list[tuple[Measured, int]]] = {}
    for part in measured:
        for row, run in enumerate(part.batch.runs):
            rows.setdefault(run.case, []).append((part, row))
    columns: dict[str, list[Any]] = {name: [] for name in CASES.names}
    for case, own in sorted(rows.items()):
        part, row = own[0]
        first = part.batch.runs[row]
        runs = [part.batch.runs[row] for part, row in own]
        clean = float(np.mean([float(part.margin_clean[row]) for part, row in own]))
        corrupt = float(np.mean([float(part.margin_corrupt[row]) for part, row in own]))
        values = {
            "case": case,
            "case_id": first.prompt.record.case_id,
            "relation": first.prompt.record.relation,
            "subject": first.prompt.record.subject,
            "prompt": first.prompt.record.text,
            "true": first.prompt.record.true,
            "foils": "; ".join(dict.fromkeys(run.foil for run in runs)),
            "donors": "; ".join(run.donor.record.subject for run in runs if run.donor is not None),
            "runs": len(own),
            "d_clean": clean,
            "d_corrupt": corrupt,
            "drop": clean - corrupt,
            "rank_clean": float(part.rank_clean[row]),
            "sink_final": bool(part.clean.sink[row]),
        }
        for name, value in values.items():
            columns[name].append(value)
    return pa.table(columns, schema=CASES)


def blocks_table(measured: Sequence[Measured], readings: Sequence[str]) -> pa.Table:
    """One row per case, layer and site; and one per case, layer -1, for the MLP outputs of all layers patched together."""
    case = _run_cases(measured)
    rescue = np.concatenate([_numpy(part.rescue[:, : len(SITES)]).transpose(2, 0, 1, 3) for part in measured])
    together = np.concatenate([_numpy(part.all_moe) for part in measured])
    by_case, all_moe = _means(case, rescue), _means(case, together)
    n_cases, n_layers = by_case.shape[:2]
    columns: dict[str, Any] = {
        "case": np.r_[np.repeat(np.arange(n_cases), n_layers * len(SITES)), np.arange(n_cases)].astype(np.int32),
        "layer": np.r_[np.tile(np.repeat(np.arange(n_layers), len(SITES)), n_cases), np.full(n_cases, -1)].astype(np.int32),
        "site": [*(list(SITES) * (n_cases * n_layers)), *["all_moe"] * n_cases],
    }
    for number, name in enumerate(readings):
        columns[column_of(name)] = np.r_[by_case[..., number].reshape(-1), all_moe[:, number]]
    schema = schema_of(
        ("case", pa.int32(), "1", "number of the case"),
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


def experts_table(measured: Sequence[Measured], readings: Sequence[str]) -> pa.Table:
    """One row per case, layer and expert that is active in the clean run or in one of the corrupted ones."""
    n_runs = np.bincount(_run_cases(measured))
    parts = [_expert_rows(part) for part in measured]
    keys = np.concatenate([key for key, _ in parts])
    values = {name: np.concatenate([columns[name] for _, columns in parts]) for name in parts[0][1]}
    unique, place = np.unique(keys, axis=0, return_inverse=True)
    place = place.reshape(-1)
    per_case = n_runs[unique[:, 0]]

    def mean(column: Float[np.ndarray, " row"]) -> Float[np.ndarray, " unique"]:
        """Over the case's runs; an expert that is active in neither run of a pair counts with zero."""
        return np.bincount(place, np.nan_to_num(column), len(unique)) / per_case

    n_slots = values["rescue"].shape[1] // 3
    assert n_slots == len(readings)
    columns: dict[str, Any] = {name: unique[:, axis].astype(np.int32) for axis, name in enumerate(("case", "layer", "expert"))}
    columns["clean_active"] = mean(values["clean_active"]) > 0
    for name in ("corrupt_active", "weight_clean", "weight_corrupt", "norm_delta"):
        columns[name] = mean(values[name])
    for offset, part in enumerate(("", "_routing", "_content")):
        for number, reading in enumerate(readings if not part else readings[:1]):
            columns[column_of(reading) + part] = mean(values["rescue"][:, offset * n_slots + number])
    columns["direct"] = mean(values["direct"])
    for name in ("first_order", "necessity"):
        undefined = np.bincount(place, np.isnan(values[name]), len(unique)) > 0
        columns[name] = np.where(undefined, np.nan, mean(values[name]))
    return pa.table(columns, schema=_experts_schema(readings))


def _experts_schema(readings: Sequence[str]) -> pa.Schema:
    return schema_of(
        ("case", pa.int32(), "1", "number of the case"),
        ("layer", pa.int32(), "1", "layer of the expert"),
        ("expert", pa.int32(), "1", "number of the expert"),
        ("clean_active", pa.bool_(), "1", "whether the clean run's last token goes to it"),
        ("corrupt_active", pa.float64(), "1", "share of the corrupted runs whose last token goes to it"),
        ("weight_clean", pa.float64(), "1", "routing weight in the clean run; 0 where it is not active"),
        ("weight_corrupt", pa.float64(), "1", "routing weight in the corrupted runs"),
        ("norm_delta", pa.float64(), "1", "length of the patch"),
        *_reading_fields(readings),
        ("rescue_routing", pa.float64(), "logits", "rescue by what the routing changed: (w_clean - w_corrupt) E_corrupt"),
        ("rescue_content", pa.float64(), "logits", "rescue by what its output changed: w_clean (E_clean - E_corrupt)"),
        ("direct", pa.float64(), "logits", "what the patch writes into the logit difference itself, past all later layers"),
        (
            "first_order",
            pa.float64(),
            "logits",
            "gradient of the logit difference times the patch; nan where weights are streamed",
        ),
        ("necessity", pa.float64(), "logits", "change of the clean logit difference when it is removed from the last token"),
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


def _expert_rows(part: Measured) -> tuple[Int[np.ndarray, "row 3"], dict[str, np.ndarray]]:
    """(case, layer, expert) and the values of every expert of every corrupted run."""
    case = np.array([run.case for run in part.batch.runs])
    n_slots = part.direct.shape[1]
    rescue = _numpy(part.rescue)
    keys: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {}
    for layer, patches in enumerate(part.patches):
        experts = patches.experts
        if experts is None:
            continue
        width = experts.indices.shape[1]
        real = _numpy(experts.indices) >= 0
        first = len(SITES) + np.arange(3)[:, None] * n_slots + np.arange(width)
        by_slot = rescue[layer][first].transpose(2, 1, 0, 3).reshape(*real.shape, -1)  # row, slot, (part, reading)
        own = {
            "clean_active": _numpy(experts.clean_active).astype(float),
            "corrupt_active": _numpy(experts.corrupt_active).astype(float),
            "weight_clean": _numpy(experts.weight_clean),
            "weight_corrupt": _numpy(experts.weight_corrupt),
            "norm_delta": _numpy(experts.whole.norm(dim=-1)),
            "rescue": by_slot,
            **{name: _numpy(getattr(part, name)[layer, :width].T) for name in ("direct", "first_order", "necessity")},
        }
        rows, slots = real.nonzero()
        keys.append(np.stack([case[rows], np.full(len(rows), layer), _numpy(experts.indices)[rows, slots]], axis=1))
        for name, value in own.items():
            values.setdefault(name, []).append(value[rows, slots])
    return np.concatenate(keys), {name: np.concatenate(columns) for name, columns in values.items()}


def _run_cases(measured: Sequence[Measured]) -> Int[np.ndarray, " run"]:
    return np.array([run.case for part in measured for run in part.batch.runs])


def _means(case: Int[np.ndarray, " run"], values: Float[np.ndarray, "run *rest"]) -> Float[np.ndarray, "case *rest"]:
    flat = values.reshape(len(values), -1)
    sums = np.zeros((case.max() + 1, flat.shape[1]))
    np.add.at(sums, case, flat)
    return (sums / np.bincount(case)[:, None]).reshape(-1, *values.shape[1:])


def _numpy(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.detach().cpu().double().numpy() if x.is_floating_point() else x.cpu().numpy()
    return array
