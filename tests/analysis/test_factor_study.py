"""From responses to effects, with responses that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hooked_moe.analysis.factor_study import (
    COLUMN_OF,
    PRIMARY,
    alias_table,
    effects_table,
    response_columns,
    runs_in_hand,
    seed_deviation,
)
from hooked_moe.analysis.factors import DESIGN, FACTORS
from hooked_moe.cli.study import main
from hooked_moe.statistics import DegenerateSample
from hooked_moe.statistics.factorial import informative_order
from hooked_moe.tables import read_csv, write_csv_atomic

LEVELS = DESIGN.levels()
ORDER = informative_order(LEVELS)
EXTRA = ("held_out_loss", "first_order_rho", "saving_reap", "spearman_reap_kl")


def rows_of(runs: list[int], seeds: list[int], effect: float = 0.8, weak: tuple[int, ...] = ()) -> pa.Table:
    """Runs whose `log_mean_kl` F2 lowers by `effect`, and nothing else; `weak` ones have experts that are worth little."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for run in range(16):
            noise = {name: random.normal(0, 0.05) for name in (*PRIMARY, *EXTRA)}
            if run not in runs:
                continue
            values = {COLUMN_OF.get(name, name): value for name, value in noise.items()}
            values["log_mean_kl"] -= effect / 2 * LEVELS[run, 1]
            values["routed_part"] = 0.02 if run in weak else 0.3 + random.normal(0, 0.02)
            levels = {name: int(level) for name, level in zip(FACTORS, LEVELS[run], strict=True)}
            rows += [
                {"kind": kind, "seed": seed, "run": run, **levels, "layer": layer, **values}
                for kind in ("run", "shuffled")
                for layer in ("all", "5")
            ]
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize(("seeds", "error"), [([0], "lenth"), ([0, 1, 2], "seeds")])
def test_a_planted_effect_is_found_and_nothing_else(seeds: list[int], error: str) -> None:
    rows = effects_table(rows_of(list(range(16)), seeds)).to_pylist()
    assert {row["error"] for row in rows} == {error}
    found = [(row["response"], row["factor"]) for row in rows if row["outcome"] == "effect" and row["primary"]]
    assert found == [("log_mean_kl", "F2")]
    planted = next(row for row in rows if (row["response"], row["factor"]) == ("log_mean_kl", "F2"))
    assert planted["effect"] == pytest.approx(-0.8, abs=0.1)
    assert planted["low"] < -0.8 < planted["high"]
    assert len([row for row in rows if row["primary"]]) == 8 * 7
    assert all(row["outcome"] != "negligible" for row in rows if not row["primary"])


def test_runs_that_are_worth_little_do_not_count() -> None:
    responses = rows_of(list(range(16)), [0], weak=(4,))
    hand = runs_in_hand(responses)
    assert hand.not_counted == [(4, 0)]
    assert 4 not in hand.runs
    rows = effects_table(responses).to_pylist()
    assert {(row["error"], row["n_runs"]) for row in rows} == {("residual", 15)}


def test_a_seed_that_is_not_complete_gives_the_deviation_alone() -> None:
    responses = pa.concat_tables([rows_of(list(range(16)), [0]), rows_of([3, 9, 10], [1])])
    assert runs_in_hand(responses).seeds == [0]
    deviation, df = seed_deviation(responses, "control_d")
    assert df == 2
    assert 0 < deviation < 0.2
    assert np.isnan(seed_deviation(rows_of([1, 2], [0]), "control_d")[0])


def test_half_of_the_runs_give_estimates_and_fewer_none() -> None:
    assert runs_in_hand(rows_of(ORDER[:8], [0])).runs == ORDER[:8]
    assert runs_in_hand(rows_of(ORDER[:10], [0])).runs == ORDER[:8]
    assert runs_in_hand(rows_of(ORDER[:11], [0])).runs == ORDER[:11]
    with pytest.raises(DegenerateSample, match="7 runs count so far; 8 are needed"):
        runs_in_hand(rows_of(ORDER[:7], [0]))


def test_aliases_of_the_runs_in_hand_are_computed_from_their_levels() -> None:
    whole = alias_table(ORDER).to_pylist()
    assert [row["effect"] for row in whole[:7]] == list(FACTORS)
    assert all(row["in_these_runs"] == "" for row in whole)
    assert whole[7]["aliases"] == "F3 x F5, F6 x F7"
    half = alias_table(ORDER[:8]).to_pylist()
    for row in half[:7]:
        terms = row["in_these_runs"].split("+1 ")[1:] + row["in_these_runs"].split("-1 ")[1:]
        assert len(terms) >= 3
    column = LEVELS[ORDER[:8]]
    factor, other = half[0]["in_these_runs"].split()[1], half[0]["in_these_runs"].split()[3]
    product = column[:, int(factor[1]) - 1] * column[:, int(other[1]) - 1]
    assert abs(product @ column[:, 0]) == 8


def test_primary_responses_have_the_names_they_were_announced_by() -> None:
    names = response_columns(rows_of([0], [0]))
    assert names[: len(PRIMARY)] == list(PRIMARY)
    assert "saving_reap_kl" not in names
    assert "held_out_loss" in names


@pytest.mark.parametrize("runs", [list(range(16)), ORDER[:3]], ids=["all", "three"])
def test_the_command_reports_what_there_is(runs: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv_atomic(rows_of(runs, [0]), tmp_path / "responses.csv")
    assert main(["factors", "--responses", str(tmp_path / "responses.csv"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "F3 x F5, F6 x F7" in page
    assert "Negative control" in page
    if len(runs) < 8:
        assert "3 runs of 1 seed are made so far: too few" in page
        assert "3 runs count so far" in capsys.readouterr().out
        assert not (tmp_path / "out" / "effects.csv").exists()
    else:
        assert "granularity on log mean KL of a removal" in page
        figure = read_csv(tmp_path / "out" / "figures" / "factor_effects.csv")
        assert figure.num_rows == 56
        assert (tmp_path / "out" / "figures" / "factor_effects.png").stat().st_size > 10_000
