"""What the explorer pages hold is what the tables say, rounded as stated, and no text of a corpus is more than text."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from hooked_moe import tables
from hooked_moe.analysis import analyse_run
from hooked_moe.report import explorer, write_report
from hooked_moe.report.explorer import documents, explorer_fault, write_explorer
from hooked_moe.report.explorer.documents import EFFECTS, STEP
from hooked_moe.report.explorer.packing import LogScale, unpacked
from tests.support.synthetic_effects import HOSTILE_TEXTS, synthetic_run

DOCUMENTS, TOKENS, LAYERS, EXPERTS, K = 10, 30, (1, 2, 5), 9, 3
"""The first block is dense, and some are not measured."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run with its pages; tests that change files copy it."""
    directory = tmp_path_factory.mktemp("runs") / "made-up"
    synthetic_run(directory, EXPERTS, n_documents=DOCUMENTS, n_tokens=TOKENS, layers=LAYERS, k=K, vocabulary=48)
    analyse_run(directory, n_experts=EXPERTS, n_positions=20)
    write_explorer(directory)
    return directory


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def scripts(page: Path) -> dict[str, str]:
    """The contents of the scripts of a page that have an id."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r'<script type="[a-z/]+" id="([^"]+)">(.*?)</script>', text, flags=re.DOTALL))


def facts_of(page: Path) -> dict[str, Any]:
    return json.loads(scripts(page)["facts"])


def read_document(page: Path, number: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """The tokens of a document on the page, and [token, layer, slot] of all that it says, as its script reads them."""
    facts, content = facts_of(page), unpacked(scripts(page)[f"d{number}"])
    (length,) = struct.unpack("<I", content[:4])
    tokens = json.loads(content[4 : 4 + length])
    codes = np.frombuffer(content[4 + length :], np.int8)
    shape = (6, len(facts["layers"]), facts["slots"], len(tokens))
    low, high, weight, delta, kl, difference = codes[len(tokens) :].reshape(shape).transpose(0, 3, 1, 2)
    effect, weights = (LogScale(**facts["scales"][name]) for name in ("effect", "weight"))
    values = {
        "expert": low.view(np.uint8).astype(int) + 256 * high.view(np.uint8).astype(int),
        "routing_weight": weights.values(weight),
        "delta_loss": effect.values(delta),
        "kl": effect.values(kl),
        "first_order": effect.values(delta + difference),
        "baseline_loss": effect.values(codes[: len(tokens)]),
    }
    return tokens, values


def cards_of(run: Path) -> dict[str, Any]:
    return json.loads(unpacked(scripts(run / "experts.html")["cards-data"]))


def frame(run: Path, name: str) -> Any:
    return tables.read_parquet(run / name).to_pandas()


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_scale_reads_back_within_half_a_step() -> None:
    random = np.random.default_rng(0)
    scale = LogScale.up_to(20.0, 15_000.0, 1.15)
    values = random.choice([-1, 1], 5000) * 20.0 * 10 ** random.uniform(-7, 0, 5000)
    read = scale.values(scale.codes(values))
    small = np.abs(values) < scale.floor / math.sqrt(1.15)
    assert 0 < small.sum() < len(values)
    assert not read[small].any()
    ratio = read[~small] / values[~small]
    assert ratio.min() >= 1 / math.sqrt(1.15) - 1e-9
    assert ratio.max() <= math.sqrt(1.15) + 1e-9
    assert scale.values(scale.codes(np.array([0.0])))[0] == 0
    assert np.isnan(scale.values(scale.codes(np.array([np.nan])))[0])


def test_a_scale_that_needs_more_codes_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="do not reach"):
        LogScale.up_to(1.0, 1e6, 1.05)


def test_every_number_of_the_documents_page_is_that_of_the_table(run: Path) -> None:
    effects = frame(run, "effects.parquet")
    facts = facts_of(run / "documents.html")
    assert facts["layers"] == list(LAYERS)
    assert [entry["number"] for entry in facts["documents"]] == list(range(DOCUMENTS))
    floor = facts["scales"]["effect"]["floor"]
    for number in range(DOCUMENTS):
        own = effects[effects["document"] == number]
        _, read = read_document(run / "documents.html", number)
        shape = (TOKENS, len(LAYERS), K)
        np.testing.assert_array_equal(read["expert"], own["expert"].to_numpy().reshape(shape))
        for name in ("routing_weight", *EFFECTS):
            exact = own[name].to_numpy().reshape(shape).astype(float)
            assert np.array_equal(np.isnan(read[name]), np.isnan(exact))
            measured = ~np.isnan(exact)
            off = np.abs(read[name][measured] - exact[measured])
            assert (off <= np.maximum((math.sqrt(STEP) - 1 + 1e-6) * np.abs(exact[measured]), floor)).all()
        loss = own["baseline_loss"].to_numpy().reshape(shape)[:, 0, 0]
        np.testing.assert_allclose(read["baseline_loss"], loss, rtol=math.sqrt(STEP) - 1 + 1e-6)


def test_the_largest_removals_of_an_expert_are_on_its_card_with_their_exact_values(run: Path) -> None:
    effects = frame(run, "effects.parquet").dropna(subset=["delta_loss"])
    content = cards_of(run)
    assert len(content["cards"]) == len(LAYERS) * EXPERTS
    for card in content["cards"]:
        own = effects[(effects["layer"] == card["layer"]) & (effects["expert"] == card["expert"])]
        assert card["removals"] == len(own)
        if not len(own):
            assert card["effects"] == {}
            assert card["mean"][0] is None
            continue
        assert card["mean"][0] == pytest.approx(own["delta_loss"].mean(), rel=1e-3)
        assert card["kl"] == pytest.approx(own["kl"].mean(), rel=1e-3)
        for name in ("delta_loss", "kl"):
            largest = own.reindex(own[name].abs().sort_values(ascending=False).index)[:12]
            shown = [(*content["contexts"][number][:2], value) for number, value in card["effects"][name]]
            assert [at[:2] for at in shown] == list(zip(largest["document"], largest["position"], strict=True))
            np.testing.assert_allclose([value for *_, value in shown], largest[name], rtol=1e-3)


def test_a_focus_is_the_token_that_most_exceeds_its_share_of_removals(run: Path) -> None:
    effects = frame(run, "effects.parquet").dropna(subset=["delta_loss"])
    effects = effects.merge(frame(run, "tokens.parquet")[["document", "position", "token"]])
    shares, cards = frame(run, "token_shares.parquet"), cards_of(run)["cards"]
    for (layer, expert), rows in list(shares.groupby(["layer", "expert"]))[::4]:
        own = effects[(effects["layer"] == layer) & (effects["expert"] == expert)]
        for row in rows.itertuples():
            at = own[own["token"] == row.token]
            assert (row.n_removals, row.n_documents) == (len(at), at["document"].nunique())
            assert row.share_of_effect == pytest.approx(at["kl"].sum() / own["kl"].sum())
            assert row.share_of_removals == pytest.approx(len(at) / len(own))
        rows = rows[(rows["n_removals"] >= 5) & (rows["n_documents"] >= 3)]
        excess = (rows["share_of_effect"] - rows["share_of_removals"]).max()
        card = next(card for card in cards if (card["layer"], card["expert"]) == (layer, expert))
        assert (card["focus"] is None) == (not len(rows))
        assert card["focus"] is None or card["focus"]["excess"] == pytest.approx(excess, rel=1e-3)
    assert any(card["focus"] for card in cards)


def test_shares_by_kind_of_text_are_those_of_the_tables(run: Path) -> None:
    effects = frame(run, "effects.parquet").dropna(subset=["delta_loss"]).merge(frame(run, "documents.parquet"))
    kinds = facts_of(run / "experts.html")["kinds"]
    tokens = frame(run, "documents.parquet").groupby("domain")["n_tokens"].sum()
    routing = frame(run, "routing.parquet").merge(frame(run, "documents.parquet")[["document", "domain"]])
    card = next(card for card in cards_of(run)["cards"] if card["removals"])
    own = effects[(effects["layer"] == card["layer"]) & (effects["expert"] == card["expert"])]
    served = routing[(routing["layer"] == card["layer"]) & (routing["expert"] == card["expert"])].groupby("domain")
    for index, kind in enumerate(kinds):
        part = own[own["domain"] == kind]
        assert card["kinds"]["mean"][index] == pytest.approx(part["delta_loss"].mean(), rel=1e-3)
        assert card["kinds"]["effect"][index] == pytest.approx(part["kl"].sum() / own["kl"].sum(), rel=1e-3)
        assert card["kinds"]["routed"][index] == pytest.approx(served["n_tokens"].sum()[kind] / tokens[kind], rel=1e-3)


def test_ranks_are_among_the_experts_of_the_layer(run: Path) -> None:
    experts = frame(run, "experts.parquet")
    labels = facts_of(run / "experts.html")["criteria"]
    place = labels.index("utilization rate")
    for card in cards_of(run)["cards"]:
        own = experts[experts["layer"] == card["layer"]].set_index("expert")["utilization_rate"]
        assert card["ranks"][place] == 1 + (own > own[card["expert"]]).sum()
    aimer = labels.index("AIMER")  # which prunes the highest first
    card = cards_of(run)["cards"][0]
    own = experts[experts["layer"] == card["layer"]].set_index("expert")["aimer"]
    assert card["ranks"][aimer] == 1 + (own < own[card["expert"]]).sum()


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_are_those_of_the_documents_and_leave_no_markup(run: Path) -> None:
    texts = frame(run, "token_texts.parquet")
    for number in range(DOCUMENTS):
        tokens, _ = read_document(run / "documents.html", number)
        assert tokens == texts[texts["document"] == number]["text"].tolist()
    assert set(HOSTILE_TEXTS) & set(texts["text"])
    for name in ("documents.html", "experts.html"):
        opened: list[str] = []

        class Reader(html.parser.HTMLParser):
            def handle_starttag(self, tag: str, attrs: Any, opened: list[str] = opened) -> None:
                opened.append(tag)
                assert not {"src", "srcset", "onload", "onerror"} & {key for key, _ in attrs}

        Reader().feed((run / name).read_text(encoding="utf-8"))
        assert opened.count("script") == (DOCUMENTS if name == "documents.html" else 1) + 2
        assert "b" not in opened[: opened.index("h1")]
        assert "alert(1)" not in re.sub(r"<script.*?</script>", "", (run / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_a_title_with_markup_stays_text(copy: Path) -> None:
    documents = tables.read_parquet(copy / "documents.parquet")
    titles = pa.array(["</script><script>alert(2)</script>"] * documents.num_rows)
    changed = documents.set_column(documents.schema.get_field_index("title"), documents.schema.field("title"), titles)
    tables.write_parquet_atomic(changed, copy / "documents.parquet")
    write_explorer(copy)
    for name in ("documents.html", "experts.html"):
        assert "<script>alert" not in (copy / name).read_text(encoding="utf-8")
        assert "</script><script>alert(2)</script>" in json.dumps(facts_of(copy / name))


# --- other runs ------------------------------------------------------------------------------------------------------


def test_where_a_page_has_no_room_it_says_which_sample_it_shows(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 8_000)
    write_explorer(copy)
    shown = [entry["number"] for entry in facts_of(copy / "documents.html")["documents"]]
    assert 1 <= len(shown) < DOCUMENTS
    assert shown == sorted(shown)
    page = " ".join((copy / "documents.html").read_text(encoding="utf-8").split())
    assert f"Shown are {len(shown)} of {DOCUMENTS} documents, drawn at random (seed 0)" in page
    assert facts_of(copy / "experts.html")["shown"] == shown
    first = (copy / "documents.html").read_bytes()
    write_explorer(copy)
    assert (copy / "documents.html").read_bytes() == first


def test_long_documents_are_cut_and_the_page_says_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_TOKENS", 12)
    write_explorer(copy)
    tokens, values = read_document(copy / "documents.html", 3)
    assert len(tokens) == 12
    assert values["kl"].shape[0] == 12
    page = " ".join((copy / "documents.html").read_text(encoding="utf-8").split())
    assert f"Of {DOCUMENTS} longer documents, the first 12 tokens are shown." in page


def test_a_run_without_first_order_effects_says_so(copy: Path) -> None:
    effects = tables.read_parquet(copy / "effects.parquet")
    place, field = effects.schema.get_field_index("first_order"), effects.schema.field("first_order")
    void = effects.set_column(place, field, pa.array(np.full(effects.num_rows, np.nan, np.float32)))
    tables.write_parquet_atomic(void, copy / "effects.parquet")
    write_explorer(copy)
    assert "First-order effects were not measured" in (copy / "documents.html").read_text(encoding="utf-8")
    assert facts_of(copy / "documents.html")["tops"].keys() == {"delta_loss", "kl"}
    assert np.isnan(read_document(copy / "documents.html", 0)[1]["first_order"]).all()


def test_a_sample_of_positions_leaves_the_others_unmeasured(copy: Path) -> None:
    effects = tables.read_parquet(copy / "effects.parquet")
    measured = pc.less(effects["position"], 5).to_numpy()
    for name in EFFECTS:
        values = np.where(measured, effects[name].to_numpy(), np.nan).astype(np.float32)
        effects = effects.set_column(effects.schema.get_field_index(name), effects.schema.field(name), pa.array(values))
    tables.write_parquet_atomic(effects, copy / "effects.parquet", row_group_size=500)
    analyse_run(copy, n_experts=EXPERTS, n_positions=10)
    write_explorer(copy)
    _, values = read_document(copy / "documents.html", 4)
    assert np.isnan(values["delta_loss"][5:]).all()
    assert not np.isnan(values["delta_loss"][:5]).any()
    assert all(context[1] < 5 for context in cards_of(copy)["contexts"])


def test_a_model_of_more_than_256_experts_keeps_their_numbers(tmp_path: Path) -> None:
    directory = synthetic_run(tmp_path / "run", 300, n_documents=4, n_tokens=20, layers=(0,), k=6)
    analyse_run(directory, n_experts=300, n_positions=10)
    write_explorer(directory)
    exact = frame(directory, "effects.parquet")["expert"].to_numpy().reshape(4, 20, 1, 6)
    assert exact.max() > 255
    for number in range(4):
        np.testing.assert_array_equal(read_document(directory / "documents.html", number)[1]["expert"], exact[number])


@pytest.mark.parametrize("name", ["token_texts.parquet", "documents.parquet", "experts.parquet", "expert_tokens.parquet"])
def test_a_missing_table_is_named_with_what_writes_it(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(name)} does not exist; the (measurement|analysis)"):
        write_explorer(copy)


def test_texts_of_another_run_are_refused(copy: Path) -> None:
    texts = tables.read_parquet(copy / "token_texts.parquet")
    tables.write_parquet_atomic(texts.slice(0, texts.num_rows - 1), copy / "token_texts.parquet")
    with pytest.raises(ValueError, match="of other runs"):
        write_explorer(copy)


def test_pages_are_made_again_when_a_table_changes_and_only_then(copy: Path) -> None:
    assert explorer_fault(copy) is None
    assert tables.Ledger(copy).outputs("explorer") == sorted(explorer.EXPLORER_PAGES)
    (copy / "documents.html").write_text("damaged")
    assert "documents.html" in (explorer_fault(copy) or "")
    write_explorer(copy)
    (copy / "token_texts.parquet").write_bytes((copy / "token_texts.parquet").read_bytes() + b" ")
    assert "token_texts.parquet" in (explorer_fault(copy) or "")


def test_the_report_links_to_the_pages_that_it_has(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hooked_moe.report.figures.drawing import Drawing

    monkeypatch.setattr(Drawing, "render", lambda self, *kinds, narrow=False: dict.fromkeys(kinds, b"<svg/>"))
    write_report(copy)
    text = (copy / "report.html").read_text(encoding="utf-8")
    names = {f"L{card['layer']}E{card['expert']}" for card in cards_of(copy)["cards"]}
    linked = re.findall(r'href="experts\.html#([^"]+)"', text)
    assert linked
    assert set(linked) <= names
    for page in explorer.EXPLORER_PAGES:
        assert f'href="{page}"' in text
        (copy / page).unlink()
    write_report(copy)
    assert "experts.html" not in (copy / "report.html").read_text(encoding="utf-8")
