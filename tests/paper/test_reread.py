"""The released comparisons, pooled: against this project's own re-reading of them, and against a slow count of paragraphs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats

from hooked_moe import statistics as stat
from hooked_moe.cli import compare
from hooked_moe.paper.protocols import RELEASED
from hooked_moe.paper.published import METRICS, PAIRS, published_values, released_comparisons
from hooked_moe.paper.reread import pooled, reread_table
from hooked_moe.report.reread import reread_sentences
from hooked_moe.tables import read_csv

# This project's own re-reading of the released files, made with other code: high, low, difference [interval], p by sign flip over
# paragraphs, p of t over positions.
REREAD = {
    ("DeepSeek-V2-Lite", "activation_norm"): (0.0242, 0.0029, 0.0213, 0.0075, 0.0359, 0.006, 0.005),
    ("DeepSeek-V2-Lite", "activation_std"): (0.0159, 0.0021, 0.0138, 0.0003, 0.0288, 0.070, 0.021),
    ("DeepSeek-V2-Lite", "utilization_rate"): (0.0133, 0.0006, 0.0128, 0.0029, 0.0241, 0.023, 0.013),
    ("DeepSeek-V2-Lite", "mean_routing_weight_when_active"): (0.0061, 0.0039, 0.0021, -0.0061, 0.0103, 0.61, 0.61),
    ("DeepSeek-V2-Lite", "all"): (0.0149, 0.0024, 0.0125, 0.0065, 0.0186, 0.0002, 0.00002),
    ("OLMoE-1B-7B", "activation_norm"): (0.0138, 0.0024, 0.0114, -0.0068, 0.0299, 0.23, 0.17),
    ("OLMoE-1B-7B", "all"): (0.0146, 0.0136, 0.0010, -0.0081, 0.0098, 0.82, 0.85),
}


@pytest.fixture(scope="module")
def rows():
    return {(row["model"], row["metric"]): row for row in reread_table().to_pylist()}


@pytest.mark.parametrize("key", REREAD)
def test_the_pooled_table_is_the_one_found_before(rows, key):
    row, (high, low, difference, first, last, p_sign_flip, p_t) = rows[key], REREAD[key]
    assert [row["high"], row["low"], row["difference"]] == pytest.approx([high, low, difference], abs=0.00005 + 1e-9)
    assert [row["difference_low"], row["difference_high"]] == pytest.approx([first, last], abs=0.0008)  # Monte Carlo
    assert row["p_sign_flip"] == pytest.approx(p_sign_flip, abs=max(0.0002, 0.05 * p_sign_flip))
    assert row["p_t"] == pytest.approx(p_t, abs=max(0.000005, 10 ** np.floor(np.log10(p_t)) / 2))


def test_there_is_a_row_for_every_metric_and_one_for_all(rows):
    models = ("DeepSeek-V2-Lite", "OLMoE-1B-7B")
    assert list(rows) == [(model, metric) for model in models for metric in (*METRICS, "all")]
    assert {rows[model, "all"]["n_paragraphs"] for model in models} == {99}


def test_both_files_say_the_same_columns_and_table_3_follows_from_the_second():
    theirs, ours = released_comparisons("olmoe"), released_comparisons("deepseek-v2-lite")
    assert theirs.schema.equals(ours.schema, check_metadata=True)
    frame = ours.to_pandas()
    sizes = frame.groupby(["metric", "layer"], observed=True).size()
    assert (sizes == PAIRS).all()
    printed = {(v.ranking, v.layer, v.statistic): v.value for v in published_values() if v.table == "Table 3"}
    for (metric, layer), cell in frame.groupby(["metric", "layer"], observed=True):
        high, low = cell["high_delta"].to_numpy(), cell["low_delta"].to_numpy()
        d = stat.cohens_dz(high, low, ddof=RELEASED["deepseek_v2"].ddof).d
        assert d == pytest.approx(printed[metric, layer, "d"], abs=0.0005 + 1e-9)
        # two of the twenty printed p follow from the rounded d, and are off by a little more than rounding
        assert stat.paired_t(high, low).p == pytest.approx(printed[metric, layer, "p_t"], abs=0.0006)
    with pytest.raises(ValueError, match=r"'qwen1.5-moe' were not released; those of olmoe and deepseek-v2-lite were"):
        released_comparisons("qwen1.5-moe")


def test_paragraphs_and_positions_are_the_units():
    random = np.random.default_rng(3)
    text, position = np.repeat([4, 9, 2, 7, 5], 12), np.tile(np.repeat([0, 1, 2, 3], 3), 5)  # three layers each
    high, low = random.normal(0.1, 1, 60) + random.normal(0, 1, 10)[text], random.normal(size=60)
    columns = {"metric": ["m"] * 60, "text": text, "position": position, "high_delta": high, "low_delta": low}
    row = pooled(pa.table(columns))
    mean = (high - low).mean()
    assert (row["n_paragraphs"], row["difference"]) == (5, pytest.approx(mean))
    sums = np.array([(high - low)[text == one].sum() for one in (2, 4, 5, 7, 9)])
    signs = 1 - 2 * ((np.arange(32)[:, None] >> np.arange(5)) & 1)
    exact = np.mean(np.abs(signs @ sums) >= abs(sums.sum()) * (1 - 1e-9))
    assert row["p_sign_flip"] == pytest.approx(exact)
    by_position = (high - low).reshape(20, 3).mean(axis=1)
    assert row["p_t"] == pytest.approx(scipy.stats.ttest_1samp(by_position, 0).pvalue)
    assert row["difference_low"] < mean < row["difference_high"]


def test_the_command_needs_no_run_and_says_what_the_data_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    assert compare.main(["--reread", "--results", str(results)]) == 0
    said = capsys.readouterr().out
    written = read_csv(results / "reread.csv")
    assert written.to_pylist() == reread_table().to_pylist()
    for sentence in reread_sentences(written.to_pylist()):
        assert sentence in said
    assert "For DeepSeek-V2-Lite the expert that a statistic ranks lowest costs 16% of the one ranked highest" in said
    assert "For OLMoE-1B-7B the released sample says nothing either way" in said
    assert compare.main(["--results", str(results)]) == 1
