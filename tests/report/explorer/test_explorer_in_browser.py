"""The explorer pages as a reader uses them: in Chromium, by pointer and keyboard, wide and narrow."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hooked_moe import tables
from hooked_moe.analysis import analyse_run
from hooked_moe.report.explorer import write_explorer
from tests.support.synthetic_effects import HOSTILE_TEXTS, synthetic_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
EXPERTS = 9
WIDTHS = pytest.mark.parametrize("width", [1280, 390])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "made-up"
    synthetic_run(directory, EXPERTS, n_documents=8, n_tokens=60, layers=(1, 2, 5), k=3, vocabulary=48)
    analyse_run(directory, n_experts=EXPERTS, n_positions=20)
    write_explorer(directory)
    return directory


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, run: Path) -> Iterator[Any]:
    """Opens a page of the run; afterwards nothing may have been complained of, nor asked of any network."""
    complaints: list[str] = []
    contexts = []

    def open_page(address: str, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        context.set_default_timeout(120_000)  # ms; for machines that have other things to do
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(f"{run.as_uri()}/{address}")
        page.wait_for_selector("#controls:not([hidden])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def fits(page: Any) -> bool:
    """Whether nothing sticks out to the side."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def panel(page: Any) -> str:
    return " ".join(page.inner_text("#panel").split())


# --- documents -------------------------------------------------------------------------------------------------------


@WIDTHS
def test_a_token_shows_its_experts_when_it_is_pointed_at_or_tapped(visit: Any, run: Path, width: int) -> None:
    page = visit("documents.html#d2", width, has_touch=width == 390)
    assert fits(page)
    if width == 390:
        page.tap("#t7")
    else:
        page.hover("#t7")
    assert "at 7" in panel(page)
    assert fits(page)
    effects = tables.read_parquet(run / "effects.parquet").to_pandas()
    own = effects[(effects["document"] == 2) & (effects["position"] == 7)]
    rows = page.eval_on_selector_all("#panel tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
    assert {row[0] for row in rows} == {f"L{row.layer}E{row.expert}" for row in own.itertuples()}
    by_name = {f"L{row.layer}E{row.expert}": row for row in own.itertuples()}
    for name, weight, realised, expected, first in rows:
        exact = by_name[name]
        pairs = [(weight, exact.routing_weight), (realised, exact.delta_loss), (expected, exact.kl), (first, exact.first_order)]
        for text, value in pairs:
            assert float(text.replace("\u2212", "-")) == pytest.approx(value, rel=0.11, abs=0.001)
    sizes = [abs(float(row[2].replace("\u2212", "-"))) for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_arrow_keys_move_from_token_to_token(visit: Any) -> None:
    page = visit("documents.html")
    page.focus("#text")
    assert "at 0" in panel(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "at 2" in panel(page)
    page.keyboard.press("ArrowLeft")
    assert "at 1" in panel(page)
    page.keyboard.press("ArrowDown")
    below = int(re.search(r"at (\d+)", panel(page))[1])  # type: ignore[index]
    assert below > 2
    assert page.evaluate(f"t{below}.getBoundingClientRect().top > t1.getBoundingClientRect().top")
    page.keyboard.press("End")
    assert "at 59" in panel(page)
    assert "next: \u2013" in panel(page)
    page.keyboard.press("ArrowRight")
    assert "at 59" in panel(page)
    assert page.get_attribute("#text", "aria-activedescendant") == "t59"


def test_colours_follow_document_effect_layer_and_expert(visit: Any, run: Path) -> None:
    page = visit("documents.html")
    effects = tables.read_parquet(run / "effects.parquet").to_pandas()
    page.select_option("#document", "3")
    page.wait_for_url(re.compile(r"#d3"))
    page.select_option("#layer", "2")

    def shown() -> list[float]:
        return [float(text) for text in page.eval_on_selector_all("#text .t", "tokens => tokens.map(t => t.dataset.value)")]

    own = effects[(effects["document"] == 3) & (effects["layer"] == 2)]
    for effect in ("delta_loss", "kl", "first_order"):
        page.select_option("#effect", effect)
        page.select_option("#expert", "sum")
        exact = own.groupby("position")[effect].sum(min_count=3)
        assert shown()[:-1] == pytest.approx(exact.tolist()[:-1], rel=0.2, abs=0.01)
    page.select_option("#expert", "4")
    served = set(own[own["expert"] == 4]["position"]) - {59}
    assert {position for position, value in enumerate(shown()) if value == value} == served
    assert page.eval_on_selector_all("#text .t.none", "tokens => tokens.length") == 60 - len(served)
    assert "L2E4" in page.url
    assert "nats" in page.inner_text("#legend")


@WIDTHS
def test_links_arrive_at_a_token_and_its_expert(visit: Any, width: int) -> None:
    page = visit("documents.html#d5p40L5E3", width)
    assert (page.input_value("#document"), page.input_value("#layer"), page.input_value("#expert")) == ("5", "5", "3")
    assert "at 40" in panel(page)
    box, sheet = page.locator("#t40").bounding_box(), page.locator("#panel").bounding_box()
    assert 0 <= box["y"] < 844
    assert width == 1280 or box["y"] + box["height"] <= sheet["y"]  # the panel does not cover it
    page.click("#panel tbody a >> nth=0")
    page.wait_for_selector(".card.linked")
    assert re.search(r"experts\.html#L5E\d+$", page.url)


def test_an_address_of_nothing_opens_the_first_document(visit: Any) -> None:
    page = visit("documents.html#d99p3L7E1")
    assert page.input_value("#document") == "0"


def test_texts_are_shown_as_texts(visit: Any, run: Path) -> None:
    texts = tables.read_parquet(run / "token_texts.parquet").to_pandas()
    hostile = {row.text: row for row in texts.itertuples() if row.text in HOSTILE_TEXTS}
    page = visit("documents.html")
    for text, row in hostile.items():
        page.evaluate(f"location.hash = '#d{row.document}p{row.position}'")
        page.wait_for_selector(f"#text .t:nth-of-type({row.position + 1})[aria-selected=true]")
        assert page.evaluate("[state.document, state.position]") == [row.document, row.position]
        named = {sign: f"\u2039U+{ord(sign):04X}\u203a" for sign in "\u202e\u2028\x00"} | {"\n": "↵\n", "\t": "⇥"}
        assert page.text_content("[aria-selected=true]") == "".join(named.get(sign, sign) for sign in text)
    assert "\u202egnp.exe" in hostile
    assert "</script><script>alert(1)</script>" in hostile


# --- experts ---------------------------------------------------------------------------------------------------------


@WIDTHS
def test_cards_are_sorted_filtered_and_found(visit: Any, width: int) -> None:
    page = visit("experts.html", width)
    assert fits(page)

    def names() -> list[str]:
        return page.eval_on_selector_all(".card", "cards => cards.map(card => card.id)")

    assert len(names()) == 3 * EXPERTS
    assert page.inner_text("#count").startswith("27 experts, by focus on a token")
    page.select_option("#sort", "layer and number")
    assert names() == [f"L{layer}E{expert}" for layer in (1, 2, 5) for expert in range(EXPERTS)]
    page.select_option("#layer", "2")
    assert names() == [f"L2E{expert}" for expert in range(EXPERTS)]
    page.select_option("#sort", "rank by utilization rate")
    assert names()[-1] == "L2E8"  # which no token selects
    page.select_option("#layer", "-1")
    page.fill("#search", "l5e3")
    assert names() == ["L5E3"]
    token = page.inner_text(".card .contexts .token >> nth=0")
    page.fill("#search", token.strip())
    assert "L5E3" in names()
    page.fill("#search", "no such token")
    assert names() == []
    assert page.inner_text("#count").startswith("0 of 27 experts")


@WIDTHS
def test_a_link_opens_a_card_and_its_tokens_lead_into_the_text(visit: Any, width: int) -> None:
    page = visit("experts.html#L5E2", width)
    assert page.eval_on_selector("#L5E2 details", "details => details.open")
    assert 0 <= page.locator("#L5E2").bounding_box()["y"] < 844
    assert fits(page)
    words = page.inner_text("#L5E2")
    for part in ("By kind of text", "Rank in layer 5", "REAP", "novel", "of its effect is at"):
        assert part in words
    value = page.inner_text("#L5E2 .value >> nth=0")
    page.click("#L5E2 .contexts a >> nth=0")
    page.wait_for_selector("#panel table")
    row = next(row for row in page.locator("#panel tbody tr").all() if row.inner_text().startswith("L5E2"))
    assert float(row.locator("td").nth(3).inner_text()) == pytest.approx(float(value), rel=0.1)
    page.go_back()
    page.wait_for_selector("#L5E2.linked")


def test_a_link_within_the_page_shows_a_card_that_the_filters_hide(visit: Any) -> None:
    page = visit("experts.html")
    page.fill("#search", "L1E1")
    page.evaluate("location.hash = '#L2E3'")
    page.wait_for_selector("#L2E3.linked")
    assert page.input_value("#search") == ""


def test_dark_browsers_and_paper_get_their_colours(visit: Any) -> None:
    light, dark = (visit("experts.html", color_scheme=scheme) for scheme in ("light", "dark"))
    background = "getComputedStyle(document.body).backgroundColor"
    assert light.evaluate(background) == "rgb(255, 255, 255)"
    assert dark.evaluate(background) == "rgb(21, 23, 26)"
    dark.emulate_media(media="print")
    assert dark.evaluate(background) == "rgb(255, 255, 255)"
    assert not dark.is_visible("#controls")
    text = visit("documents.html#d1p4L2E3")
    assert not text.is_visible("#title")
    text.emulate_media(media="print")
    assert text.inner_text("#title").startswith("1. Title <1> & more (address, 60 tokens) · layer: 2 · expert 3")


def test_without_scripts_a_page_says_what_it_needs(browser: Any, run: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{run.as_uri()}/experts.html")
    assert "scripts are switched off" in page.inner_text("noscript")
    assert not page.is_visible("#controls")
    context.close()
