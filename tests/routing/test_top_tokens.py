"""Top tokens: a sort of everything, from texts and from a finished run."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE, expert_effects
from hooked_moe.analysis.accumulators.top_entries import Scored, TopHeap
from hooked_moe.counterfactuals import first_order_effects
from hooked_moe.measurement import open_measurement
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.routing import TopTokens, top_tokens
from hooked_moe.routing import pieces as pieces_module
from tests.conftest import ARCHITECTURES, random_model
from tests.support.number_text import number_corpus, number_reader, token_ids

BY = ("weight", "gap_norm", "delta_loss", "kl", "first_order", "first_order_curved")
LENGTHS = (20, 5, 13, 8, 2)


Entries = dict[tuple[int, int], list[tuple[float, int, int]]]


@pytest.fixture(scope="module")
def reader() -> HookedMoE:
    return number_reader(random_model)


@pytest.fixture(scope="module")
def entries(reader: HookedMoE) -> dict[str, Entries]:
    """By what is ranked by: of every (layer, expert), (value, document, position) of all tokens, window by window."""
    found: dict[str, Entries] = {by: defaultdict(list) for by in BY}
    for document, length in enumerate(LENGTHS):
        ids = token_ids(length, document)
        starts = list(range(0, length - 1, 7))
        for start in starts:
            window = torch.tensor([ids[start : start + 8]])
            effects = expert_effects(reader, window)
            tables = {
                by: getattr(effects, {"weight": "routing_weight"}.get(by, by)) for by in BY if not by.startswith("first_order")
            }
            estimates = first_order_effects(reader, window)
            tables |= {by: getattr(estimates, by) for by in BY if by.startswith("first_order")}
            own = window.shape[1] - (start != starts[-1])
            for layer, pos, slot in np.ndindex(3, own, 3):
                key = layer, int(effects.expert_index[layer, 0, pos, slot])
                for by, table in tables.items():
                    value = float(table[layer, 0, pos, slot])
                    if not np.isnan(value):
                        found[by][key].append((value, document, start + pos))
    return found


def assert_sorted(result: TopTokens, entries: Entries, n: int, lowest: bool) -> None:
    """Values are those of a sort; where two are equal but for rounding, which of them comes first is open."""
    rows = result.table().to_pylist()
    assert len(rows) == sum(min(n, len(own)) for own in entries.values())
    place = 0
    for (layer, expert), own in sorted(entries.items()):
        values = {(document, position): value for value, document, position in own}
        for rank, value in enumerate(sorted(values.values(), reverse=not lowest)[:n]):
            row = rows[place]
            place += 1
            at = row["document"], row["position"]
            assert (row["layer"], row["expert"], row["rank"]) == (layer, expert, rank)
            assert row["value"] == pytest.approx(value, abs=2e-5, rel=1e-4)
            assert values[at] == pytest.approx(value, abs=2e-5, rel=1e-4)
            ids, position = token_ids(LENGTHS[at[0]], at[0]), at[1]
            assert row["token"] == ids[position]
            assert row["text"] == str(ids[position])
            assert row["before"].split() == [str(t) for t in ids[max(0, position - 3) : position]]
            assert row["after"].split() == [str(t) for t in ids[position + 1 : position + 4]]


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("by", BY)
def test_the_entries_are_the_first_of_a_sort_of_everything(
    reader: HookedMoE, entries: dict[str, Entries], tmp_path: Path, by: Any, lowest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces_module, "TOKENS_PER_BATCH", 24)
    monkeypatch.setattr(pieces_module, "BATCHES_AHEAD", 1)
    corpus = number_corpus(tmp_path, LENGTHS)
    result = top_tokens(reader, corpus, by, 4, context=3, lowest=lowest, n_ctx=8)
    assert_sorted(result, entries[by], 4, lowest)


def test_a_finished_run_gives_the_same(reader: HookedMoE, entries: dict[str, Entries], tmp_path: Path) -> None:
    corpus = number_corpus(tmp_path, LENGTHS)
    with open_measurement(reader, TokenizedCorpus(reader, corpus, 8), results=tmp_path / "results") as run:
        run.require("position", progress=False)
    for by in BY:
        for lowest in (False, True):
            result = top_tokens(reader, run.directory, by, 5, context=3, lowest=lowest)  # type: ignore[arg-type]
            assert_sorted(result, entries[by], 5, lowest)
    some = top_tokens(reader, str(run.directory), "kl", 2, layers=[2])
    assert set(some.table()["layer"].to_pylist()) == {2}
    with pytest.raises(ValueError, match="layer 9 is not in the effect table"):
        top_tokens(reader, run.directory, layers=[9])
    with pytest.raises(FileNotFoundError, match=r"effects\.parquet does not exist; it is no finished measurement"):
        top_tokens(reader, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_tokens_of_every_family_are_ranked(model: HookedMoE, tokens: Tensor, architecture: str) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    result = top_tokens(model, tokens, "gap_norm", 3, attention_mask=mask, layers=[2])
    effects = expert_effects(model, tokens, [2], attention_mask=mask)
    for row in result.table().to_pylist():
        at = 0, row["document"], row["position"]
        slot = effects.expert_index[at].tolist().index(row["expert"])
        assert row["value"] == pytest.approx(float(effects.gap_norm[(*at, slot)]), rel=1e-4)
        assert row["token"] == int(tokens[row["document"], row["position"]])
        assert mask[row["document"], row["position"]] == 1
        assert row["text"] is None


def test_ties_are_in_the_order_of_the_texts_however_chunks_are_cut() -> None:
    random = np.random.default_rng(0)
    value = random.integers(0, 4, (200, 1, 2)).astype(np.float32)
    value[random.random(value.shape) < 0.1] = np.nan
    expert = np.stack([random.permutation(5)[:2] for _ in range(200)])[:, None]
    document, position = np.repeat(np.arange(10), 20), np.tile(np.arange(20), 10)
    expected = defaultdict(list)
    for token in range(200):
        for slot in range(2):
            if not np.isnan(value[token, 0, slot]):
                expected[int(expert[token, 0, slot])].append((-float(value[token, 0, slot]), document[token], position[token]))
    for step in (1, 13, 200):
        heap = TopHeap(6)
        for start in range(0, 200, step):
            part = slice(start, start + step)
            heap.add(Scored([4], document[part], position[part], expert[part], value[part]))
            assert len(heap.value) <= 5 * 6
        for number in range(5):
            own = heap.entries["expert"] == number
            found = list(zip(-heap.value[own], heap.entries["document"][own], heap.entries["position"][own], strict=True))
            assert found == sorted(expected[number])[:6]


def test_the_page_shows_tokens_in_context_and_escapes_them(tmp_path: Path) -> None:
    model = HookedMoE.from_pretrained("tiny-olmoe")
    result = top_tokens(model, ["if a < b and <script> then &amp; so", "and so on it goes"], n=2, layers=[1])
    page = result._repr_html_()
    assert "<script>" not in page
    assert "<b>" in page
    assert repr(result) == f"TopTokens({result.table().num_rows} tokens with the highest weight)"
    expert = result.table()["expert"][0].as_py()
    assert set(result.of(1, expert).table()["expert"].to_pylist()) == {expert}
    result.save(tmp_path / "top.parquet")
    assert TopTokens.load(tmp_path / "top.parquet").table().equals(result.table())


def test_bad_requests_are_answered(reader: HookedMoE, tokens: Tensor, unchecked: None) -> None:
    with pytest.raises(
        ValueError,
        match="by must be one of 'weight', 'gap_norm', 'delta_loss', 'kl', 'first_order', 'first_order_curved', not 'loss'",
    ):
        top_tokens(reader, tokens, "loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be 1 or more and context 0 or more, not 0 and 16"):
        top_tokens(reader, tokens, n=0)
    with pytest.raises(ValueError, match="not 1 and -1"):
        top_tokens(reader, tokens, n=1, context=-1)
