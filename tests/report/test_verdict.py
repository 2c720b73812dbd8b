"""The verdict of the report: each sentence is true of its table, whatever the truth is that the table estimates."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from hooked_moe import tables
from hooked_moe.analysis.criteria import CRITERIA
from hooked_moe.analysis.rankings import ORACLE, TOKEN_LADDER
from hooked_moe.report.conclusions import conclude
from hooked_moe.report.figures.names import label
from hooked_moe.report.figures.pruning import pruning
from hooked_moe.report.figures.rank_correlation import rank_correlation
from hooked_moe.report.figures.savings import draw_savings
from hooked_moe.report.figures.savings import savings as savings_figure
from hooked_moe.report.inputs import Inputs, read_inputs
from hooked_moe.report.lead import lead
from hooked_moe.report.pruning_sections import pruning_section
from hooked_moe.report.reread import reread_sentences
from hooked_moe.report.saving_sections import savings_section
from hooked_moe.report.savings import MARGIN, Savings, read_savings
from tests.support import synthetic_savings
from tests.support.synthetic_savings import SCENARIOS, outcome_of, pruning_rows, pruning_summary_rows, reread_rows, savings_rows

N_LAYERS = 3
# Words that would say more than the numbers do.
NOT_TO_BE_SAID = ("as good as none", "a fifth", "mostly luck", "saving predicts", "equivalent", "no effect")


def inputs_of(scenario: str) -> Inputs:
    truth = SCENARIOS[scenario]
    rows = {
        "savings.csv": savings_rows(truth, N_LAYERS),
        "pruning.csv": pruning_rows(truth),
        "pruning_summary.csv": pruning_summary_rows(),
    }
    return Inputs({name: pa.Table.from_pylist(table) for name, table in rows.items()}, {}, {})


def said(inputs: Inputs) -> str:
    """The lead and the conclusions as one text."""
    verdict = lead(read_savings(inputs))
    assert verdict is not None
    conclusions = [sentence.strong + sentence.text for sentence in conclude(inputs)]
    return "\n".join([verdict.headline, verdict.text, *conclusions])


def totals(inputs: Inputs) -> pd.DataFrame:
    """The savings of fixed criteria in the loss, all layers together, by criterion."""
    frame = inputs.tables["savings.csv"].to_pandas()
    fixed = frame.family.isin(["paper", "extended"])
    return frame[(frame.effect == "delta_loss") & (frame.layer == "all") & fixed].set_index("ranking")


def sentence(text: str, beginning: str) -> str:
    """The line of a text that begins so; empty where there is none."""
    return next((line for line in text.splitlines() if line.startswith(beginning)), "")


def named_in(line: str) -> set[str]:
    """The criteria whose saving a line states: "REAP (62%)"."""
    by_label = {label(name): name for name in CRITERIA}
    names = re.findall(r"([\w -]+?) \([\N{MINUS SIGN}\d.]+%\)", re.sub(r"^[^:]*:", "", line).replace(" and ", ", "))
    return {by_label[name.strip()] for name in names}


# --- the truth behind the tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_sentence_says_more_than_its_table(scenario):
    inputs = inputs_of(scenario)
    text, frame = said(inputs), totals(inputs)
    assert not re.search(r"\bnan\b|\binf\b|None", text)
    for words in NOT_TO_BE_SAID:
        assert words not in text
    helps = set(frame.index[frame.outcome == "helps"])
    recommended = re.match(r"Prune by ([\w -]+?), the", text)
    if recommended:
        best = next(name for name in CRITERIA if label(name) == recommended[1])
        assert best == frame.loc[sorted(helps)].saving_share.idxmax()
        assert named_in(sentence(text, "Also shown to help:")) == helps - {best}
    else:
        assert not helps
        assert "Also shown to help:" not in text
    harms = set(frame.index[frame.outcome == "harms"])
    assert named_in(sentence(text, "Shown to harm:")) == harms


def test_a_criterion_that_helps_is_recommended_with_its_cost_and_its_certainty():
    inputs = inputs_of("helpful")
    text, best = said(inputs), totals(inputs).loc["reap"]
    assert text.startswith("Prune by REAP, the lowest first")
    assert f"costs {100 * best.lowest_cost / best.random_cost:.0f}% of removing one at random" in text
    low, high = 100 * best.saving_share_low, 100 * best.saving_share_high
    assert f"It saves {100 * best.saving_share:.0f}% [{low:.0f}%, {high:.0f}%]" in text
    assert f"p = {best.p_family:.3f} (corrected for the 16 criteria shown)" in text
    frame = inputs.tables["savings.csv"].to_pandas()
    expected = frame[(frame.effect == "kl") & (frame.layer == "all") & (frame.ranking == "reap")].iloc[0]
    assert f"By the expected loss (KL) it saves {100 * expected.saving_share:.0f}%" in text
    assert f"REAP helps in {N_LAYERS} of {N_LAYERS} layers" in text
    assert f"REAP reaches {100 * best.share_of_best:.0f}% of that" in text
    truly = {name for name, share in synthetic_savings.HELPFUL.items() if share > MARGIN}
    assert {"reap"} | named_in(sentence(text, "Also shown to help:")) == truly


def test_nonsense_is_not_recommended_and_its_savings_are_called_negligible():
    text = said(inputs_of("nonsense"))
    assert text.startswith("Prune by none of these criteria")
    assert "For 16 of 16 criteria the whole 95% interval" in text
    assert "helps" not in text


def test_a_reversed_criterion_is_named_as_one_that_takes_the_wrong_experts_first():
    text = said(inputs_of("reversed"))
    assert text.startswith("Prune by none of these criteria")
    assert named_in(sentence(text, "Shown to harm:")) == {"coactivation"}
    assert "take first the experts that matter more" in text
    assert "Co-activation has no published direction: its highest-ranked expert costs" in text


def test_too_little_data_ends_undecided_and_asks_for_documents():
    inputs = inputs_of("too little data")
    text, frame = said(inputs), totals(inputs)
    assert text.startswith(f"No criterion is shown to help: {(frame.outcome == 'undecided').sum()} of 16 are undecided")
    assert "More documents would narrow the intervals." in text


def test_a_wide_saving_that_permuted_criteria_reach_too_is_not_blamed_on_the_documents():
    text = said(inputs_of("by chance"))
    assert text.startswith("No criterion is shown to help")
    assert "more documents would not settle that" in text


def test_the_outcome_of_a_criterion_does_not_turn_with_more_data():
    """From few documents to many: undecided first, then one outcome that stays."""
    for name, truth in (("reap", 0.62), ("utilization_rate", 0.0), ("routing_entropy", -0.4)):
        outcomes = []
        for n in (2, 8, 32, 128, 512):
            reach = 0.16 * np.sqrt(72 / n)
            outcomes.append(outcome_of(truth - reach, truth + reach, 1 / 201 if truth else 0.4))
        assert len([o for o in dict.fromkeys(outcomes) if o != "undecided"]) == 1, name
        assert outcomes == sorted(outcomes, key=lambda outcome: outcome != "undecided")


def test_criteria_that_were_not_measured_are_not_counted_and_the_table_says_why():
    rows = savings_rows(SCENARIOS["helpful"], N_LAYERS)
    for row in rows:
        if row["ranking"] in ("aimer", "max_activation"):
            row |= {name: np.nan for name, value in row.items() if isinstance(value, float)}
            row |= {"outcome": "undecided", "note": "not measured: this run has no routing.parquet"}
    text = said(Inputs({"savings.csv": pa.Table.from_pylist(rows)}, {}, {}))
    assert "(corrected for the 14 criteria shown)" in text
    assert named_in(sentence(text, "Undecided")) == set()
    assert sentence(text, "Not judged:").startswith("Not judged: max activation and AIMER;")
    for row in rows:
        row |= {"saving_share": np.nan, "saving_share_low": np.nan, "saving_share_high": np.nan, "outcome": "undecided"}
        row["note"] = "no position where every active expert has a score"
    verdict = lead(Savings(rows))
    assert verdict is not None
    assert verdict.headline == "No criterion could be judged on these data."


def test_few_documents_are_given_as_the_reason_where_they_are_the_reason():
    rows = savings_rows(SCENARIOS["helpful"], N_LAYERS)
    for row in rows:
        row |= {"outcome": "undecided", "note": "5 documents; a verdict needs 10"}
    verdict = lead(Savings(rows))
    assert verdict is not None
    assert verdict.headline.startswith("No criterion is shown to help: 16 of 16 are undecided")
    assert "5 documents; a verdict needs 10" in verdict.text


def test_a_criterion_without_a_published_direction_comes_after_those_with_one():
    rows = savings_rows(SCENARIOS["helpful"], N_LAYERS)
    for row in rows:
        if row["ranking"] == "coactivation":
            row |= {"saving_share": 0.9, "saving_share_low": 0.85, "saving_share_high": 0.95, "outcome": "helps"}
    best = Savings(rows).recommended
    assert best is not None
    assert best["ranking"] == "reap"
    for row in rows:
        row["outcome"] = "helps" if row["ranking"] == "coactivation" else "negligible"
    verdict = lead(Savings(rows))
    assert verdict is not None
    assert "it has no published direction" in verdict.headline


def test_where_the_expected_loss_disagrees_the_lead_says_so():
    rows = savings_rows(SCENARIOS["helpful"], N_LAYERS)
    for row in rows:
        if row["effect"] == "kl" and row["ranking"] == "reap":
            row["outcome"] = "undecided"
    verdict = lead(Savings(rows))
    assert verdict is not None
    assert "By the expected loss (KL) it is undecided, with" in verdict.text


def test_layers_in_which_the_recommendation_does_not_hold_are_named():
    rows = savings_rows(SCENARIOS["helpful"], N_LAYERS)
    for row in rows:
        if row["layer"] == "1" and row["ranking"] == "reap":
            row["outcome"] = "undecided"
    inputs = Inputs({"savings.csv": pa.Table.from_pylist(rows)}, {}, {})
    assert "REAP helps in 2 of 3 layers" in said(inputs)
    assert "It is not shown to in layer 1." in said(inputs)


def test_order_is_kept_apart_from_the_mean():
    inputs = inputs_of("helpful")
    line = sentence(said(inputs), "Order is another question")
    frame = inputs.tables["savings.csv"].to_pandas()
    total = frame[frame.layer == "all"].set_index(["effect", "ranking"])
    fixed = list(CRITERIA)
    for effect in ("delta_loss", "kl"):
        assert f"{total.loc[effect].loc[fixed].spearman.max():+.3f}" in line
    assert "close to unpredictable in order" in line
    assert label("first_order") not in line
    exact = total.loc[("delta_loss", "kl")].spearman
    assert f"orders the realised ones with {exact:+.3f} only" in line
    for row in (rows := frame.to_dict("records")):
        row["spearman"] *= 20
    assert "unpredictable" not in said(Inputs({"savings.csv": pa.Table.from_pylist(rows)}, {}, {}))


def test_the_slot_sentence_says_whether_anything_is_left_within_slots():
    rows = savings_rows(SCENARIOS["helpful"], N_LAYERS)
    inputs = Inputs({"savings.csv": pa.Table.from_pylist(rows)}, {}, {})
    assert "Within a slot they are not shown to differ" in said(inputs)
    for row in rows:
        row["within_slot_contrast_low"] = 0.0001
    assert "Within a slot they differ" in said(Inputs({"savings.csv": pa.Table.from_pylist(rows)}, {}, {}))


# --- pruning and the released data ----------------------------------------------------------------------------------------


def test_the_cost_of_a_pruning_is_that_of_the_recommended_criterion_at_each_share():
    inputs = inputs_of("helpful")
    line = sentence(said(inputs), "What a pruning costs.")
    for row in inputs.rows("pruning.csv"):
        stated = f"{100 * row['share']:g}%: {row['rise']:.4f} nats"
        assert (stated in line) == (row["ranking"] == "reap")
    predicted = sentence(said(inputs), "The effect table predicts the cost.")
    for row in inputs.rows("pruning_summary.csv"):
        assert (f"{row['spearman']:+.2f}, {row['ratio']:.2f} times" in predicted) == (row["population"] == "criteria")


def test_every_pruning_has_its_place_in_the_tables():
    rows = pruning_rows(SCENARIOS["helpful"])
    section = pruning_section(rows, pruning_summary_rows(), ())
    compact, folded = section.blocks[-2:]
    names = [row.cells[0].text for row in compact.rows if row.cells]
    assert len(names) == len(set(names)) == len(rows) / 3
    assert sum(bool(row.cells) for row in folded.blocks[0].rows) == len(rows)
    cheapest = next(row for row in compact.rows if row.cells).cells[0].text
    criteria = [row for row in rows if row["kind"] == "criterion" and row["share"] == 0.25]
    assert cheapest == label(min(criteria, key=lambda row: row["rise"])["ranking"])


def test_the_released_data_are_read_as_what_they_show():
    shown, silent = reread_sentences(reread_rows())
    assert "DeepSeek-V2-Lite" in shown
    assert "costs 16% of the one ranked highest" in shown
    assert "OLMoE-1B-7B the released sample says nothing either way" in silent
    reverse = [
        row | {"difference": -0.01, "difference_low": -0.02, "difference_high": -0.005, "p_sign_flip": 0.01}
        for row in reread_rows()
    ]
    assert all("ranks lowest costs more than the one ranked highest" in text for text in reread_sentences(reverse))
    uncertain = [row | {"p_sign_flip": 0.2} for row in reread_rows()]
    assert all("nothing either way" in text for text in reread_sentences(uncertain))


# --- tables and figures ---------------------------------------------------------------------------------------------------


def test_the_table_of_savings_has_every_ranking_in_both_effects():
    savings = read_savings(inputs_of("helpful"))
    total = savings_section(savings).blocks[1]
    names = [row.cells[0].text for row in total.rows if row.cells]
    assert sorted(names) == sorted(label(name) for name in (*CRITERIA, *TOKEN_LADDER, "kl", ORACLE))
    for row in total.rows:
        if row.cells:
            ranking = next(name for name in (*CRITERIA, *TOKEN_LADDER, "kl", ORACLE) if label(name) == row.cells[0].text)
            if ranking == "kl":
                continue  # the expected effect has no row that ranks itself
            numbers = [savings.total(ranking, effect)["saving_share"] for effect in ("delta_loss", "kl")]
            for text, value in zip((row.cells[2].text, row.cells[5].text), numbers, strict=True):
                assert float(text.replace("\N{MINUS SIGN}", "-").rstrip("%")) == pytest.approx(100 * value, abs=0.5)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_figure_of_savings_draws_every_ranking_in_both_effects(narrow):
    table = pa.Table.from_pylist(savings_rows(SCENARIOS["helpful"], N_LAYERS))
    numbers = savings_figure(table, MARGIN).numbers
    axes = draw_savings(numbers, narrow).axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names[0] == "REAP"
    every = len((*CRITERIA, *TOKEN_LADDER, "kl", ORACLE))
    assert len(names) == every
    assert [len(container.lines[0].get_xdata()) for container in axes.containers] == [every, every - 1]
    np.testing.assert_allclose(
        sorted(axes.containers[0].lines[0].get_xdata()), sorted(numbers["saving_share"].to_pylist()[:every])
    )


def test_without_expected_effects_the_report_speaks_of_realised_ones_alone(tmp_path):
    rows = [row for row in savings_rows(SCENARIOS["helpful"], N_LAYERS) if row["effect"] == "delta_loss"]
    table = pa.Table.from_pylist(rows)
    drawing = savings_figure(table, MARGIN)
    assert "squares" not in drawing.caption
    assert len(drawing.draw(drawing.numbers, False).axes[0].containers) == 1
    assert "KL" not in (verdict := lead(Savings(rows))).headline + verdict.text
    order = rank_correlation(table)
    assert len(order.draw(order.numbers, False).axes) == 1


def test_a_saving_beyond_the_picture_is_named_in_its_caption():
    rows = savings_rows(SCENARIOS["helpful"], N_LAYERS)
    assert "Beyond the edge" not in savings_figure(pa.Table.from_pylist(rows), MARGIN).caption
    for row in rows:
        if row["ranking"] == "first_order":
            row["saving_share"] = 7.0
    caption = savings_figure(pa.Table.from_pylist(rows), MARGIN).caption
    assert "mark is drawn in their place: first order (told the token)." in caption


def test_captions_do_not_depend_on_where_a_panel_stands():
    table = pa.Table.from_pylist(savings_rows(SCENARIOS["helpful"], N_LAYERS))
    for drawing in (savings_figure(table, MARGIN), pruning(pa.Table.from_pylist(pruning_rows(SCENARIOS["helpful"])))):
        assert not re.search(r"\b(left|right)\b", drawing.caption, re.IGNORECASE)


def test_a_table_of_savings_survives_its_file(tmp_path: Path):
    """Layers are texts, "all" among them, and undefined numbers stay undefined."""
    rows = savings_rows(SCENARIOS["helpful"], N_LAYERS)
    tables.write_csv_atomic(pa.Table.from_pylist(rows), tmp_path / "savings.csv")
    read = read_inputs(tmp_path).rows("savings.csv")
    assert [row["layer"] for row in read] == [row["layer"] for row in rows]
    assert read_inputs(tmp_path).n_layers == 1  # the manifest knows; texts are not counted
    token = [row for row in read if row["family"] == "token"]
    assert all(np.isnan(row["p_family"]) for row in token)
