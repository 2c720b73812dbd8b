"""The derived files of a made-up run, written outright: a report renders from them without a measurement or an analysis.

The numbers are plausible and their truth is known: the token's own scores predict (the more, the deeper), `activation_norm`
predicts in the last layers, `routing_entropy` points the wrong way in layer 0, `router_row_norm` was refused there, the rest
is not detected.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hooked_moe.analysis.criteria import EXTENDED_CRITERIA, PAPER_CRITERIA
from hooked_moe.analysis.rankings import ORACLE, TOKEN_LADDER
from hooked_moe.tables import write_checked_json, write_csv_atomic, write_parquet_atomic
from tests.support.synthetic_savings import SCENARIOS, pruning_rows, pruning_summary_rows, reread_rows, savings_rows

FAMILIES = {"paper": PAPER_CRITERIA, "extended": EXTENDED_CRITERIA, "token": tuple(TOKEN_LADDER), "oracle": (ORACLE,)}
N_DOCUMENTS, POSITIONS_PER_DOCUMENT = 72, 511


def synthetic_report(
    directory: Path,
    n_layers: int = 6,
    n_experts: int = 64,
    k: int = 8,
    scopes: tuple[str, ...] = ("position", "sequence"),
    scenario: str = "helpful",
) -> Path:
    """Every derived file and the manifest, in `directory`; returns it. `scenario` is one of `synthetic_savings.SCENARIOS`."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    truth = SCENARIOS[scenario]
    tables = {
        "savings.csv": savings_rows(truth, n_layers),
        "pruning.csv": pruning_rows(truth),
        "pruning_summary.csv": pruning_summary_rows(),
        "reread.csv": reread_rows(),
        "cells.csv": _cells(random, n_layers, scopes),
        "layers.csv": _layers(random, n_layers, k),
        "slots.csv": _slots(n_layers, k),
        "slot_distribution.csv": _slot_distribution(k),
        "ceiling.csv": _ceiling(random, n_layers),
        "ceiling_kl.csv": _ceiling(random, n_layers),
        "bayes.csv": _bayes(random),
        "redistribution.csv": _redistribution(n_layers, n_experts),
        "progressive.csv": _progressive(n_layers, k),
        "domains.csv": _domains(random),
    }
    if "sequence" in scopes:
        tables["scopes.csv"] = _scopes(random, n_layers)
    for name, rows in tables.items():
        write_csv_atomic(pa.Table.from_pylist(rows), directory / name)
    write_parquet_atomic(pa.Table.from_pylist(_experts(random, n_layers, n_experts)), directory / "experts.parquet")
    write_checked_json(_manifest(n_layers, n_experts, k, scopes), directory / "manifest.json")
    return directory


def true_d(family: str, ranking: str, layer: int, n_layers: int) -> float:
    """The planted effect size over single positions."""
    depth = layer / max(n_layers - 1, 1)
    if family == "token":
        planted = {"routing_weight": 0.12, "gap_norm": 0.15, "first_order": 0.3, "first_order_curved": 0.35}
        return planted[ranking] + 0.12 * depth
    if family == "oracle":
        return 0.13
    if ranking == "activation_norm":
        return 0.03 + 0.14 * (depth > 0.7)
    if ranking == "routing_entropy" and layer == 0:
        return -0.15
    return 0.02 * np.cos(len(ranking) + 2 * layer)


def _cells(random: np.random.Generator, n_layers: int, scopes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for scope in scopes:
        for population in ("sample", "all"):
            for family, rankings in FAMILIES.items():
                for ranking in rankings:
                    for layer in range(n_layers):
                        d = true_d(family, ranking, layer, n_layers) * (1 if scope == "position" else 0.8)
                        rows.append(_cell(random, scope, population, family, ranking, layer, d, n_layers))
    return rows


def _cell(
    random: np.random.Generator, scope: str, population: str, family: str, ranking: str, layer: int, d: float, n_layers: int
) -> dict[str, Any]:
    sample = population == "sample"
    n, error = (200, 0.071) if sample else (N_DOCUMENTS, 0.012 if family != "extended" else 0.03)
    d += error * random.normal()
    reach = 1.96 * error
    t = d / error
    n_tests = n_layers * (1 if family in ("token", "oracle") else len(FAMILIES[family]))
    p = float(np.exp(-0.717 * abs(t) - 0.416 * t * t))  # close to the normal's two-sided tail
    passes = p * n_tests < 0.05
    row: dict[str, Any] = {
        "scope": scope,
        "population": population,
        "family": family,
        "ranking": ranking,
        "layer": layer,
        "unit": "position" if sample else "document",
        "n": n,
        "n_positions": 200 if sample else N_DOCUMENTS * POSITIONS_PER_DOCUMENT,
        "n_undefined": 0,
        "n_ties": 0,
        "mean_high": 0.012 + 0.1 * d,
        "mean_low": 0.012,
        "mean_difference": 0.1 * d,
        "sd_difference": 0.1,
        "d_z": d if sample else 9 * d,
        "d_z_low": d - reach if sample else 9 * d - reach,
        "d_z_high": d + reach if sample else 9 * d + reach,
        "d_position": d,
        "d_position_low": d - reach,
        "d_position_high": d + reach,
        "t": t,
        "p_t": p,
        "p_wilcoxon": min(1.0, 1.3 * p),
        "n_zero": 0,
        "n_tests": n_tests,
        "alpha": 0.05,
        "p_t_bonferroni": min(1.0, p * n_tests),
        "p_wilcoxon_bonferroni": min(1.0, 1.3 * p * n_tests),
        "p_t_holm": min(1.0, p * n_tests),
        "p_wilcoxon_holm": min(1.0, 1.3 * p * n_tests),
        "p_t_bh": min(1.0, 2 * p),
        "outcome": ("positive" if d > 0 else "negative") if passes else "not_detected",
        "spearman": 0.6 * d,
        "spearman_low": 0.6 * d - reach / 2,
        "spearman_high": 0.6 * d + reach / 2,
        "p_max_t": min(1.0, p * n_tests * 0.8),
        "power_at_d02": 0.41 if sample else 0.99,
        "minimal_detectable_d": 0.276 if sample else 0.09,
        "bf10": float(np.exp(t * t / 2) / 12),
        "bf_directional": float(np.exp(t * t / 2) / 6 if t > 0 else 0.04),
        "note": "",
    }
    if ranking == "router_row_norm" and layer == 0:
        undefined = {name for name, value in row.items() if isinstance(value, float) and name != "alpha"}
        row |= dict.fromkeys(undefined, np.nan)
        row |= {
            "outcome": "refused",
            "note": f"all {n} differences equal 0; without variance there is no test",
        }
    return row


def _layers(random: np.random.Generator, n_layers: int, k: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(n_layers):
        for slot in range(-1, k):
            share = 1.0 if slot < 0 else 2.2 * 0.72**slot
            n = N_DOCUMENTS * POSITIONS_PER_DOCUMENT
            rows.append(
                {
                    "layer": layer,
                    "slot": slot,
                    "n_positions": n + N_DOCUMENTS,
                    "n_removals": n * (k if slot < 0 else 1),
                    "mean_delta": 0.006 * share * (1 + layer / 2),
                    "mean_abs_delta": 0.05 * share * (1 + layer / 4) * random.uniform(0.95, 1.05),
                    "p95_abs_delta": 0.2 * share,
                    "share_positive": 0.53 + 0.05 * share / (1 + layer),
                    "share_above_floor": 1 - 0.001 * (1 + layer),
                    "mean_gap_norm": 0.2 * share * (1 + layer),
                    "mean_output_norm": 3.0 * (1 + layer),
                    "mean_routing_weight": 0.09 * share,
                }
            )
    return rows


def _slots(n_layers: int, k: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(-1, n_layers):
        for slot in range(k):
            mean = 0.012 * 0.72**slot * (1 + max(layer, 2) / 2)
            n = N_DOCUMENTS * POSITIONS_PER_DOCUMENT * (n_layers if layer < 0 else 1)
            reach = 0.0012 if layer >= 0 else 0.0006
            rows.append(
                {
                    "layer": layer,
                    "slot": slot,
                    "n_removals": n,
                    "mean_delta": mean,
                    "mean_delta_low": mean - reach,
                    "mean_delta_high": mean + reach,
                }
            )
    return rows


def _slot_distribution(k: int) -> list[dict[str, Any]]:
    rows = []
    for slot in range(k):
        size = 0.08 * 0.72**slot
        rows.append({"slot": slot, "statistic": "mean", "level": np.nan, "nats": 0.2 * size})
        for level, value in zip((0.05, 0.25, 0.5, 0.75, 0.95), (-1.1, -0.2, 0.02, 0.3, 1.9), strict=True):
            rows.append({"slot": slot, "statistic": "quantile of delta", "level": level, "nats": value * size})
        for level in np.logspace(0, -4, 41):
            exceeded = 0.5 * size * (level**-0.45 - 1) + 1e-6
            rows.append({"slot": slot, "statistic": "abs delta exceeded by share", "level": level, "nats": exceeded})
    return rows


def _ceiling(random: np.random.Generator, n_layers: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(n_layers):
        ceiling = 0.03 - 0.015 * layer / max(n_layers - 1, 1)
        for family in ("paper", "extended", "oracle"):
            for criterion in FAMILIES[family]:
                share = 0.9 if family == "oracle" else 0.12 if criterion == "activation_norm" else 0.02
                share *= random.uniform(0.6, 1.4) if family != "oracle" else random.uniform(0.95, 1.05)
                rows.append(
                    {
                        "layer": layer,
                        "family": family,
                        "criterion": criterion,
                        "share_of_variance": share * ceiling,
                        "se": 0.0012,
                        "share_of_ceiling": share,
                        "share_of_ceiling_se": 0.04,
                        "ceiling": ceiling,
                        "ceiling_se": 0.0015,
                        "slope": 0.01,
                        "n_undefined": 0,
                        "note": "",
                    }
                )
    return rows


def _bayes(random: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    betas = {"routing_weight": 0.21, "gap_norm": 0.26, "first_order": 0.55, "first_order_curved": 0.6}
    betas |= {"oracle": 0.24, "activation_norm": 0.07}
    weights = {"activation_norm": 0.72, "reap": 0.2}
    fixed = (*PAPER_CRITERIA, *EXTENDED_CRITERIA)
    for family, criteria in FAMILIES.items():
        for criterion in criteria:
            beta, sd = betas.get(criterion, 0.004 * random.normal()), 0.011
            log_bf10 = beta**2 / sd**2 / 2 + np.log(sd)
            rows.append(
                {
                    "family": family,
                    "criterion": criterion,
                    "pl_beta": beta,
                    "pl_sd": sd,
                    "pl_bf10": float(np.exp(min(log_bf10, 700))),
                    "pl_log_bf10": log_bf10,
                    "lodo_score": 0.4 * beta**2 - 0.0002,
                    "stacking_weight": weights.get(criterion, 0.0) if criterion in fixed else np.nan,
                    "n_positions_used": 18_396,
                    "n_positions_available": N_DOCUMENTS * POSITIONS_PER_DOCUMENT,
                    "n_layers": 6,
                    "n_orders_tied": 0,
                    "note": "",
                }
            )
    undefined = dict.fromkeys(("pl_beta", "pl_sd", "pl_bf10", "pl_log_bf10"), np.nan)
    chance = {"family": "chance", "criterion": "chance", "lodo_score": 0.0, "stacking_weight": 0.08, "n_positions_used": 0}
    rows.append({**rows[0], **undefined, **chance})
    return rows


def _redistribution(n_layers: int, n_experts: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(n_layers):
        row: dict[str, Any] = {"layer": layer, "n_experts": n_experts, "n_removals": N_DOCUMENTS * POSITIONS_PER_DOCUMENT * 8}
        row |= {"n_used": 4096 * n_experts, "mean_gap_norm": 0.2 * (1 + layer), "mean_compensation": 0.15 + 0.02 * layer}
        correlations = {
            "weight_gap": 0.55,
            "weight_norm": -0.08,
            "gap_compensation": -0.2 - 0.02 * layer,
            "gap_alignment": 0.04 * layer,
        }
        for name, rho in correlations.items():
            row |= {f"rho_{name}": rho, f"rho_{name}_low": rho - 0.05, f"rho_{name}_high": rho + 0.05}
        rows.append(row)
    return rows


def _progressive(n_layers: int, k: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(n_layers):
        for order, share in {"descending": 1.0, "random": 0.62, "ascending": 0.33}.items():
            for removed in range(1, k + 1):
                done = removed / k
                mean = 0.3 * (1 + layer / 2) * (done**2 if order == "ascending" else done ** (0.55 / share**0.3))
                values = {"mean": (mean, 0.02 * (1 + done)), "median": (0.12 * mean, 0.004), "p95": (5 * mean, 0.15 * (1 + done))}
                row: dict[str, Any] = {"layer": layer, "order": order, "removed": removed}
                row |= {"n_positions": N_DOCUMENTS * POSITIONS_PER_DOCUMENT, "n_documents": N_DOCUMENTS}
                for name, (value, reach) in values.items():
                    row |= {name: value, f"{name}_low": value - reach, f"{name}_high": value + reach}
                rows.append(row)
    return rows


def _domains(random: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "domain": domain,
            "n_documents": 24,
            "n_positions": 24 * POSITIONS_PER_DOCUMENT,
            "baseline_loss": 3.1 + 0.3 * i,
            "mean_delta": 0.01,
            "mean_abs_delta": 0.06,
            "top_minus_bottom": 0.02,
            "d_position": 0.18 + 0.02 * random.normal(),
            "d_position_low": 0.14,
            "d_position_high": 0.22,
        }
        for i, domain in enumerate(("novel <old>", "address", "reference"))
    ]


def _scopes(random: np.random.Generator, n_layers: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(n_layers):
        later = 1 - (layer + 1) / n_layers  # 0 in the last layer, where both scopes are one
        size = 0.05 * (1 + layer / 4)
        rows.append(
            {
                "layer": layer,
                "mean_abs_position": size,
                "mean_abs_sequence": size * (1 + 0.9 * later),
                "mean_abs_gap": 0.05 * later,
                "correlation": 1 - 0.45 * later - (0.01 * random.random() if later else 0),
                "same_sign": 1 - 0.35 * later,
            }
        )
    return rows


def _experts(random: np.random.Generator, n_layers: int, n_experts: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(n_layers):
        for expert in range(n_experts):
            n = 0 if (layer, expert) == (0, n_experts - 1) else int(random.gamma(2.0) * 2000)
            row: dict[str, Any] = {"layer": layer, "expert": expert, "n_tokens": n, "n_removals": n}
            row |= {name: float(random.gamma(3)) if n else np.nan for name in (*PAPER_CRITERIA, *EXTENDED_CRITERIA)}
            row |= {"mean_delta": 0.01 + 0.02 * random.standard_t(3) if n else np.nan, "mean_delta_se": 0.003 if n else np.nan}
            rows.append(row)
    return rows


def _manifest(n_layers: int, n_experts: int, k: int, scopes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "format": 2,
        "model": {
            "name": "made-up-moe",
            "source": "made-up-moe",
            "revision": None,
            "weights_sha256": "0" * 64,
            "config": {"n_layers": n_layers, "num_experts": n_experts, "experts_per_token": k},
        },
        "corpus": {
            "name": "made-up <corpus>",
            "sha256": "f" * 64,
            "documents": N_DOCUMENTS,
            "tokens": N_DOCUMENTS * (POSITIONS_PER_DOCUMENT + 1),
        },
        "protocol": {"name": "defined", "scopes": list(scopes), "removal": "zero", "context": 512},
        "verification": [
            {"name": "inactive expert", "passed": True, "value": 0.0, "threshold": 0.0, "detail": "64 removals"},
            {"name": "effects are exact", "passed": True, "value": 2.4e-7, "threshold": 1e-5, "detail": "largest |fast - full|"},
        ],
        "noise_floor": {"max_abs_nats": 2.1e-6, "windows": 4, "tokens_per_window": 128},
        "versions": {"python": "3.11", "torch": "2.13.0"},
    }
