"""Tracing finds a planted expert and nothing else, says what it left out, and refuses what it cannot do soundly."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from hooked_moe import HookedMoE, Tokenizer
from hooked_moe.chat import ChatTemplate
from hooked_moe.circuits.tracing import Protocol, TracingResult, estimate, trace_facts
from hooked_moe.circuits.tracing.cases import find_cases
from hooked_moe.circuits.tracing.findings import choice_stability, conclusion, findings
from hooked_moe.circuits.tracing.foils import prompts_with_foils
from hooked_moe.circuits.tracing.places import places_of
from hooked_moe.circuits.tracing.prompts import Prompt, as_prompts
from hooked_moe.circuits.tracing.published import compare_published, published_cases
from hooked_moe.circuits.tracing.selection import ExpertGrid, candidates, halves
from hooked_moe.corpus import FactRecord
from tests.support.planted_facts import EXPERT, LAYER, N_SUBJECTS, WORDS, planted_model, planted_records, planted_tokenizer

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


# --- other tokens than the last -------------------------------------------------------------------------------------------


def test_every_token_from_the_subject_on_is_patched_and_the_planted_expert_writes_at_the_last(planted: HookedMoE) -> None:
    """Attention of layer 0 takes the subject's class away; later layers at the subject's own token have nothing to give."""
    few = {**FEW, "readouts": ["logit_difference"]}
    result = trace_facts(planted, planted_records(), positions="all", **few)
    assert result.places == ["subject_last", "final"]
    chosen = result.selection
    assert chosen is not None
    assert (chosen.place, chosen.layer, chosen.expert) == ("final", LAYER, EXPERT)
    last, subject = result.at("final"), result.at("subject_last")
    alone = trace_facts(planted, planted_records(), positions="final", **few)
    np.testing.assert_allclose(last.site("moe_out"), alone.site("moe_out"), atol=1e-6)
    np.testing.assert_allclose(last.grid.rescue, alone.grid.rescue, atol=1e-6)
    assert np.abs(subject.site("moe_out")).max() < 0.05 * result.cases["drop"].to_numpy().mean()
    by_itself = trace_facts(planted, planted_records(), positions="subject_last", **few)
    np.testing.assert_allclose(subject.grid.rescue, by_itself.grid.rescue, atol=1e-6)
    with pytest.raises(ValueError, match=r"choose with \.at\(place\), of subject_last, final"):
        result.site("moe_out")
    with pytest.raises(ValueError, match="patched were 'subject_last', 'final', not 'subject_first'"):
        result.at("subject_first")
    assert conclusion(result) == conclusion(last)


@pytest.mark.parametrize("corruption", ["noise", "replace"])
def test_an_expert_that_works_at_the_subject_is_found_there_and_nowhere_else(corruption: str) -> None:
    model = planted_model(at_subject=True)
    result = trace_facts(model, planted_records(), positions="all", corruption=corruption, **FEW)
    chosen = result.selection
    assert chosen is not None
    assert (chosen.place, chosen.layer, chosen.expert) == ("subject_last", LAYER, EXPERT)
    subject = result.at("subject_last")
    assert subject.validated(subject.specificity(LAYER, EXPERT)).low > 0
    assert not subject.expert(LAYER, EXPERT, "direct").any()
    assert (subject.expert(LAYER, EXPERT, "necessity") < -1).all()
    assert subject.validated(subject.expert(LAYER, EXPERT)).mean > 0.9 * result.cases["drop"].to_numpy().mean()
    assert conclusion(result).startswith(f"At the last token of the subject, the MLP output of layer {LAYER} restores")
    elsewhere = result.at("final").ranking
    assert all(abs(other.rescue) < 0.05 * chosen.rescue for other in elsewhere)


def test_tokens_at_one_place_of_a_case_are_averaged(traced: TracingResult, tmp_path: Path) -> None:
    """Of a subject of several tokens; cases whose subject has one only have nothing there."""
    blocks, experts = traced.blocks.to_pandas(), traced.experts.to_pandas()
    tables = {}
    for name, table in (("blocks", blocks), ("experts", experts)):
        second, third = table[table["case"] < 10].copy(), table[table["case"] < 10].copy()
        second["position"], second["place"] = 0, "subject_middle"
        third["position"], third["place"], third["rescue"] = 1, "subject_middle", 3 * third["rescue"]
        tables[name] = pa.Table.from_pandas(pd.concat([table, second, third]), schema=getattr(traced, name).schema)
    several = replace(traced, **tables)
    several.save(tmp_path)
    several = TracingResult.load(tmp_path)
    middle = several.at("subject_middle")
    assert several.places == ["subject_middle", "final"]
    assert middle.cases["case"].to_pylist() == list(range(10))
    np.testing.assert_allclose(middle.site("moe_out"), 2 * traced.site("moe_out")[:10], rtol=1e-12)
    np.testing.assert_allclose(middle.grid.rescue, 2 * traced.grid.rescue[:10], rtol=1e-12)
    np.testing.assert_allclose(middle.grid.weight, traced.grid.weight[:10], rtol=1e-12)
    np.testing.assert_allclose(middle.expert(LAYER, EXPERT), 2 * traced.expert(LAYER, EXPERT)[:10], rtol=1e-12)
    assert (middle.discovery == traced.discovery[:10]).all()


@pytest.mark.parametrize(
    ("subject", "length", "expected"),
    [
        (range(1, 2), 4, {1: "subject_last", 2: "after_subject", 3: "final"}),
        (range(1, 5), 6, {1: "subject_first", 2: "subject_middle", 3: "subject_middle", 4: "subject_last", 5: "final"}),
        (range(2, 4), 4, {2: "subject_first", 3: "final"}),
    ],
)
def test_tokens_are_what_they_are_in_the_prompt(subject: range, length: int, expected: dict[int, str]) -> None:
    prompt = Prompt(planted_records()[0], tuple(range(length)), subject, 3)
    assert places_of(prompt, "all") == expected
    assert places_of(prompt, "final") == {length - 1: "final"}
    assert places_of(prompt, "subject_last") == {subject[-1]: "subject_last"}


# --- controls --------------------------------------------------------------------------------------------------------------


def test_a_planted_expert_is_no_matter_of_length(traced: TracingResult) -> None:
    """A random vector of its length does far less, and at the length of another expert's patch it still does more than that."""
    rescue, random = (traced.expert(LAYER, EXPERT, column) for column in ("rescue", "rescue_random"))
    assert traced.validated(rescue - 2 * random).low > 0
    equal = traced.equal_norm(LAYER, EXPERT)
    assert traced.validated(equal.own - equal.matched).low > 0
    assert np.abs(equal.own).mean() < np.abs(rescue).mean()
    rows = {row["quantity"]: row for row in findings(traced).to_pylist() if row["expert"] == EXPERT}
    difference = rows["rescue at equal norm"]["mean"] - rows["the nearest weight's at equal norm"]["mean"]
    assert rows["specificity at equal norm"]["mean"] == pytest.approx(difference)
    difference = rows["rescue"]["mean"] - rows["rescue by a random vector of its length"]["mean"]
    assert rows["rescue less that of the random vector"]["mean"] == pytest.approx(difference)


def test_the_expert_with_the_nearest_weight_is_the_same_in_both_controls(traced: TracingResult) -> None:
    """`weight_matched` finds it in the tables, `control_patches` among the patches: unscaled where the other is the longer."""
    experts = traced.experts.to_pandas()
    clean = experts[experts["clean_active"]]
    for _, active in clean.groupby(["case", "layer"]):
        for row in active.itertuples():
            others = active[active["expert"] != row.expert]
            nearest = others.loc[(others["weight_clean"] - row.weight_clean).abs().idxmin()]
            if traced.cases["runs"][row.case].as_py() == 1 and nearest["norm_delta"] <= row.norm_delta:
                assert row.matched_equal_norm == pytest.approx(nearest["rescue"], abs=1e-5)


def test_foils_are_as_likely_as_the_true_answer_for_other_subjects(planted: HookedMoE) -> None:
    """By a loop over the relation's other subjects; the true answers of a subject are no foils of it."""
    records = [*planted_records(), FactRecord(50, "side", "the {} is", "s3", "is", None)]
    protocol = Protocol(corruption="noise", foils="prior", min_margin=None, min_drop=None)
    prompts = as_prompts(planted.require_tokenizer(), records, protocol, Counter())
    found = prompts_with_foils(planted, prompts, protocol, Counter())
    assert len(found) == len(records)
    with torch.no_grad():
        logits = planted(torch.tensor([prompt.tokens for prompt in prompts]))[:, -1]
    for number, (prompt, foil) in enumerate(found):
        others = [n for n, record in enumerate(records) if record.subject != records[number].subject]
        own = {prompts[n].true_id for n, record in enumerate(records) if record.subject == records[number].subject}
        prior = logits[others].mean(0)
        answers = {p.true_id for p in prompts} - own
        expected = min(answers, key=lambda token: abs(prior[token] - prior[prompts[number].true_id]))
        assert foil == expected
        assert prompt.record.foil in ("east", "west", "is")
    result = trace_facts(planted, planted_records(), corruption="noise", foils="prior", **FEW)
    assert result.identity["protocol"]["foils"] == "prior"
    chosen = result.selection
    assert chosen is not None
    assert (chosen.layer, chosen.expert) == (LAYER, EXPERT)


@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)], ids=["inference", "autocast"])
def test_it_does_not_depend_on_torch_modes(planted: HookedMoE, traced: TracingResult, mode: Any) -> None:
    with mode:
        found = trace_facts(planted, planted_records(), corruption="replace", **FEW)
    pd.testing.assert_frame_equal(found.experts.to_pandas(), traced.experts.to_pandas())
    pd.testing.assert_frame_equal(found.blocks.to_pandas(), traced.blocks.to_pandas())


def test_a_subject_whose_answers_are_the_same_is_no_donor(planted: HookedMoE) -> None:
    """Where a subject has two answers, neither it nor another subject with one of them takes its place."""
    records = [*planted_records(), FactRecord(50, "side", "the {} is", "s0", "west", None)]
    protocol = Protocol(corruption="replace", min_margin=None, min_drop=None, min_cases=4, max_donors=50)
    runs = find_cases(planted, records, protocol).runs
    assert len(runs) > 100
    for run in runs:
        assert run.donor is not None
        assert run.prompt.record.subject != "s0", "every other subject is in the east or the west, where s0 is too"
        assert run.donor.record.subject != "s0"
        assert run.donor.record.true != run.prompt.record.true


def test_with_another_subject_too_the_corruption_has_to_take_what_is_asked(planted: HookedMoE, traced: TracingResult) -> None:
    drops = traced.cases["drop"].to_numpy()
    with pytest.raises(ValueError, match=r"only 0 of \d+ facts are usable"):
        find_cases(planted, planted_records(), Protocol(min_drop=2 * float(drops.max()), min_cases=4))
    some = find_cases(planted, planted_records(), Protocol(min_drop=float(np.median(drops)), min_cases=4, max_donors=50))
    everyone = find_cases(planted, planted_records(), Protocol(min_cases=4, max_donors=50))
    assert 0 < len(some.runs) < len(everyone.runs)


def test_a_split_that_is_given_is_kept(planted: HookedMoE, traced: TracingResult, tmp_path: Path) -> None:
    discovery = {record.case_id for record in planted_records()[:12]}
    result = trace_facts(planted, planted_records(), discovery=discovery, **FEW)
    ids = np.array(result.cases["case_id"].to_pylist())
    assert set(ids[result.discovery].tolist()) == discovery
    assert result.identity["split"] == "given"
    assert traced.identity["split"] == "by the seed"
    assert (traced.discovery == halves(N_SUBJECTS, 0)).all()
    result.save(tmp_path)
    assert (TracingResult.load(tmp_path).discovery == result.discovery).all()
    with pytest.raises(ValueError, match="of 40 usable cases 2 are of the discovery split and 38 are not; at least 4"):
        trace_facts(planted, planted_records(), discovery=[0, 1], **FEW)


# --- chat templates ----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }} west {{ message['content'] }} east "
    "{% else %}{{ message['content'] | trim }} <pad>{% endif %}{% endfor %}"
)


def test_a_prompt_begins_what_the_assistant_answers(planted: HookedMoE) -> None:
    tokenizer = planted_tokenizer()
    tokenizer.chat_template = ChatTemplate({"default": TEMPLATE}, {"bos_token": "<pad>"})
    record, protocol = planted_records()[3], Protocol(instruction="is the")
    (prompt,) = as_prompts(tokenizer, [record], protocol, Counter())
    words = "<pad> west is the east the s3 is"
    assert prompt.tokens == tuple(WORDS.index(word) for word in words.split())
    assert prompt.subject == range(6, 7)
    result_of = partial(trace_facts, planted, planted_records(), readouts=["logit_difference"], **FEW)
    with pytest.raises(ValueError, match="this model has no chat template"):
        result_of(instruction="is the")
    planted.tokenizer = tokenizer
    try:
        result = result_of(instruction="is the", min_margin=None)
        with pytest.raises(ValueError, match="the chat template says whether a prompt begins with BOS"):
            result_of(instruction="is the", prepend_bos=False)
        tokenizer.chat_template = ChatTemplate({"default": "{{ messages[0]['content'] }}"})
        with pytest.raises(ValueError, match="the chat template changes what the assistant says"):
            result_of(instruction="is the")
    finally:
        planted.tokenizer = planted_tokenizer()
    assert result.protocol.instruction == "is the"


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
        ({"positions": "last"}, "positions must be one of 'final', 'subject_last', 'all', not 'last'"),
        ({"foils": "prior"}, "foils='prior' goes with corruption='noise'"),
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
    rows = compare_published(large, "Qwen3-30B-A3B-Base").to_pylist()
    assert {row["source"] for row in rows} == {"paper", "reproduction"}
    layer = next(row for row in rows if row["quantity"] == "MLP output of layer 44")
    assert layer["published"] == "+0.90 [+0.75, +1.05]"
    assert layer["measured"] == "+0.00 [+0.00, +0.00]"
    equal = next(row for row in rows if row["quantity"] == "its specificity at equal norm")
    assert (equal["published"], equal["measured"]) == ("+0.19 [+0.12, +0.26]", "not active in two validation cases")


def test_published_case_ids_are_the_papers() -> None:
    discovery, validation = published_cases("Qwen3-30B-A3B-Base")
    assert (len(discovery), len(validation), len(discovery & validation)) == (128, 128, 0)
    with pytest.raises(ValueError, match="no case ids were published for 'olmoe'"):
        published_cases("olmoe")


def test_nothing_is_left_of_gradients(planted: HookedMoE) -> None:
    trace_facts(planted, planted_records(), readouts=["logit_difference"], **FEW)
    assert all(parameter.grad is None for parameter in planted.parameters())
    assert torch.is_grad_enabled()
