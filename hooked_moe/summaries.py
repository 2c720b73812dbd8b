"""What removing an expert did to the loss, summarised by layer and slot, by domain, and by the scope of the removal."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hooked_moe.effect_grid import EffectGrid, Source, read_effects
from hooked_moe.statistics import DegenerateSample, clustered_dz

LAYER_COLUMNS = {
    "layer": ("index", "transformer block, counted from 0"),
    "slot": ("index", "rank of the removed expert by routing weight; -1: all slots together"),
    "n_positions": ("positions", "positions measured"),
    "n_removals": ("removals", "removals at positions with a next token; the loss columns are over these"),
    "mean_delta": ("nats", "mean delta_loss"),
    "mean_abs_delta": ("nats", "mean |delta_loss|"),
    "p95_abs_delta": ("nats", "95th percentile of |delta_loss|"),
    "share_positive": ("1", "removals that raise the loss"),
    "mean_gap_norm": ("residual stream", "mean gap norm g ||E(x)||"),
    "mean_output_norm": ("residual stream", "mean output norm ||E(x)||"),
    "mean_routing_weight": ("1", "mean routing weight as applied"),
}


def layer_summary(effects: Source | EffectGrid) -> pa.Table:
    """What removing one expert does: one row per layer and slot, and one per layer with slot -1 for all slots.

    The columns are those of LAYER_COLUMNS; norms and weights are over all positions, NaN where the table lacks them.
    """
    grid = read_effects(effects)
    rows = []
    for axis, layer in enumerate(grid.layers):
        for slot in range(-1, grid.n_slots):
            slots = slice(None) if slot < 0 else slice(slot, slot + 1)
            delta = grid.delta_loss[grid.valid, axis, slots].astype(np.float64)
            size = np.abs(delta)
            if not delta.size:
                raise ValueError("no position of the effect table has a next token; there is nothing to summarise")
            means = {}
            for name in ("gap_norm", "output_norm", "routing_weight"):
                values = getattr(grid, name)
                means[name] = np.nan if values is None else values[:, axis, slots].mean(dtype=np.float64)
            row = {
                "layer": layer,
                "slot": slot,
                "n_positions": len(grid.valid),
                "n_removals": delta.size,
                "mean_delta": delta.mean(),
                "mean_abs_delta": size.mean(),
                "p95_abs_delta": np.quantile(size, 0.95),
                "share_positive": np.mean(delta > 0),
                **{f"mean_{name}": mean for name, mean in means.items()},
            }
            rows.append({name: row[name] for name in LAYER_COLUMNS})
    return pa.Table.from_pylist(rows)


def domain_summary(grid: EffectGrid, run: Path) -> pa.Table:
    """Per domain: documents, positions, baseline loss, effect of a removal, and the routing-weight contrast.

    `top_minus_bottom` is delta_loss of slot 0 minus that of the last slot, averaged over layers at each position, in
    nats; `d_position` its ratio to the standard deviation over positions, with a 95% interval clustered by document.
    """
    documents = pq.read_table(run / "documents.parquet", use_threads=False).to_pylist()
    names = {row["document"]: row["domain"] for row in documents}
    unknown = sorted(set(np.unique(grid.document).tolist()) - set(names))
    if unknown:
        raise ValueError(f"documents.parquet lacks document {unknown[0]} of the effect table ({len(unknown)} lacking)")
    loss = _baseline_loss(run / "tokens.parquet", names)
    document = grid.document[grid.valid]
    delta = grid.delta_loss[grid.valid]
    domain = np.array([names[int(one)] for one in document])
    rows = []
    for name in sorted(set(domain.tolist())):
        here = domain == name
        values = delta[here].astype(np.float64)
        contrast = (values[..., 0] - values[..., -1]).mean(axis=1)
        try:
            size = clustered_dz(contrast, document[here])
            d, low, high = size.d, size.low, size.high
        except DegenerateSample:
            d = low = high = np.nan
        rows.append(
            {
                "domain": name,
                "n_documents": len(np.unique(document[here])),
                "n_positions": int(here.sum()),
                "baseline_loss": loss.get(name, np.nan),
                "mean_delta": values.mean(),
                "mean_abs_delta": np.abs(values).mean(),
                "top_minus_bottom": contrast.mean(),
                "d_position": d,
                "d_position_low": low,
                "d_position_high": high,
            }
        )
    return pa.Table.from_pylist(rows)


def _baseline_loss(path: Path, domains: dict[int, str]) -> dict[str, float]:
    """Mean loss of the intact model per domain, in nats, over every token with a next one; empty without tokens.parquet."""
    if not path.is_file():
        return {}
    table = pq.read_table(path, columns=["document", "target", "baseline_loss"], use_threads=False)
    document, target, loss = (column.to_numpy() for column in table.columns)
    kept = target >= 0
    found, index = np.unique(document[kept], return_inverse=True)
    count, total = np.bincount(index), np.bincount(index, loss[kept])
    named = np.array([domains.get(int(one), "") for one in found])
    return {name: float(total[named == name].sum() / count[named == name].sum()) for name in set(named.tolist())}


def scope_summary(position: EffectGrid, sequence: EffectGrid) -> pa.Table:
    """Per layer: removal at the token alone against removal at every token of the sequence, over the same rows (nats)."""
    rows = []
    for axis, layer in enumerate(position.layers):
        alone = position.delta_loss[position.valid, axis].ravel().astype(np.float64)
        everywhere = sequence.delta_loss[sequence.valid, axis].ravel().astype(np.float64)
        rows.append(
            {
                "layer": layer,
                "mean_abs_position": np.abs(alone).mean(),
                "mean_abs_sequence": np.abs(everywhere).mean(),
                "mean_abs_gap": np.abs(everywhere - alone).mean(),
                "correlation": np.corrcoef(alone, everywhere)[0, 1] if np.ptp(alone) and np.ptp(everywhere) else np.nan,
                "same_sign": np.mean(np.sign(alone) == np.sign(everywhere)),
            }
        )
    return pa.Table.from_pylist(rows)
