"""From responses to effects, with responses that are made up."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hooked_moe.analysis.factor_study import (
    ANY_ROUTED_PART,
    COLUMN_OF,
    PRIMARY,
    alias_table,
    analysed,
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
    assert runs_in_hand(rows_of(ORDER[7:], [0])).runs == ORDER[8:]  # the other half is orthogonal too
    with pytest.raises(DegenerateSample, match="8 runs count so far; 11, or the right 8, are needed"):
        runs_in_hand(rows_of(ORDER[4:12], [0]))


def test_runs_that_are_enough_in_number_may_still_not_tell_factors_apart() -> None:
    """Two pairs of opposite runs missing: of the 12 that are left, 28 sets out of all leave a main effect open."""
    X = np.column_stack([np.ones(16), LEVELS])
    sets = [set(range(16)) - set(out) for out in combinations(range(16), 4)]
    singular = [kept for kept in sets if np.linalg.matrix_rank(X[sorted(kept)]) < 8]
    assert len(singular) == 28
    for kept in singular:
        analysis = analysed(rows_of(sorted(kept), [0]))
        halves = [half for half in (ORDER[:8], ORDER[8:]) if kept >= set(half)]
        assert (analysis.effects is not None) == bool(halves)
        assert bool(analysis.why_not) != bool(halves)
    assert analysed(rows_of(sorted(set(range(16)) - {0, 1, 2}), [0])).effects is not None


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


def page_of(responses: pa.Table, directory: Path) -> str:
    write_csv_atomic(responses, directory / "responses.csv")
    assert main(["factors", "--responses", str(directory / "responses.csv"), "--out", str(directory / "out")]) == 0
    return (directory / "out" / "report.html").read_text(encoding="utf-8")


def test_the_command_reports_effects(tmp_path: Path) -> None:
    page = page_of(rows_of(list(range(16)), [0]), tmp_path)
    assert "F3 x F5, F6 x F7" in page
    assert "Negative control" in page
    assert "granularity on log mean KL of a removal" in page
    assert "outside the rule" not in page
    assert read_csv(tmp_path / "out" / "figures" / "factor_effects.csv").num_rows == 56
    assert (tmp_path / "out" / "figures" / "factor_effects.png").stat().st_size > 10_000
    assert not list((tmp_path / "out").rglob("*all_runs*"))


def test_the_command_reports_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(rows_of(ORDER[:3], [0]), tmp_path)
    assert "3 runs of 1 seed are made so far, and no effect can be estimated" in page
    assert "3 runs count so far" in capsys.readouterr().out
    assert "F3 x F5, F6 x F7" in page
    assert "Negative control" in page
    assert not (tmp_path / "out" / "effects.csv").exists()


@pytest.mark.parametrize("weak", [tuple(range(16)), tuple(ORDER[3:])], ids=["none counts", "three count"])
@pytest.mark.parametrize("effect", [0.8, 0.0], ids=["planted", "noise"])
def test_where_too_few_runs_count_all_are_described_outside_the_rule(
    effect: float, weak: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses = rows_of(list(range(16)), [0], effect, weak)
    page_of(rows_of(list(range(16)), [0]), tmp_path)
    page = page_of(responses, tmp_path)  # files of a study that had effects do not stay
    count = 16 - len(weak)
    lead = f"{count} of 16 runs count: no effect can be estimated by the rule that was written down before."
    assert lead in page
    assert "Established" not in page
    assert page.index(lead) < page.index("A description, not a finding.")
    assert f"{count} runs count so far; 8 are needed" in capsys.readouterr().out
    out = tmp_path / "out"
    assert not (out / "effects.csv").exists()
    assert not (out / "figures" / "factor_effects.csv").exists()
    described = read_csv(out / "effects_all_runs.csv").to_pylist()
    below = [(row["response"], row["factor"]) for row in described if row["p_holm"] <= 0.05 and row["primary"]]
    assert below == ([("log_mean_kl", "F2")] if effect else [])
    assert {row["n_runs"] for row in described} == {16}
    planted = next(row for row in described if (row["response"], row["factor"]) == ("log_mean_kl", "F2"))
    assert planted["effect"] == pytest.approx(-effect, abs=0.1)
    figure = read_csv(out / "figures" / "factor_effects_all_runs.csv")
    assert figure.num_rows == 56
    assert "outcome" not in figure.column_names
    assert "detectable" in figure.column_names
    assert read_csv(out / "aliases_all_runs.csv")["aliases"].to_pylist()[7] == "F3 x F5, F6 x F7"


def test_where_enough_runs_count_the_others_are_described_beside_them(tmp_path: Path) -> None:
    responses = rows_of(list(range(16)), [0], weak=(4, 7))
    page = page_of(responses, tmp_path)
    assert "granularity on log mean KL of a removal" in page
    assert "14 of 16 runs of 1 seed count" in page
    assert "All runs, outside the rule" in page
    for of, n_runs in (("", 14), ("_all_runs", 16)):
        assert set(read_csv(tmp_path / "out" / f"effects{of}.csv")["n_runs"].to_pylist()) == {n_runs}
        assert (tmp_path / "out" / "figures" / f"factor_effects{of}.csv").is_file()
    assert read_csv(tmp_path / "out" / "aliases.csv") != read_csv(tmp_path / "out" / "aliases_all_runs.csv")
    every = analysed(responses, ANY_ROUTED_PART)
    assert every.effects is not None
    assert runs_in_hand(responses, ANY_ROUTED_PART).runs == ORDER


def test_too_few_runs_are_no_description_either(tmp_path: Path) -> None:
    page = page_of(rows_of(ORDER[:5], [0], weak=tuple(ORDER[1:5])), tmp_path)
    assert "1 of 5 runs count: no effect can be estimated" in page
    assert "1 run counts so far; 8 are needed" in page
    assert "All runs taken together do not give effects either: 5 runs are made so far; 8 are needed" in page
