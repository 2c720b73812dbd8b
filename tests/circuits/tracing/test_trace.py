"""Tracing finds a planted expert and nothing else, says what it left out, and refuses what it cannot do soundly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_moe import HookedMoE, Tokenizer
from hooked_moe.circuits.tracing import TracingResult, estimate, trace_facts
from hooked_moe.circuits.tracing.findings import choice_stability, conclusion, findings
from hooked_moe.circuits.tracing.published import compare_published, published_cases
from hooked_moe.circuits.tracing.selection import ExpertGrid, candidates, halves
from hooked_moe.corpus import FactRecord
from tests.support.planted_facts import EXPERT, LAYER, N_SUBJECTS, planted_model, planted_records, planted_tokenizer

FEW: dict[str, Any] = {"min_cases": 8, "n_cases": N_SUBJECTS}


@pytest.fixture(scope="module")
def planted() -> HookedMoE:
    return planted_model()


@pytest.fixture(scope="module")
def traced(planted: HookedMoE) -> TracingResult:
    return trace_facts(planted, planted_records(), corruption="replace", **FEW)


@pytest.mark.parametrize("search", ["joint", "layer_first"])
@pytest.mark.parametrize("corruption", ["noise", "replace"])
def test_exactly_the_planted_expert_is_chosen(planted: HookedMoE, corruption: str, search: str) -> None:
    result = trace_facts(planted, planted_records(), corruption=corruption, search=search, readouts=["logit_difference"], **FEW)
    chosen = result.selection
    assert chosen is not None
    assert (chosen.layer, chosen.expert) == (LAYER, EXPERT)
    assert result.layer == LAYER
    rescue, specific = result.expert(LAYER, EXPERT), result.specificity(LAYER, EXPERT)
    assert result.validated(specific).low > 0
    # It is all that the layer does, and nearly all that is lost.
    np.testing.assert_allclose(rescue, result.site("moe_out")[:, LAYER], atol=0.1)
    assert result.validated(rescue).mean > 0.9 * result.cases["drop"].to_numpy().mean()
    others = [c for c in result.ranking if (c.layer, c.expert) != (LAYER, EXPERT)]
    assert all(abs(other.rescue) < 0.05 * chosen.rescue for other in others)


def test_a_planted_expert_is_needed_writes_directly_and_by_its_content(traced: TracingResult) -> None:
    rescue = traced.expert(LAYER, EXPERT)
    np.testing.assert_allclose(traced.expert(LAYER, EXPERT, "direct"), rescue, rtol=0.35)
    content, routing = (traced.expert(LAYER, EXPERT, f"rescue_{part}") for part in ("content", "routing"))
    assert np.abs(routing).mean() < 0.2 * np.abs(content).mean()
    assert (traced.expert(LAYER, EXPERT, "necessity") < -1).all()
    assert f"expert {EXPERT} of layer {LAYER} alone restores" in conclusion(traced)
    assert choice_stability(traced) == {"settings": 25, "same": 25, "relation_folds": 0, "relation_folds_same": 0}


def test_the_same_call_gives_the_same_tables_and_they_survive_a_file(
    planted: HookedMoE, traced: TracingResult, tmp_path: Path
) -> None:
    again = trace_facts(planted, planted_records(), corruption="replace", **FEW)
    again.save(tmp_path / "traced")
    loaded = TracingResult.load(tmp_path / "traced")
    for name in ("cases", "blocks", "experts"):
        for other in (again, loaded):
            assert getattr(other, name).schema.equals(getattr(traced, name).schema, check_metadata=True)
            pd.testing.assert_frame_equal(getattr(other, name).to_pandas(), getattr(traced, name).to_pandas(), check_exact=True)
    assert loaded.identity == traced.identity
    assert loaded.selection == traced.selection
    assert findings(loaded).equals(findings(traced))
    assert len(repr(loaded)) < 200


def test_files_that_are_damaged_or_missing_are_named(traced: TracingResult, tmp_path: Path) -> None:
    traced.save(tmp_path)
    content = bytearray((tmp_path / "experts.parquet").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "experts.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"experts.*damaged"):
        TracingResult.load(tmp_path)
    (tmp_path / "experts.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"experts\.parquet does not exist"):
        TracingResult.load(tmp_path)


def test_held_out_facts_are_measured_unfiltered_and_nothing_is_left_out_in_silence(planted: HookedMoE) -> None:
    records = [*planted_records(), FactRecord(900, "side", "the {} is", "s1", "no such word", None)]
    result = trace_facts(planted, records, corruption="noise", min_margin=None, min_drop=None, **FEW)
    assert result.cases.num_rows == N_SUBJECTS
    assert sum(result.identity["excluded"].values()) + result.cases.num_rows == len(records)


def test_every_record_is_a_case_or_counted(planted: HookedMoE) -> None:
    for corruption in ("noise", "replace"):
        result = trace_facts(planted, planted_records(), corruption=corruption, min_margin=2.0, **FEW)
        assert sum(result.identity["excluded"].values()) + result.cases.num_rows == N_SUBJECTS


def test_several_draws_are_averaged(planted: HookedMoE) -> None:
    options: dict[str, Any] = {"corruption": "noise", "min_drop": None, "readouts": ["logit_difference"], **FEW}
    one = trace_facts(planted, planted_records(), draws=1, **options)
    three = trace_facts(planted, planted_records(), draws=3, **options)
    assert three.cases["runs"].to_pylist() == [3] * N_SUBJECTS
    assert one.cases["d_clean"].to_pylist() == pytest.approx(three.cases["d_clean"].to_pylist(), abs=1e-5)
    assert one.cases["d_corrupt"].to_pylist() != pytest.approx(three.cases["d_corrupt"].to_pylist(), abs=1e-3)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruption": "nois"}, "corruption must be one of 'noise', 'replace', not 'nois'"),
        ({"protocol": "published"}, "protocol must be one of 'defined', 'as_published'"),
        ({"readouts": ["probability"]}, "readouts are 'logit_difference'"),
        ({"draws": 0}, "draws must be a whole number from 1"),
        ({"sigma": float("nan")}, "sigma must be a number from 0"),
        ({"recurrence": 0.0}, "recurrence must be a share"),
        ({"min_cases": 41, "n_cases": 64}, r"only 40 of 40 facts are usable cases, and at least 41 are needed"),
        ({"min_margin": 1e6, "n_cases": 8}, r"only 0 of 40 facts are usable cases.* 40 where "),
    ],
)
def test_bad_options_say_what_is_wrong(planted: HookedMoE, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_facts(planted, planted_records(), **options)


def test_a_subject_that_is_not_in_its_prompt_is_refused(planted: HookedMoE) -> None:
    records = [replace(record, prompt="the subject is") for record in planted_records()]
    with pytest.raises(ValueError, match="is not found in the prompt"):
        trace_facts(planted, records, **FEW)


def test_a_tokenizer_that_leaves_bos_open_is_refused(planted: HookedMoE) -> None:
    plain = planted_tokenizer()
    unclear = Tokenizer(plain.backend, bos_id=1, eos_id=None, pad_id=0, adds_bos=True)
    planted.tokenizer = unclear
    try:
        with pytest.raises(ValueError, match="whether texts begin with BOS is ambiguous"):
            trace_facts(planted, planted_records(), **FEW)
        result = trace_facts(planted, planted_records(), prepend_bos=True, readouts=["logit_difference"], **FEW)
        assert result.identity["begins_with_bos"]
    finally:
        planted.tokenizer = plain


# --- choosing ----------------------------------------------------------------------------------------------------------


def test_controls_are_what_loops_over_cases_say() -> None:
    rng = np.random.default_rng(0)
    active = rng.random((9, 2, 6)) < 0.6
    grid = ExpertGrid(np.where(active, rng.normal(size=active.shape), 0), active, np.where(active, rng.random(active.shape), 0))
    specific, matched, rank = grid.specificity(1, 2, "all", 0), grid.weight_matched(1, 2), grid.rank(1, 2)
    for case in range(9):
        others = [e for e in range(6) if e != 2 and active[case, 1, e]]
        own = grid.rescue[case, 1, 2]
        mean = np.mean([grid.rescue[case, 1, e] for e in others]) if others else 0.0
        assert specific[case] == pytest.approx(own - mean)
        if not active[case, 1, 2]:
            assert math.isnan(rank[case])
            assert math.isnan(matched[case])
            continue
        assert rank[case] == 1 + sum(grid.rescue[case, 1, e] > own for e in others)
        nearest = min(others, key=lambda e: abs(grid.weight[case, 1, e] - grid.weight[case, 1, 2]), default=None)
        assert nearest is None or matched[case] == pytest.approx(own - grid.rescue[case, 1, nearest])


def test_an_expert_that_seldom_occurs_is_no_candidate_however_strong() -> None:
    active = np.zeros((10, 1, 3), dtype=bool)
    active[:3, 0, 0], active[:8, 0, 1] = True, True
    rescue = np.where(active, [10.0, 1.0, 0.0], 0.0)
    grid = ExpertGrid(rescue, active, active.astype(float))
    every = np.ones(10, dtype=bool)
    assert [c.expert for c in candidates(grid, np.zeros((10, 1)), every, "joint", 0.5)] == [1]
    assert [c.expert for c in candidates(grid, np.zeros((10, 1)), every, "joint", 0.3)] == [0, 1]


def test_halves_are_disjoint_and_repeat() -> None:
    discovery = halves(101, seed=3)
    assert discovery.sum() == 50
    assert (discovery == halves(101, seed=3)).all()
    assert (discovery != halves(101, seed=4)).any()


def test_intervals_cover_and_the_test_keeps_its_level() -> None:
    rng = np.random.default_rng(1)
    covered, found = 0, 0
    for seed in range(60):
        values = rng.normal(0.5, 1.0, size=64)
        result = estimate(values, seed)
        covered += result.low <= 0.5 <= result.high
        found += estimate(values - 0.5, seed).p < 0.05
    assert covered >= 52
    assert found <= 8
    assert estimate(np.zeros(5)).p == 1.0
    with pytest.raises(ValueError, match="at least two"):
        estimate(np.zeros(1))


# --- published numbers --------------------------------------------------------------------------------------------------


def test_published_numbers_stand_beside_a_result_of_their_model(traced: TracingResult) -> None:
    with pytest.raises(ValueError, match="nothing was published of 'planted'"):
        compare_published(traced, "planted")
    large = replace(traced, identity={**traced.identity, "n_layers": 48, "n_experts": 128})
    padded = np.zeros((large.cases.num_rows, 48))
    object.__setattr__(large, "site", lambda site, column="rescue": padded)
    rows = compare_published(large, "Qwen3-30B-A3B-Base").to_pylist()
    assert {row["source"] for row in rows} == {"paper", "reproduction"}
    layer = next(row for row in rows if row["quantity"] == "MLP output of layer 44")
    assert layer["published"] == "+0.90 [+0.75, +1.05]"


def test_published_case_ids_are_the_papers() -> None:
    assert len(published_cases("Qwen3-30B-A3B-Base")) == 256
    with pytest.raises(ValueError, match="no case ids were published for 'olmoe'"):
        published_cases("olmoe")


def test_nothing_is_left_of_gradients(planted: HookedMoE) -> None:
    trace_facts(planted, planted_records(), readouts=["logit_difference"], **FEW)
    assert all(parameter.grad is None for parameter in planted.parameters())
    assert torch.is_grad_enabled()
