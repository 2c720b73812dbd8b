"""Audits of the factor study's runs, and the table of their responses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from experiments.support.factor_training import config_of, recipe_of, trained
from hooked_moe.analysis.factor_study import RUN, SHUFFLED
from hooked_moe.analysis.negative_control import shuffle_experts
from hooked_moe.analysis.responses import audit_responses, ranking_responses, wide_rows
from hooked_moe.analysis.run import analyse_run
from hooked_moe.cli.options import SEED
from hooked_moe.cli.reduced_audit import AuditForm, reduced_audit
from hooked_moe.tokenizer import Tokenizer

FORM = AuditForm(layers=(1, 2, 3, 4, 5), tokens=64)
"""Layer 0 is left out of every run, for it has no experts in half of them."""


def audit_run(levels: Mapping[str, int], seed: int, run: int, directory: Path, tokenizer: Path) -> list[dict[str, Any]]:
    """The rows of a trained run, and of the same with its experts shuffled; audited now, unless that was done."""
    cfg = config_of(levels, directory.name)
    audit, shuffled = directory / "audit" / cfg.model_name / "reduced", directory / "audit" / "shuffled"
    if not (audit / "pruning.csv").is_file():
        model = trained(cfg, recipe_of(levels, seed), directory).eval()
        model.tokenizer = Tokenizer.from_file(tokenizer, eos_id=cfg.end_tokens[0], pad_id=cfg.pad_token_id)
        reduced_audit(model, FORM, directory / "audit", "reduced")
    if not (shuffled / "savings.csv").is_file():
        shuffle_experts(audit, shuffled)
        analyse_run(shuffled, n_experts=cfg.num_experts, seed=SEED)
    identity = {"seed": seed, "run": run, **levels}
    return [
        *wide_rows(audit_responses(audit), kind=RUN, **identity),
        *wide_rows(ranking_responses(shuffled), kind=SHUFFLED, **identity),
    ]


def responses_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Every row with every column, NaN where it has none; numbers to seven digits."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [_rounded(row.get(name, np.nan)) for row in rows] for name in names})


def _rounded(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value
