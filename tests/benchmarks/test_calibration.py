"""A seeded subset of benchmarks/calibration.py: every rule near its level on planted nulls, and the plants what they claim."""

import numpy as np
import pytest

from benchmarks import calibration, saving_rules
from benchmarks.planted_effects import EXPERTS, planted_table

pytestmark = pytest.mark.usefixtures("unchecked")  # as the script runs it

RUNS = 30
HELD = [
    "documents: t",
    "documents: Wilcoxon",
    "documents: sign flip",
    "d: interval misses",
    "Spearman: interval excludes 0",
    "Plackett-Luce, beta",
]


@pytest.fixture(scope="module")
def blind():
    return calibration.Runs(RUNS, 24, calibration.NOTHING, seed=0)


@pytest.fixture(scope="module")
def seeing():
    return calibration.Runs(RUNS, 24, calibration.PLANTED, seed=1)


@pytest.mark.parametrize("rule", HELD)
def test_a_rule_keeps_its_level_where_nothing_is_planted(blind, rule):
    rate = blind.rate(rule, 0.0)
    assert abs(rate.mean - 0.05) < 4 * max(rate.error, 0.008)


@pytest.mark.parametrize("rule", ["Bonferroni", "Holm", "BH", "agreement", "max-T"])
def test_a_family_has_no_more_false_findings_than_its_level(blind, rule):
    assert blind.any(f"documents: {rule}").mean <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / RUNS)


def test_counting_alike_positions_as_independent_is_found_out(blind):
    rate = blind.rate("all positions as if independent: t", 0.0)
    assert rate.above(0.06)


def test_planted_effects_are_found_as_predicted_and_called_valid(seeing):
    assert seeing.rate("documents: Bonferroni", 0.2).mean > 0.9
    assert seeing.rate("documents: verdict valid", 0.2).mean > 0.9
    assert seeing.rate("documents: equivalent", 0.2).mean < 0.05
    assert seeing.rate("JZS", 0.2).mean > 0.9
    assert seeing.rate("Plackett-Luce, Savage-Dickey", 0.2).mean > 0.9
    assert seeing.rate("documents: agreement", calibration.BOUND).mean < seeing.rate("documents: agreement", 0.2).mean


def test_an_effect_at_the_bound_is_rarely_called_equivalent_to_none(seeing):
    assert seeing.rate("documents: equivalent", calibration.BOUND).mean <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / RUNS)


def test_bayes_factors_seldom_mislead(blind):
    for rule in ("JZS", "directional JZS", "Plackett-Luce, Savage-Dickey"):
        assert blind.rate(rule, 0.0).mean < 0.1


def test_the_planted_d_is_the_d_of_a_large_table():
    table = planted_table(np.random.default_rng(2), 4000, (0.1, 0.2), rankings=1)
    for layer, expected in enumerate((0.1, 0.2)):
        score, rows = table.scores(layer, 0), np.arange(len(table.document))
        difference = table.delta[layer][rows, score.argmax(axis=1)] - table.delta[layer][rows, score.argmin(axis=1)]
        assert difference.mean() / difference.std() == pytest.approx(expected, abs=0.01)


def test_the_planted_share_is_that_of_a_large_table():
    table = planted_table(np.random.default_rng(3), 4000, (0.0,), rankings=1, static_spread=0.5)
    assert table.static_share[0] == pytest.approx(calibration._least_squares_share(table.expert[0], table.delta[0]), rel=0.1)
    assert set(np.unique(table.expert)) == set(range(EXPERTS))
    assert np.isnan(table.effect).all()  # a fixed ranking may be right about experts that differ


def test_the_numbers_do_not_depend_on_the_processes():
    one, two = (calibration._each(_first_number, 5, 7, processes, "") for processes in (1, 2))
    assert one == two
    assert len(set(one)) == 5


def _first_number(run: int, random: np.random.Generator) -> tuple[int, float]:
    return run, float(random.random())


def test_the_page_has_a_row_for_every_rule(capsys):
    tables = calibration.main(["--small", "--runs", "3"])
    printed = capsys.readouterr().out
    assert "3 synthetic effect tables" in printed
    assert all(str(table) in printed for table in tables)
    shown = " ".join(row[0] for table in tables for row in table.rows)
    for rule in ("Wilcoxon", "sign flip", "bootstrap-t", "max-T", "Holm", "BH", "agreement", "JZS", "Plackett-Luce"):
        assert rule in shown


def test_savings_are_told_as_planted_and_nonsense_is_not_believed():
    said = [saving_rules.told(12, run, np.random.default_rng(run)) for run in range(12)]
    mean = {name: float(np.mean([one[name] for one in said])) for name in said[0]}
    assert mean[f"{saving_rules.KNOWING}: helps"] > 0.9
    assert mean[f"{saving_rules.REVERSED}: harms"] > 0.5
    assert mean[f"{saving_rules.KNOWING}: interval misses"] <= 0.25
    assert mean["nonsense: any helps"] <= 0.17  # two of twelve
    assert mean["nonsense: p <= .05"] < 0.12
    assert mean["oracle: harms"] == 0


def test_the_costs_planted_are_those_that_the_rules_are_judged_by():
    truths = saving_rules.true_shares()
    assert truths[saving_rules.KNOWING] > 0.4 > truths[saving_rules.BARELY] > 0 > truths[saving_rules.REVERSED]
    grid = saving_rules.drawn_documents(np.random.default_rng(1), 400)
    exact = saving_rules.drawn_documents(np.random.default_rng(1), 400, expected_only=True)
    np.testing.assert_array_equal(grid.expert, exact.expert)
    assert grid.kl.mean() == pytest.approx(exact.kl.mean(), rel=0.1)
    assert grid.delta_loss.mean() == pytest.approx(exact.kl.mean(), rel=0.1)
