"""From an effect table to cells, files and page: planted effects found, slow loops matched, bytes repeated, faults named."""

import errno
import hashlib
import html.parser
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

from hooked_moe import figures, statistics, tables
from hooked_moe.analysis import analyse_run
from hooked_moe.cell_text import terminal_table
from hooked_moe.cells import CONTROL, Cell, audit_cells, cells_from_table, cells_table, frozen_positions
from hooked_moe.criteria import CRITERIA, expert_criteria
from hooked_moe.drawing import Drawing
from hooked_moe.effect_grid import EFFECT_VALUES, read_effects
from hooked_moe.report import write_report
from hooked_moe.summaries import LAYER_COLUMNS, domain_summary, layer_summary, scope_summary
from tests.synthetic_effects import PLANTED_LAYER, synthetic_effects, synthetic_run

N_EXPERTS = 16
EFFECTS = synthetic_effects()
CRITERIA_TABLE = expert_criteria(EFFECTS, n_experts=N_EXPERTS)


def key(cell: Cell) -> tuple[str, str, int]:
    return cell.population, cell.ranking, cell.layer


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return audit_cells(EFFECTS, CRITERIA_TABLE)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An analysed and reported run; tests that change files copy it."""
    directory = synthetic_run(tmp_path_factory.mktemp("runs") / "made-up")
    analyse_run(directory, n_experts=N_EXPERTS)
    write_report(directory)
    return directory


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Pages without the seconds that painting takes, for tests of their words."""
    blank = {"svg": b"<svg/>", "png": b""}
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, narrow=False: {kind: blank[kind] for kind in kinds})


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- cells -----------------------------------------------------------------------------------------------------------


def test_the_planted_effect_is_found_and_nothing_else(cells):
    for cell in cells:
        planted = cell.ranking == CONTROL and cell.layer == PLANTED_LAYER
        assert cell.outcome == ("positive" if planted else "not_detected"), cell


def test_a_reversed_effect_is_called_negative():
    effects = synthetic_effects(effect=-0.8)
    found = {key(cell): cell for cell in audit_cells(effects, expert_criteria(effects, n_experts=N_EXPERTS))}
    for population in ("sample", "all"):
        assert found[population, CONTROL, PLANTED_LAYER].outcome == "negative"


def test_cells_come_in_order_with_their_families_counted(cells):
    rankings = [*CRITERIA, CONTROL]
    assert [key(cell) for cell in cells] == [(p, r, layer) for p in ("sample", "all") for r in rankings for layer in (0, 1, 2)]
    for cell in cells:
        assert cell.n_tests == (3 if cell.ranking == CONTROL else 12)
        assert cell.p_t_bonferroni == pytest.approx(min(1, cell.n_tests * cell.p_t))
        assert cell.p_t <= cell.p_t_holm <= cell.p_t_bonferroni


def slow_pairs(effects: pa.Table, criteria: pa.Table, ranking: str, layer: int) -> list[tuple[int, int, float, float]]:
    """(document, position, delta without the highest, delta without the lowest), position by position."""
    values = {(row["layer"], row["expert"]): row for row in criteria.to_pylist()}
    positions: dict[tuple[int, int], list[dict]] = {}
    for row in effects.to_pylist():
        if row["layer"] == layer and not np.isnan(row["delta_loss"]):
            positions.setdefault((row["document"], row["position"]), []).append(row)
    pairs = []
    for (document, position), rows in positions.items():
        scores = [row[CONTROL] if ranking == CONTROL else values[layer, row["expert"]][ranking] for row in rows]
        if any(score is None or np.isnan(score) for score in scores):
            continue
        high, low = rows[scores.index(max(scores))], rows[scores.index(min(scores))]  # index: the first of equals
        pairs.append((document, position, high["delta_loss"], low["delta_loss"]))
    return pairs


def document_means(pairs: list[tuple[int, int, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    by_document: dict[int, list[tuple[float, float]]] = {}
    for document, _, high, low in pairs:
        by_document.setdefault(document, []).append((high, low))
    means = np.array([np.mean(values, axis=0) for values in by_document.values()])
    return means[:, 0], means[:, 1]


@pytest.mark.parametrize("ranking", [*CRITERIA, CONTROL])
def test_cells_equal_the_slow_loop(cells, ranking):
    layer = 1
    found = {key(cell): cell for cell in cells}
    pairs = slow_pairs(EFFECTS, CRITERIA_TABLE, ranking, layer)

    chosen = np.random.RandomState(42).permutation(len(pairs))[:200]
    high, low = (np.array([pairs[i][side] for i in chosen]) for side in (2, 3))
    sample = found["sample", ranking, layer]
    t, p = scipy.stats.ttest_rel(high, low)
    assert (sample.n, sample.unit) == (200, "position")
    assert (sample.mean_high, sample.mean_low) == pytest.approx((high.mean(), low.mean()))
    assert (sample.t, sample.p_t) == pytest.approx((t, p))
    assert sample.p_wilcoxon == pytest.approx(scipy.stats.wilcoxon(high, low).pvalue)
    assert sample.d_z == sample.d_position == pytest.approx((high - low).mean() / (high - low).std(ddof=1))

    tops, bottoms = document_means(pairs)
    every = found["all", ranking, layer]
    t, p = scipy.stats.ttest_rel(tops, bottoms)
    assert (every.n, every.n_positions, every.unit) == (24, 24 * 39, "document")
    assert (every.mean_high, every.mean_difference) == pytest.approx((tops.mean(), (tops - bottoms).mean()))
    assert (every.t, every.p_t) == pytest.approx((t, p))
    difference = np.array([one - other for *_, one, other in pairs])
    assert every.d_position == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert every.minimal_detectable_d == pytest.approx(statistics.minimal_detectable_d(24, 0.05 / every.n_tests))


def test_ties_go_to_the_lower_slot_and_are_counted():
    criteria = CRITERIA_TABLE.to_pandas()
    criteria["utilization_rate"] = (criteria["expert"] >= 8).astype(float)  # two values only: ties nearly everywhere
    table = pa.Table.from_pandas(criteria, preserve_index=False)
    cell = audit_cells(EFFECTS, table, layers=[0], populations=["all"])[0]
    pairs = slow_pairs(EFFECTS, table, "utilization_rate", 0)
    assert cell.n_ties == cell.n_positions == len(pairs)  # four active experts, two values
    tops, bottoms = document_means(pairs)
    assert cell.mean_difference == pytest.approx((tops - bottoms).mean())


def test_a_constant_criterion_is_refused_and_still_counts_in_the_family():
    criteria = CRITERIA_TABLE.to_pandas()
    criteria.loc[criteria["layer"] == 1, "activation_norm"] = 1.0
    cells = audit_cells(EFFECTS, pa.Table.from_pandas(criteria, preserve_index=False))
    refused = [cell for cell in cells if cell.outcome == "refused"]
    assert [key(cell) for cell in refused] == [("sample", "activation_norm", 1), ("all", "activation_norm", 1)]
    assert all("all" in cell.note and "differences equal 0" in cell.note for cell in refused)
    assert all(cell.n_tests == 12 for cell in cells if cell.ranking != CONTROL)


def test_positions_with_an_undefined_criterion_are_left_out_and_counted():
    criteria = CRITERIA_TABLE.to_pandas()
    lost = (criteria["layer"] == 0) & (criteria["expert"] == 3)
    criteria.loc[lost, "activation_std"] = np.nan
    table = pa.Table.from_pandas(criteria, preserve_index=False)
    cells = {key(cell): cell for cell in audit_cells(EFFECTS, table)}
    grid = read_effects(EFFECTS)
    touched = int((grid.expert[grid.valid, 0] == 3).any(axis=1).sum())
    cell = cells["all", "activation_std", 0]
    assert (cell.n_undefined, cell.n_positions) == (touched, 24 * 39 - touched)
    pairs = slow_pairs(EFFECTS, table, "activation_std", 0)
    assert cell.n_positions == len(pairs)
    assert cell.d_position == pytest.approx(statistics.cohens_dz(*np.array(pairs).T[2:]).d)
    assert cell.t == pytest.approx(statistics.paired_t(*document_means(pairs)).t)
    chosen = np.random.RandomState(42).permutation(24 * 39)[:200]
    assert cells["sample", "activation_std", 0].n == 200 - int((grid.expert[grid.valid, 0] == 3).any(axis=1)[chosen].sum())
    assert cells["all", "activation_std", 1].n_undefined == 0


def test_too_few_documents_are_refused_with_the_number_needed():
    effects = synthetic_effects(n_documents=9)
    cells = audit_cells(effects, expert_criteria(effects, n_experts=N_EXPERTS))
    for cell in cells:
        assert (cell.outcome == "refused") == (cell.population == "all")
        if cell.population == "all":
            assert cell.note == f"9 documents; tests over documents at 0.05/{cell.n_tests} need at least 10"
            assert np.isnan(cell.p_t)
            assert np.isnan(cell.d_position)


def test_null_cells_pass_at_no_more_than_their_level():
    """30 tables without any effect, 12 criterion cells each, at a family-wise level of .05."""
    false = {"sample": 0, "all": 0}
    for seed in range(30):
        effects = synthetic_effects(n_documents=16, n_tokens=16, effect=0.0, seed=seed)
        for cell in audit_cells(effects, expert_criteria(effects, n_experts=N_EXPERTS)):
            if cell.ranking != CONTROL:
                false[cell.population] += cell.outcome in ("positive", "negative")
    assert max(false.values()) <= 5  # 1.5 expected at most: the rule wants two tests, and stays below its level


def test_layers_can_be_chosen_and_shrink_the_family():
    cells = audit_cells(EFFECTS, CRITERIA_TABLE, layers=[2, 0], populations=["sample"])
    assert {(cell.layer, cell.n_tests) for cell in cells if cell.ranking == CONTROL} == {(0, 2), (2, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [7]}, r"layer 7 is not in the effect table; it has layers \[0, 1, 2\]"),
        ({"layers": [1, 1]}, "layers must be distinct"),
        ({"populations": ["some"]}, "unknown population 'some'"),
        ({"n_positions": 937}, "cannot sample 937 positions: the effect table has 936"),
        ({"n_positions": 2}, "choose between 3 and"),
    ],
)
def test_audit_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        audit_cells(EFFECTS, CRITERIA_TABLE, **options)


def test_audit_refuses_criteria_that_do_not_fit():
    with pytest.raises(ValueError, match="effects go up to expert 14"):
        audit_cells(EFFECTS, CRITERIA_TABLE.filter(pa.compute.less(CRITERIA_TABLE["expert"], 10)))
    with pytest.raises(ValueError, match="column activation_std missing"):
        audit_cells(EFFECTS, CRITERIA_TABLE.drop_columns(["activation_std"]))
    with pytest.raises(ValueError, match="each expert once"):
        audit_cells(EFFECTS, CRITERIA_TABLE.slice(1))
    with pytest.raises(ValueError, match="no column routing_weight"):
        audit_cells(EFFECTS.drop_columns(["routing_weight"]), CRITERIA_TABLE)


def test_cells_survive_csv(cells, tmp_path):
    tables.write_csv_atomic(cells_table(cells), tmp_path / "cells.csv")
    back = cells_from_table(tables.read_csv(tmp_path / "cells.csv", cells_table([]).schema))
    for one, other in zip(cells, back, strict=True):
        np.testing.assert_equal(asdict(one), asdict(other))


def test_the_frozen_sample_is_a_draw_of_valid_positions_in_corpus_order():
    table = frozen_positions(read_effects(EFFECTS), 200, 42).to_pandas()
    valid = [(document, position) for document in range(24) for position in range(39)]
    expected = [valid[i] for i in np.random.RandomState(42).permutation(len(valid))[:200]]
    assert list(zip(table["document"], table["position"], strict=True)) == expected


# --- summaries -------------------------------------------------------------------------------------------------------


def test_layer_summary_equals_pandas_by_layer_and_slot():
    frame = EFFECTS.to_pandas()
    summary = layer_summary(EFFECTS).to_pandas()
    assert len(summary) == 3 * 5
    for row in summary.itertuples():
        here = frame[frame["layer"] == row.layer]
        here = here if row.slot == -1 else here[here["slot"] == row.slot]
        delta = here["delta_loss"].dropna().astype(float)
        assert (row.n_positions, row.n_removals) == (24 * 40, len(delta))
        expected = (delta.mean(), delta.abs().mean(), delta.abs().quantile(0.95), (delta > 0).mean())
        assert (row.mean_delta, row.mean_abs_delta, row.p95_abs_delta, row.share_positive) == pytest.approx(expected)
        expected = (here["gap_norm"].mean(), here["output_norm"].mean(), here["routing_weight"].mean())
        assert (row.mean_gap_norm, row.mean_output_norm, row.mean_routing_weight) == pytest.approx(expected, rel=1e-5)


def test_domain_summary_equals_pandas(run):
    summary = domain_summary(read_effects(EFFECTS), run).to_pandas()
    frame = EFFECTS.to_pandas().dropna(subset=["delta_loss"])
    domains = pq.read_table(run / "documents.parquet").to_pandas().set_index("document")["domain"]
    frame["domain"] = frame["document"].map(domains)
    for row in summary.itertuples():
        here = frame[frame["domain"] == row.domain]
        assert (row.n_documents, row.n_positions) == (8, 8 * 39)
        tokens = here[(here["layer"] == 0) & (here["slot"] == 0)]
        assert row.baseline_loss == pytest.approx(tokens["baseline_loss"].mean(), rel=1e-6)
        assert (row.mean_delta, row.mean_abs_delta) == pytest.approx(
            (here["delta_loss"].mean(), here["delta_loss"].abs().mean()), rel=1e-5
        )
        wide = here.pivot(index=["document", "position"], columns=["layer", "slot"], values="delta_loss").astype(float)
        contrast = np.mean([wide[layer][0] - wide[layer][3] for layer in (0, 1, 2)], axis=0)
        assert row.top_minus_bottom == pytest.approx(contrast.mean())
        assert row.d_position == pytest.approx(contrast.mean() / contrast.std(ddof=1))


def test_expert_and_slot_numbers_equal_pandas():
    frame = EFFECTS.to_pandas().dropna(subset=["delta_loss"])
    grid = read_effects(EFFECTS)
    experts = figures.expert_numbers(grid, N_EXPERTS).to_pandas().set_index(["layer", "expert"])
    groups = frame.groupby(["layer", "expert"])["delta_loss"]
    assert experts["n_removals"].sum() == len(frame)
    for at, values in groups:
        assert experts.loc[at, "mean_delta"] == pytest.approx(values.astype(float).mean(), rel=1e-5)
    assert np.isnan(experts.loc[(0, 15), "mean_delta"])
    slots = figures.slot_numbers(grid).to_pandas()
    for slot, values in frame.groupby("slot")["delta_loss"]:
        one = slots[slots["slot"] == slot]
        tail = one[one["statistic"] == "abs delta exceeded by share"]
        for level, nats in zip(tail["level"], tail["nats"], strict=True):
            assert (values.abs() > nats).mean() == pytest.approx(level, abs=2 / len(values))
        middle = one[one["statistic"] == "quantile of delta"]
        np.testing.assert_allclose(middle["nats"], np.quantile(values, middle["level"]), rtol=1e-5, atol=1e-8)


def test_scopes_are_compared_row_by_row():
    grid = read_effects(EFFECTS)
    doubled = EFFECTS.set_column(
        EFFECTS.schema.get_field_index("delta_loss"), "delta_loss", pa.array(2 * EFFECTS["delta_loss"].to_numpy())
    )
    table = scope_summary(grid, grid.with_effects_of(read_effects(doubled))).to_pandas()
    np.testing.assert_allclose(table["mean_abs_sequence"], 2 * table["mean_abs_position"], rtol=1e-6)
    np.testing.assert_allclose(table["correlation"], 1)
    np.testing.assert_allclose(table["same_sign"], 1)
    with pytest.raises(ValueError, match="differ in expert"):
        grid.with_effects_of(read_effects(synthetic_effects(seed=5)))


# --- reading the effect table ----------------------------------------------------------------------------------------


def changed(row: int, **values: object) -> pa.Table:
    columns = EFFECTS.to_pydict()
    for name, value in values.items():
        columns[name][row] = value
    return pa.table(columns, schema=EFFECTS.schema)


def test_the_grid_holds_the_rows_and_files_read_as_tables_do(tmp_path):
    tables.write_parquet_atomic(EFFECTS, tmp_path / "effects.parquet", row_group_size=777)
    for source in (EFFECTS, tmp_path / "effects.parquet"):
        grid = read_effects(source)
        assert grid.expert.shape == (960, 3, 4)
        assert grid.layers == (0, 1, 2)
        assert grid.valid.sum() == 936
        row = 4321
        p, layer, slot = np.unravel_index(row, grid.expert.shape)
        one = EFFECTS.slice(row, 1).to_pylist()[0]
        assert (grid.document[p], grid.position[p], grid.layers[layer], slot) == tuple(
            one[name] for name in ("document", "position", "layer", "slot")
        )
        for name in EFFECT_VALUES:
            assert getattr(grid, name)[p, layer, slot] == pytest.approx(one[name], nan_ok=True)


MALFORMED = {
    "rows 0 and 1 swapped": (EFFECTS.take([1, 0, *range(2, 240)]), "row 0 of the effect table"),
    "slot repeated": (changed(13, slot=0), "row 13 of the effect table is document 0, position 1, layer 0, slot 0 where"),
    "layer wrong": (changed(16, layer=0), "row 16 .* layer 1, slot 0 was due"),
    "row missing": (pa.concat_tables([EFFECTS.slice(0, 100), EFFECTS.slice(101, 119)]), "incomplete: 219 rows"),
    "position out of order": (EFFECTS.take([*range(12, 24), *range(12), *range(24, 60)]), "position 0 comes after document 0"),
    "position twice": (EFFECTS.take([*range(24), *range(12, 24), *range(24, 60)]), "each must occur once"),
    "position torn": (changed(14, position=2), "row 14 of the effect table is document 0, position 2"),
    "delta partly missing": (changed(14, delta_loss=float("nan")), "NaN for some removals but not for all at document 0, pos"),
    "delta infinite": (changed(14, delta_loss=float("inf")), "infinite at document 0, position 1"),
    "weights rising": (changed(14, routing_weight=9.0), "slots are not in falling order of routing weight at document 0"),
    "null": (changed(14, delta_loss=None), "column delta_loss of the effect table has 1 nulls"),
    "no column": (EFFECTS.drop_columns(["expert"]), "not an effect table: column expert missing"),
    "empty": (EFFECTS.slice(0, 0), "no rows"),
    "slots from one": (EFFECTS.filter(pa.compute.greater(EFFECTS["slot"], 0)), "counted from 0"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_effect_table_is_refused_by_row(fault):
    table, message = MALFORMED[fault]
    with pytest.raises(ValueError, match=message):
        read_effects(table)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "file.txt"
    tables.write_text_atomic("old", target)

    def interrupted() -> None:
        with tables.atomic_path(target) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_reader_keeps_the_old_file_whole_while_the_new_one_takes_its_name(tmp_path):
    tables.write_text_atomic("old", tmp_path / "file.txt")
    with open(tmp_path / "file.txt") as reader:
        tables.write_text_atomic("new", tmp_path / "file.txt")
        assert reader.read() == "old"
    assert (tmp_path / "file.txt").read_text() == "new"


def test_a_killed_writer_leaves_the_final_name_alone(tmp_path):
    """A child process dies by SIGKILL inside the block: nothing under the final name, one temporary to sweep."""
    child = os.fork()
    if child == 0:
        with tables.atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert not (tmp_path / "file.txt").exists()
    assert tables.remove_temporaries(tmp_path) == 1
    assert os.listdir(tmp_path) == []


def test_a_full_disk_and_missing_directories_are_named(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"the directory .*nowhere does not exist"):
        tables.write_text_atomic("x", tmp_path / "nowhere" / "file.txt")
    (tmp_path / "plain").write_text("")
    with pytest.raises(OSError, match=r"plain is not a directory"):
        tables.write_text_atomic("x", tmp_path / "plain" / "file.txt")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*file.txt: No space left on device; free some space") as caught:
        tables.write_text_atomic("x", tmp_path / "file.txt")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["plain"]


def test_json_is_sorted_and_refuses_nan(tmp_path):
    tables.write_json_atomic({"b": 1, "a": [True, None]}, tmp_path / "x.json")
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["a", "b"]
    with pytest.raises(ValueError, match="JSON"):
        tables.write_json_atomic({"a": float("nan")}, tmp_path / "y.json")
    assert not (tmp_path / "y.json").exists()


def test_every_column_of_every_schema_has_a_meaning_and_a_unit(run):
    cell_columns = cells_table([]).schema
    experts = pq.read_schema(run / "experts.parquet")
    for schema in (tables.EFFECTS, tables.EFFECTS_SEQUENCE, tables.TOKENS, tables.DOCUMENTS, cell_columns, experts):
        for column in schema:
            assert set(column.metadata) == {b"meaning", b"unit"}, column.name
            assert all(column.metadata.values()), column.name
    assert pq.read_schema(run / "effects.parquet").field("gap_norm").metadata[b"meaning"].startswith(b"g ||E")
    assert tables.read_csv(run / "layers.csv").column_names == list(LAYER_COLUMNS)


# --- the page --------------------------------------------------------------------------------------------------------

FIGURES = ("effect_size", "removal_effect", "slots", "experts")
VOID = {"meta", "img", "source", "br"}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and gathers text and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_is_whole_and_needs_no_network(run):
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert len(page.addresses) == 2 * len(FIGURES)  # wide and narrow
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "http" not in (run / "report.html").read_text(encoding="utf-8").split("<body>")[0]
    for name in FIGURES:
        for kind in ("svg", "png", "csv"):
            assert (run / "figures" / f"{name}.{kind}").stat().st_size > 300
    expected = ["made-up-moe", "11,232 removals", "0 of 12", "1 of 3", "made-up <corpus>", "2.1e-06", "routed sum equals block"]
    expected += ["high matters more", "address", "Absent: this run has no effects_sequence.parquet"]
    for text in (*expected, *EFFECTS.column_names, *cells_table([]).column_names):
        assert text in page.text, text


def test_a_rerun_gives_the_same_bytes(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "elsewhere")
    analyse_run(again, n_experts=N_EXPERTS)
    write_report(again)
    assert digests(again) == digests(run)
    assert not list(again.rglob(".*"))


@pytest.mark.usefixtures("unpainted")
def test_the_page_says_what_is_absent(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "effects.parquet", bare)
    analyse_run(bare, n_experts=N_EXPERTS)
    write_report(bare)
    text = Page((bare / "report.html").read_text(encoding="utf-8")).text
    for absent in ("no documents.parquet", "no manifest.json", "records no verification", "records no noise floor"):
        assert f"Absent: this run has {absent}" in text or f"Absent: the manifest {absent}" in text
    assert "unnamed model" in text


def test_failed_checks_and_refused_cells_are_shown_as_such(tmp_path):
    run = synthetic_run(tmp_path / "few", n_documents=8)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["verification"][0] |= {"passed": False, "value": 0.5}
    tables.write_json_atomic(manifest, run / "manifest.json")
    printed = terminal_table(analyse_run(run, n_experts=N_EXPERTS))
    write_report(run)
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    assert "FAILED" in text
    assert "8 documents; tests over documents at 0.05/12 need at least 10" in text
    assert "every cell was refused (8 documents" in text
    assert printed.count("refused, see cells.csv") == 15


@pytest.mark.usefixtures("unpainted")
def test_both_scopes_are_audited_and_compared_where_both_were_measured(run, tmp_path):
    both = shutil.copytree(run, tmp_path / "both")
    sequence = EFFECTS.select(tables.EFFECTS_SEQUENCE.names).cast(tables.EFFECTS_SEQUENCE)
    tables.write_parquet_atomic(sequence, both / "effects_sequence.parquet")
    cells = analyse_run(both, n_experts=N_EXPERTS)
    assert [cell.scope for cell in cells] == ["position"] * 30 + ["sequence"] * 30
    for one, other in zip(cells[:30], cells[30:], strict=True):
        np.testing.assert_equal(asdict(one) | {"scope": ""}, asdict(other) | {"scope": ""})
    write_report(both)
    assert "removed in the whole sequence" in Page((both / "report.html").read_text(encoding="utf-8")).text


def test_missing_steps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"effects\.parquet does not exist; the measurement writes it"):
        analyse_run(tmp_path, n_experts=N_EXPERTS)
    tables.write_parquet_atomic(EFFECTS, tmp_path / "effects.parquet")
    with pytest.raises(FileNotFoundError, match=r"experts\.parquet does not exist; analyse_run writes it"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="expert 14, but the model has 8 experts"):
        analyse_run(tmp_path, n_experts=8)


def test_the_terminal_table_fits_a_hundred_columns(cells):
    lines = terminal_table(cells).splitlines()
    assert max(map(len, lines)) <= 100
    planted = next(
        line for line in lines[lines.index("routing_weight (control: the token's own)") :] if line.startswith("      2")
    )
    assert planted.count("+ |") == 1
    assert planted.endswith("+")
