"""The report: what it says is what the tables say, it renders whatever was measured, and its bytes repeat."""

import html.parser
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import matplotlib.image
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from hooked_moe import tables
from hooked_moe.analysis import analyse_run
from hooked_moe.analysis.criteria import PAPER_CRITERIA
from hooked_moe.report import DrawingHelper, blocks, drawing_process, write_report
from hooked_moe.report.blocks import Paragraph
from hooked_moe.report.derived_files import DERIVED_FILES
from hooked_moe.report.figures.ceiling import pooled_shares
from hooked_moe.report.figures.drawing import DOTS_PER_INCH, WIDE, Drawing
from hooked_moe.report.figures.effect_size import effect_size
from hooked_moe.report.figures.experts import MINIMUM_REMOVALS, draw_experts, experts
from hooked_moe.report.figures.names import PAPER_LINES, SCORE_LINES
from hooked_moe.report.figures.progressive import draw_progressive
from hooked_moe.report.inputs import Inputs, read_inputs
from hooked_moe.report.outcome_words import PROTOCOL_WORDS
from hooked_moe.report.page import render_page, style_sheet
from hooked_moe.report.run_figures import run_drawings
from hooked_moe.report.summary import FINDINGS
from tests.support.synthetic_effects import PARTS, synthetic_run
from tests.support.synthetic_report import synthetic_report

FIGURES = (
    *("verdict", "savings", "pruning", "effect_size", "rank_correlation", "ceiling", "ceiling_kl", "removal_effect", "slots"),
    *("slot_distribution", "experts", "redistribution", "progressive", "scopes"),
)
NOT_BY_ANALYSIS = {"pruning.csv", "pruning_summary.csv", "reread.csv"}
VOID = {"meta", "img", "source", "br"}


class Page(html.parser.HTMLParser):
    """Checks that tags close in order and anchors exist, and gathers text, addresses and the cells of the verdict maps."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []
        assert {link.removeprefix("#") for link in self.links} <= self.anchors

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.addresses += [values[name] for name in ("src", "srcset") if name in values]
        self.links += [values["href"]] if "href" in values else []
        self.anchors |= {values["id"]} if "id" in values else set()
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if "td" in self.open:
            self.rows[-1].append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Derived files of a made-up run; tests that change files copy it."""
    return synthetic_report(tmp_path_factory.mktemp("runs") / "made-up")


@pytest.fixture(scope="module")
def reported(measured) -> Path:
    write_report(measured)
    return measured


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Pages without the seconds that painting takes, for tests of their words."""
    blank = {"svg": b"<svg/>", "png": b""}
    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, narrow=False: {kind: blank[kind] for kind in kinds})


def changed(run: Path, directory: Path, name: str, change) -> Path:
    """A copy of the run with one csv changed: `change` is given the data frame."""
    shutil.copytree(run, directory, ignore=shutil.ignore_patterns("figures", "report.html"))
    frame = change(tables.read_csv(directory / name).to_pandas())
    tables.write_csv_atomic(pa.table({column: frame[column].to_numpy() for column in frame}), directory / name)
    return directory


def findings_of(run: Path) -> str:
    """What was found, as plain text."""
    inputs = read_inputs(run)
    return " ".join(finding.strong + finding.text for find in FINDINGS for finding in find(inputs))


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_no_network(reported):
    page = page_of(reported)
    assert len(page.addresses) == 2 * len(FIGURES)  # wide and narrow
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "http" not in (reported / "report.html").read_text(encoding="utf-8").split("<body>")[0]
    assert page.links
    for name in FIGURES:
        for kind in ("svg", "png", "csv"):
            assert (reported / "figures" / f"{name}.{kind}").stat().st_size > 300
    for text in ("made-up-moe", "made-up <corpus>", "1,766,016 removals", "2.10e-06", "effects are exact", "novel <old>"):
        assert text in page.text
    assert "Not measured" not in page.text


def test_the_first_screen_is_a_sentence_a_picture_and_what_to_do(reported):
    body = (reported / "report.html").read_text(encoding="utf-8").split("<body>")[1]
    opening = body[: body.index("How sure is that?")]
    headline, picture, steps = (opening.index(text) for text in ('class="headline"', 'id="verdict"', "What to do"))
    assert headline < picture < steps
    assert opening.count("<figure") == 1
    assert "<table" not in opening
    assert "<code><span>hooked-moe" in opening[steps:]


def test_figures_come_before_tables_and_what_was_not_measured_comes_last(measured, tmp_path, unpainted):
    run = shutil.copytree(measured, tmp_path / "run")
    (run / "scopes.csv").unlink()
    write_report(run)
    anchors = re.findall(r'<section id="([\w-]+)">', (run / "report.html").read_text(encoding="utf-8"))
    assert anchors[0] == "savings"
    assert anchors[-1] == "absent"
    assert anchors.index("effects") < anchors.index("protocol-position-sample") < anchors.index("verification")
    section = (run / "report.html").read_text(encoding="utf-8").split('<section id="savings">')[1].split("</section>")[0]
    assert section.index("<figure") < section.index("<table")


def test_no_header_is_the_name_of_a_variable_and_the_manifest_is_folded(reported):
    body = (reported / "report.html").read_text(encoding="utf-8")
    headers = re.findall(r"<th>([^<]*)</th>", body.split('<section id="columns">')[0])
    assert headers
    assert [header for header in headers if "_" in header] == []
    manifest = body.split('<section id="manifest">')[1].split("</section>")[0]
    assert manifest.index("<details") < manifest.index("<table")


def test_svg_and_csv_of_a_figure_are_the_same_bytes_each_time(measured):
    table = tables.read_csv(measured / "cells.csv")
    first, second = (effect_size(table, 6).render("svg", "png") for _ in range(2))
    assert first == second
    assert matplotlib.image.imread(io.BytesIO(first["png"])).shape[1] == WIDE * DOTS_PER_INCH  # whatever was written before it


@pytest.mark.usefixtures("unpainted")
def test_a_page_is_the_same_bytes_each_time(measured, tmp_path):
    pages = []
    for name in ("one", "other"):
        copy = shutil.copytree(measured, tmp_path / name, ignore=shutil.ignore_patterns("figures"))
        pages.append(write_report(copy).read_bytes())
        assert not list(copy.rglob(".*"))
    assert pages[0] == pages[1]


def test_two_processes_draw_the_figures_that_one_does(measured, tmp_path, monkeypatch):
    drawings = run_drawings(read_inputs(measured))
    monkeypatch.setattr(drawing_process, "_draw_unclaimed", lambda run, drawings, claims: iter(()))  # all is left to the other
    monkeypatch.setattr(drawing_process, "PROCESSES", 2)
    counted = []
    copy = shutil.copytree(measured, tmp_path / "run", ignore=shutil.ignore_patterns("figures"))
    with DrawingHelper() as helper:
        pictures = drawing_process.draw_figures(copy, drawings, counted.append, helper)
    assert list(pictures) == [drawing.name for drawing in drawings]
    assert counted == [len(drawings)]
    first = drawings[0]
    assert pictures[first.name] == first.save(tmp_path)
    assert (tmp_path / f"{first.name}.png").read_bytes() == (copy / "figures" / f"{first.name}.png").read_bytes()


def test_what_stops_the_other_process_is_said(measured, tmp_path, monkeypatch):
    drawings = run_drawings(read_inputs(measured))
    monkeypatch.setattr(drawing_process, "_draw_unclaimed", lambda run, drawings, claims: iter(()))
    monkeypatch.setattr(drawing_process, "PROCESSES", 2)
    said = r"(?s)the process that draws figures of .* code 1\n.*none of the derived tables"
    with DrawingHelper() as helper, pytest.raises(RuntimeError, match=said):
        drawing_process.draw_figures(tmp_path, drawings, lambda n: None, helper)


def test_a_helper_that_has_begun_leaves_nothing_to_draw(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing_process, "PROCESSES", 2)
    undrawn = shutil.ignore_patterns("figures", "report.html")
    run, plain = (shutil.copytree(measured, tmp_path / name, ignore=undrawn) for name in ("run\nof two lines", "plain"))
    write_report(plain)
    with DrawingHelper() as helper:
        helper.draw(run)
        helper.wait()
        monkeypatch.setattr(Drawing, "save", None)
        write_report(run, helper=helper)
    assert (run / "report.html").read_bytes() == (plain / "report.html").read_bytes()


def test_a_helper_without_anything_to_draw_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(drawing_process, "PROCESSES", 2)
    with DrawingHelper() as helper:
        helper.start()
    assert helper._process is not None
    assert helper._process.returncode is not None
    assert not helper.claims.exists()


def test_another_process_that_has_ended_already_is_told_nothing_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing_process, "PROCESSES", 2)
    with DrawingHelper() as helper:
        helper.start()
        assert helper._process is not None
        helper._process.terminate()
        helper._process.wait()
        helper.draw(tmp_path)
        with pytest.raises(RuntimeError, match="ended with code -15"):
            helper.wait()


def test_the_report_is_read_and_written_without_torch():
    script = "import sys, hooked_moe.report, hooked_moe.report.terminal_savings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("name", DERIVED_FILES)
def test_what_was_not_measured_is_named_with_the_command_that_measures_it(measured, tmp_path, name):
    run = shutil.copytree(measured, tmp_path / "run")
    (run / name).unlink()
    tables.write_checked_json({"not_measured": {name: "this run has no such part"}}, run / "analysis.json")
    write_report(run)
    text = page_of(run).text
    assert f"Not measured: {DERIVED_FILES[name].about} (this run has no such part)" in text
    assert f"Measure it with {DERIVED_FILES[name].command.format(model='made-up-moe')} and the settings of this run" in text


@pytest.mark.usefixtures("unpainted")
def test_a_run_of_one_part_alone_is_reported(measured, tmp_path):
    shutil.copy(measured / "progressive.csv", tmp_path)
    write_report(tmp_path)
    text = page_of(tmp_path).text
    assert "unnamed model" in text
    assert text.count("Not measured") == len(DERIVED_FILES) - 1
    for absent in ("no verification", "no noise floor", "no manifest.json"):
        assert absent in text


def test_without_any_table_or_with_one_of_another_version_it_refuses_by_name(measured, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of the derived tables savings\.csv.* analyse the run first"):
        write_report(tmp_path)
    run = changed(measured, tmp_path / "old", "cells.csv", lambda frame: frame.drop(columns=["outcome", "p_max_t"]))
    with pytest.raises(ValueError, match=r"cells\.csv lacks column p_max_t, outcome; analyse the run again"):
        write_report(run)


def test_numbers_of_csv_files_are_what_was_written(measured, tmp_path):
    """A column of 1.0, 1.0 reads as whole numbers, one of empty texts as nulls."""

    def whole(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(share_above_floor=1, mean_abs_delta=2)

    run = changed(measured, tmp_path / "run", "layers.csv", whole)
    row = read_inputs(run).rows("layers.csv")[0]
    assert [type(row[name]) for name in ("layer", "n_removals", "share_above_floor", "mean_abs_delta")] == [
        int,
        int,
        float,
        float,
    ]
    assert {row["note"] for row in read_inputs(measured).rows("bayes.csv")} == {""}


@pytest.mark.usefixtures("unpainted")
def test_failed_checks_are_shown_as_such(measured, tmp_path):
    run = shutil.copytree(measured, tmp_path / "run")
    manifest = tables.read_checked_json(run / "manifest.json")
    manifest["verification"][0] |= {"passed": False, "value": 0.5}
    manifest["verification"][1] |= {"passed": None}
    tables.write_checked_json(manifest, run / "manifest.json")
    write_report(run)
    rows = page_of(run).rows
    assert ["inactive expert", "FAILED", "0.5000", "0.0000", "64 removals"] in rows
    assert next(row for row in rows if row and row[0] == "effects are exact")[1] == "not run"


@pytest.mark.usefixtures("unpainted")
def test_the_map_of_the_protocol_shows_every_cell(measured):
    write_report(measured)
    frame = tables.read_csv(measured / "cells.csv").to_pandas()
    marks = {outcome: words.mark for outcome, words in PROTOCOL_WORDS.items()}
    names = ("activation norm", "routing entropy", "router-row norm")
    maps = [row for row in page_of(measured).rows if row and row[0] in names and "%" not in "".join(row)]
    order = [("position", "sample"), ("position", "all"), ("sequence", "sample"), ("sequence", "all")]
    shown = [row for row in maps if any(cell.strip() in marks.values() for cell in row[1:])]
    assert len(shown) == 3 * len(order)
    for i, (scope, population) in enumerate(order):
        for row, ranking in zip(shown[3 * i :], ("activation_norm", "routing_entropy", "router_row_norm"), strict=False):
            cells = frame[(frame.scope == scope) & (frame.population == population) & (frame.ranking == ranking)]
            found = [cell.strip() for cell in row[1:] if cell.strip() in marks.values()]
            assert found == [marks[outcome] for outcome in cells.sort_values("layer").outcome]


@pytest.mark.usefixtures("unpainted")
def test_refused_cells_say_why_and_tables_drop_columns_without_numbers(measured, tmp_path):
    def without_documents(frame: pd.DataFrame) -> pd.DataFrame:
        sample = frame.population == "sample"
        frame.loc[sample, "p_max_t"] = np.nan
        return frame

    text = page_of(write_report(changed(measured, tmp_path / "run", "cells.csv", without_documents)).parent).text
    assert "refused: all 72 differences equal 0; without variance there is no test" in text
    assert text.count("p, max T") == 2 * 4  # both scopes of population all, four families
    assert text.count("power at d = 0.2") == 2 * 4  # beside the samples alone, whose tests it is of
    assert "TOST" not in text


@pytest.mark.usefixtures("unpainted")
def test_a_model_of_many_layers_has_marks_alone_in_its_map(tmp_path):
    run = synthetic_report(tmp_path / "deep", n_layers=48, scopes=("position",))
    write_report(run)
    body = (run / "report.html").read_text(encoding="utf-8")
    assert "<small>" not in body
    assert body.count('class="map deep"') == 2 + 2  # savings in both effects, the protocol on both populations


# --- what was found ----------------------------------------------------------------------------------------------------


def test_the_summary_counts_what_the_papers_protocol_detects(measured):
    findings = findings_of(measured)
    frame = tables.read_csv(measured / "cells.csv").to_pandas()
    for population in ("sample", "all"):
        cells = frame[(frame.scope == "position") & (frame.population == population)]
        paper, control = cells[cells.family == "paper"], cells[cells.ranking == "routing_weight"]
        detected = [int(part.outcome.isin(["positive", "negative"]).sum()) for part in (paper, control)]
        assert f"{detected[0]} of 24 cells of the paper's criteria" in findings
        assert f"{detected[1]} of 6 cells of the control" in findings
    sample = frame[(frame.population == "sample") & (frame.family == "paper")].iloc[0]
    assert f"d = 0.2 with probability {sample.power_at_d02:.2f}" in findings
    assert "no evidence of absence" in findings


def test_where_documents_are_too_few_the_sample_alone_is_summed_up(measured, tmp_path):
    def refuse_all(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[frame.population == "all", "outcome"] = "refused"
        return frame

    findings = findings_of(changed(measured, tmp_path / "run", "cells.csv", refuse_all))
    assert "On 200 sampled positions" in findings
    assert "Over all positions" not in findings


def test_the_summary_reads_ceiling_scope_and_progressive_off_their_tables(measured):
    findings = findings_of(measured)
    ceiling = tables.read_csv(measured / "ceiling.csv").to_pandas()
    value = ceiling.groupby("layer").ceiling.first().mean()
    assert f"{100 * value:.1f}% of the variance of realised effects" in findings
    scopes = tables.read_csv(measured / "scopes.csv").to_pandas()
    ratio = scopes.mean_abs_sequence / scopes.mean_abs_position
    assert f"{ratio.min():.2f} to {ratio.max():.2f} times as much" in findings
    progressive = tables.read_csv(measured / "progressive.csv").to_pandas()
    half = progressive[progressive.removed == 4].groupby("order")["mean"].mean()
    assert f"{half['descending']:+.3f} nats highest weight first" in findings
    assert f"{half['ascending']:+.3f} nats lowest weight first" in findings
    assert f"all 8, {progressive[progressive.removed == 8]['mean'].mean():+.3f}" in findings


@pytest.mark.usefixtures("unpainted")
def test_names_from_files_are_escaped(measured, tmp_path):
    run = shutil.copytree(measured, tmp_path / "run")
    manifest = tables.read_checked_json(run / "manifest.json")
    manifest["model"]["name"] = "<script>moe</script>"
    tables.write_checked_json(manifest, run / "manifest.json")
    body = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in body
    assert "made-up <corpus>" not in body
    text = page_of(run).text
    assert "Removing one expert at one token: <script>moe</script>" in text
    assert "made-up <corpus>" in text


def test_every_text_of_a_block_stays_text():
    """Each kind of block, with markup in each of its texts: the page shows it, and the browser sees no tag."""
    markup = "<b>bold</b>"
    cells = blocks.table_row(
        markup, blocks.TableCell(markup, css="valid", small=markup, title=markup), blocks.TableCell(markup, badge=True)
    )
    every = (
        Paragraph(markup, markup),
        blocks.Lead(markup, markup),
        blocks.Heading(markup),
        blocks.Missing(markup, markup, markup),
        blocks.Summary(markup, (Paragraph(markup, markup),)),
        blocks.Key((blocks.KeyEntry(markup, "valid", markup),)),
        blocks.Table((markup,), (cells, blocks.TableRow(heading=markup))),
        picture := blocks.Figure(1, "name", markup, markup, "data:wide", "data:narrow"),
        blocks.Opening(markup, (picture,), (blocks.Action(markup, markup),), markup),
        blocks.Links(markup, (blocks.Link(markup, "#anchor"),)),
    )
    assert {block.kind for block in every} | {"folded"} == {kind.kind for kind in get_args(blocks.Block)}
    page = blocks.Page(markup, every, (blocks.Section("anchor", markup, (blocks.Folded(markup, every, on_paper=True),)),))
    rendered = render_page(page)
    assert "<b>bold" not in rendered
    titles, texts_of_blocks = 2 + 2 + 1, 29  # titles of the page and the section, twice each, and of the fold
    assert Page(rendered).text.count(markup) == titles + 2 * texts_of_blocks


# --- figures -------------------------------------------------------------------------------------------------------------


def test_figures_show_the_numbers_of_their_tables(reported):
    cells = tables.read_csv(reported / "cells.csv").to_pandas()
    drawn = tables.read_csv(reported / "figures" / "effect_size.csv").to_pandas()
    expected = cells[(cells.scope == "position") & cells.ranking.isin([*PAPER_CRITERIA, "routing_weight"])]
    np.testing.assert_array_equal(drawn.d_position, expected.d_position)
    np.testing.assert_allclose(drawn.relative_depth, expected.layer / 5)
    correlated = tables.read_csv(reported / "figures" / "rank_correlation.csv").to_pandas()
    savings = tables.read_csv(reported / "savings.csv").to_pandas()
    np.testing.assert_array_equal(correlated.spearman, savings[savings.layer != "all"].spearman)
    saved = tables.read_csv(reported / "figures" / "savings.csv").to_pandas()
    np.testing.assert_array_equal(saved.saving_share_low, savings[savings.layer == "all"].saving_share_low)
    for name in ("progressive", "scopes", "slots", "pruning"):
        assert tables.read_csv(reported / "figures" / f"{name}.csv").equals(tables.read_csv(reported / f"{name}.csv"))


def test_relative_depth_counts_the_layers_of_the_model_not_those_audited():
    cells = {
        "scope": "position",
        "population": "all",
        "family": "paper",
        "ranking": "activation_norm",
        "n": 9,
        "outcome": "positive",
    }
    numbers = dict.fromkeys(("d_position", "d_position_low", "d_position_high", "minimal_detectable_d"), 0.1)
    table = pa.Table.from_pylist([{**cells, **numbers, "layer": layer} for layer in (1, 7, 13)])
    assert effect_size(table, 27).numbers.column("relative_depth").to_pylist() == [1 / 26, 7 / 26, 13 / 26]
    assert Inputs({"cells.csv": table}, {"model": {"config": {"n_layers": 27}}}, {}).n_layers == 27
    assert Inputs({"cells.csv": table}, {}, {}).n_layers == 14


def test_shares_of_the_ceiling_pool_layers_by_their_ceiling(measured):
    table = tables.read_csv(measured / "ceiling.csv")
    sums = table.to_pandas().groupby("criterion")[["share_of_variance", "ceiling"]].sum()
    for criterion, (_, share) in pooled_shares(table).items():
        assert share == pytest.approx(sums.share_of_variance[criterion] / sums.ceiling[criterion])
    nothing = table.set_column(table.schema.get_field_index("ceiling"), "ceiling", pa.array(np.zeros(table.num_rows)))
    assert all(np.isnan(share) for _, share in pooled_shares(nothing).values())


def test_the_heat_map_leaves_out_experts_that_were_hardly_removed(measured):
    table = pa.table(
        {"layer": [3, 3, 7, 7], "expert": [0, 1, 0, 1], "n_removals": [29, 30, 99, 0], "mean_delta": [9.0, 1.0, -1.0, np.nan]}
    )
    image = draw_experts(experts(table).numbers, narrow=False).axes[0].images[0].get_array()
    assert MINIMUM_REMOVALS == 30
    np.testing.assert_array_equal(np.ma.filled(image, np.nan), [[np.nan, 1.0], [-1.0, np.nan]])


def test_progressive_curves_of_a_deep_model_fit_a_page_and_a_phone(tmp_path):
    table = tables.read_csv(synthetic_report(tmp_path, n_layers=48) / "progressive.csv")
    for narrow, columns in ((False, 6), (True, 3)):
        titles = [axes.get_title() for axes in draw_progressive(table, narrow).axes[:columns]]
        assert (titles[0], titles[-1]) == ("layer 0", "layer 47")


def test_lines_differ_without_colour_and_text_stands_out_from_its_ground():
    for lines in (SCORE_LINES.values(), PAPER_LINES):
        assert len({marker for _, marker in lines}) == len(lines)
    pairs = re.findall(r"\.(?:good|bad|neutral|open|absent) \{ background: (#\w+); color: (#\w+); \}", style_sheet())
    assert len(pairs) == 5
    assert all(contrast(*pair) >= 4.5 for pair in pairs)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2, section 1.4.3)."""
    luminance = []
    for colour in (one, other):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        channels = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        luminance.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(luminance) + 0.05) / (min(luminance) + 0.05)


# --- with the analysis ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unpainted")
def test_the_made_up_files_have_the_columns_of_an_analysed_run_which_is_reported_whole(measured, tmp_path):
    run = synthetic_run(tmp_path / "run", parts=PARTS)
    analyse_run(run, n_experts=16)
    real, made_up = read_inputs(run), read_inputs(measured)
    assert set(made_up.tables) == set(DERIVED_FILES)
    assert set(DERIVED_FILES) - set(real.tables) <= NOT_BY_ANALYSIS
    for name, table in real.tables.items():
        assert set(table.column_names) == set(made_up.tables[name].column_names), name
    write_report(run)
    text = page_of(run).text
    assert text.count("Not measured") == len(set(DERIVED_FILES) - set(real.tables))
    assert not re.search(r"\bnan\b", text)


@pytest.mark.usefixtures("unpainted")
def test_a_corpus_too_small_for_inference_over_documents_is_reported_as_such(tmp_path):
    run = synthetic_run(tmp_path / "run", n_documents=1, n_tokens=210)
    analyse_run(run, n_experts=16)
    write_report(run)
    text = page_of(run).text
    assert "On 200 sampled positions" in text
    assert "refused: 1 documents; tests over documents" in text
