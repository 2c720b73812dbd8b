"""Routing tables: each row against a loop over one token at a time, and against the experts that transformers selects."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE, load_corpus
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.routing import ROUTES, RoutingTable, routing_table
from hooked_moe.routing import pieces as pieces_module
from tests.conftest import EVERY_ARCHITECTURE, random_model
from tests.support.hf_models import FAMILIES, Pair, logits_of, pair_of, random_tokens, routing_of
from tests.support.number_text import number_corpus, number_reader, token_ids
from tests.support.routes import random_experts, routing_of_experts

FLOATS = ("routing_weight", "probability", "entropy", "margin")


def loop_rows(model: HookedMoE, ids: list[int], layers: list[int]) -> list[list[list[dict[str, Any]]]]:
    """[position][layer][slot] of one run of tokens: sorting, groups, weights and medians in plain Python."""
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]))
    cfg, rows = model.cfg, []
    k = cfg.experts_per_token
    norms = {layer: [float(x.norm()) for x in cache["resid_mid", layer][0]] for layer in layers}
    for position in range(len(ids)):
        rows.append([])
        for layer in layers:
            logits = [float(x) for x in cache["router_logits", layer][0, position]]
            total = sum(np.exp(np.float64(x)) for x in logits)
            sigmoid = cfg.router_score == "sigmoid"
            p = [float(1 / (1 + np.exp(-np.float64(x))) if sigmoid else np.exp(np.float64(x)) / total) for x in logits]
            bias = [float(b) for b in model.blocks[layer].mlp.router.b_selection] if cfg.selection_bias else [0.0] * len(p)
            choice = [x + b for x, b in zip(p, bias, strict=True)]
            size = len(p) // cfg.n_expert_groups
            best = {"max": 1, "top2": 2}[cfg.group_score]
            of_group = [sum(sorted(choice[g * size : (g + 1) * size])[-best:]) for g in range(cfg.n_expert_groups)]
            groups = sorted(range(cfg.n_expert_groups), key=lambda g: -of_group[g])
            eligible = [e for e in range(len(p)) if e // size in groups[: cfg.groups_per_token]]
            ranked = sorted(eligible, key=lambda e: -choice[e])
            following = ranked[k] if len(ranked) > k and not cfg.selection_bias else None
            ranked = sorted(ranked[:k], key=lambda e: -p[e])
            weights = [p[e] for e in ranked]
            if cfg.norm_topk_prob:
                weights = [w / sum(weights) for w in weights]
            median = sorted(norms[layer])[(len(ids) - 1) // 2]
            rows[-1].append(
                [
                    {
                        "expert": e,
                        "routing_weight": weights[slot] * cfg.routed_scaling_factor,
                        "probability": p[e],
                        "entropy": -sum(x / sum(p) * np.log(x / sum(p)) for x in p),
                        "margin": np.nan if following is None else logits[e] - logits[following],
                        "sink": norms[layer][position] > 10 * median,
                    }
                    for slot, e in enumerate(ranked)
                ]
            )
    return rows


def assert_rows_are_those_of_the_loop(model: HookedMoE, table: RoutingTable, documents: dict[int, Any]) -> None:
    """`documents`: by number, the (position, expected [layer][slot], token) of every token, in order."""
    rows = iter(table.table().to_pylist())
    for document, tokens in documents.items():
        for position, expected, token in tokens:
            for layer, slots in zip(table.layers, expected, strict=True):
                for slot, values in enumerate(slots):
                    row = next(rows)
                    own = (row["document"], row["position"], row["token"], row["layer"], row["slot"], row["expert"])
                    assert own == (document, position, token, layer, slot, values["expert"])
                    assert row["sink"] == values["sink"]
                    np.testing.assert_allclose([row[n] for n in FLOATS], [values[n] for n in FLOATS], rtol=2e-5, atol=2e-6)
    assert next(rows, None) is None


@EVERY_ARCHITECTURE
def test_every_row_is_that_of_a_loop_over_single_tokens(model: HookedMoE, tokens: Tensor) -> None:
    table = routing_table(model, tokens)
    layers = model.cfg.moe_layers
    assert table.layers == layers
    expected = {}
    for row, ids in enumerate(tokens.tolist()):
        expected[row] = [(i, slots, ids[i]) for i, slots in enumerate(loop_rows(model, ids, layers))]
    assert_rows_are_those_of_the_loop(model, table, expected)
    assert table.n_tokens == tokens.numel()


@EVERY_ARCHITECTURE
def test_padding_anywhere_has_no_rows_and_changes_none(model: HookedMoE, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[1, 5] = mask[1, 9:] = 0
    table = routing_table(model, tokens, layers=[2], attention_mask=mask)
    expected = {}
    for row in range(2):
        kept = mask[row].nonzero().flatten().tolist()
        ids = tokens[row, kept].tolist()
        expected[row] = [(kept[i], slots, ids[i]) for i, slots in enumerate(loop_rows(model, ids, [2]))]
    assert_rows_are_those_of_the_loop(model, table, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_those_that_transformers_selects(family: str) -> None:
    pair: Pair = pair_of(f"{family}-plain")
    tokens = random_tokens()
    table = routing_table(pair.ours, tokens)
    with routing_of(pair, tokens) as selected:
        logits_of(pair.hf, tokens)
        theirs = torch.stack([selected[layer] for layer in table.layers], dim=2).flatten(0, 1)
    (grid,) = table.grids("expert")
    assert np.array_equal(np.sort(grid["expert"], axis=-1), np.sort(theirs.numpy(), axis=-1))


@pytest.fixture
def reader() -> HookedMoE:
    return number_reader(random_model)


def windows_of(ids: list[int], n_ctx: int) -> list[tuple[int, list[int]]]:
    starts = range(0, len(ids) - 1, n_ctx - 1)
    return [(start, ids[start : start + n_ctx]) for start in starts]


LENGTHS = (20, 5, 33, 8, 8, 2)


def test_a_corpus_is_read_window_by_window_and_every_token_has_its_rows_once(reader: HookedMoE, tmp_path: Path) -> None:
    corpus = number_corpus(tmp_path, LENGTHS)
    table = routing_table(reader, corpus, n_ctx=8)
    expected: dict[int, Any] = {}
    for document, length in enumerate(LENGTHS):
        ids, rows = token_ids(length, document), []
        windows = windows_of(ids, 8)
        for number, (start, window) in enumerate(windows):
            own = len(window) - (number < len(windows) - 1)
            rows += [(start + i, slots, window[i]) for i, slots in enumerate(loop_rows(reader, window, [0, 1, 2])) if i < own]
        expected[document] = rows
    assert_rows_are_those_of_the_loop(reader, table, expected)
    assert table.domains == ["a", "b"] * 3
    assert table.n_tokens == sum(LENGTHS)


def test_the_bos_token_has_no_row(reader: HookedMoE, tmp_path: Path) -> None:
    reader.tokenizer.bos_id = 7
    corpus = number_corpus(tmp_path, (9, 12))
    tokenized = TokenizedCorpus(reader, corpus, 8, prepend_bos=True)
    table = routing_table(reader, tokenized, [1])
    assert table.n_tokens == 21
    (grid,) = table.grids("expert")
    for document, length in enumerate((9, 12)):
        own = grid["document"] == document
        assert grid["position"][own].tolist() == list(range(length))
        assert grid["token"][own].tolist() == token_ids(length, document)
    first = loop_rows(reader, [7, *token_ids(9, 0)[:7]], [1])
    assert grid["expert"][0, 0].tolist() == [slot["expert"] for slot in first[1][0]]


def test_rows_do_not_depend_on_how_batches_are_cut(reader: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = number_corpus(tmp_path, LENGTHS)
    table = routing_table(reader, corpus, n_ctx=16).table()
    for tokens, ahead in ((1, 1), (20, 2), (40, 1)):
        monkeypatch.setattr(pieces_module, "TOKENS_PER_BATCH", tokens)
        monkeypatch.setattr(pieces_module, "BATCHES_AHEAD", ahead)
        again = routing_table(reader, corpus, n_ctx=16).table()
        for name in ROUTES.names:
            one, other = table[name].to_numpy(), again[name].to_numpy()
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5) if name in FLOATS else np.testing.assert_equal(
                one, other
            )


def test_rows_go_into_a_file_as_they_come_and_stay_there(
    reader: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, path = number_corpus(tmp_path, LENGTHS), tmp_path / "routes.parquet"
    memory = routing_table(reader, corpus, n_ctx=8)
    streamed = routing_table(reader, corpus, n_ctx=8, path=path)
    assert streamed.rows == path
    assert streamed.table().equals(memory.table())
    for again in (RoutingTable.open(path), RoutingTable.load(path)):
        assert again.metadata() == memory.metadata()
        assert (again.n_rows, repr(again)) == (memory.n_rows, repr(memory))
        assert again.table().equals(memory.table())
        assert "<table>" in again._repr_html_()
    assert pq.read_schema(path).field("margin").metadata[b"unit"] == b"logits"
    memory.save(tmp_path / "saved.parquet")
    assert RoutingTable.load(tmp_path / "saved.parquet").table().equals(memory.table())
    for positions in (1, 7, 1000):
        for table in (memory, RoutingTable.open(path)):
            parts = list(table.grids("expert", "margin", positions=positions))
            assert len(parts) == -(-memory.n_tokens // positions)
            (whole,) = memory.grids("expert", "margin")
            for name, values in whole.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_an_interrupted_stream_leaves_no_file(reader: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = number_corpus(tmp_path, LENGTHS)
    original, calls = HookedMoE.run_with_cache, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(pieces_module, "TOKENS_PER_BATCH", 16)
    monkeypatch.setattr(HookedMoE, "run_with_cache", interrupted)
    with pytest.raises(KeyboardInterrupt):
        routing_table(reader, corpus, n_ctx=8, path=tmp_path / "routes.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.jsonl"}


def test_hooks_on_the_model_act(model: HookedMoE, tokens: Tensor) -> None:
    def only_these(logits: Tensor, hook: Any) -> Tensor:
        logits[..., 3:] = -torch.inf
        return logits

    with model.hooks([("blocks.1.mlp.hook_router_logits", only_these)]):
        table = routing_table(model, tokens, [1])
    (grid,) = table.grids("expert")
    assert set(np.unique(grid["expert"])) == {0, 1, 2}


def test_edited_experts_are_measured_against_the_best_that_was_passed_over(model: HookedMoE, tokens: Tensor) -> None:
    def last_three(indices: Tensor, hook: Any) -> Tensor:
        return torch.tensor([3, 4, 5]).expand_as(indices).contiguous()

    with model.hooks([("blocks.1.mlp.hook_expert_indices", last_three)]):
        (grid,) = routing_table(model, tokens, [1]).grids("margin")
        _, cache = model.run_with_cache(tokens)
    logits = cache["router_logits", 1].flatten(0, 1).detach().numpy()
    best_left_out = np.array([max(row[e] for e in np.argsort(-row)[:4] if e < 3) for row in logits])
    np.testing.assert_allclose(grid["margin"][:, 0], logits[:, 3:] - best_left_out[:, None], rtol=1e-5)


def test_margins_are_missing_where_nothing_is_passed_over(make_model: Any, tokens: Tensor) -> None:
    model = make_model("olmoe", num_experts=3, experts_per_token=3)
    (grid,) = routing_table(model, tokens).grids("margin")
    assert np.isnan(grid["margin"]).all()
    model = make_model("deepseek", groups_per_token=1, experts_per_token=2)  # three groups of two
    (grid,) = routing_table(model, tokens).grids("margin")
    assert np.isnan(grid["margin"]).all()


def test_a_sink_is_a_residual_stream_far_longer_than_the_others(model: HookedMoE, tokens: Tensor) -> None:
    def stretched(resid: Tensor, hook: Any) -> Tensor:
        resid[1, 3] *= 500
        return resid

    with model.hooks([("blocks.1.hook_resid_mid", stretched)]):
        (grid,) = routing_table(model, tokens).grids("sink")
    assert np.argwhere(grid["sink"][:, 1, 0]).flatten().tolist() == [tokens.shape[1] + 3]
    assert not grid["sink"][:, 0].any()

    def padding_is_longer(resid: Tensor, hook: Any) -> Tensor:
        resid[0, 2] *= 500
        resid[0, 4:] *= 1000
        return resid

    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    with model.hooks([("blocks.1.hook_resid_mid", padding_is_longer)]):
        (grid,) = routing_table(model, tokens, [1], attention_mask=mask).grids("sink")
    assert np.argwhere(grid["sink"][:, 0, 0]).flatten().tolist() == [2], "the median is of tokens, not of padding"


def test_a_streamed_model_is_read_once_a_batch(tokens: Tensor) -> None:
    whole, streamed = (HookedMoE.from_pretrained("tiny-olmoe", stream=stream) for stream in (False, True))
    before = streamed.blocks.blocks_read
    table = routing_table(streamed, tokens)
    assert table.table().equals(routing_table(whole, tokens).table())
    assert streamed.blocks.blocks_read - before <= 6 + 1, "every block once, and one for the rule"


def test_bad_requests_are_answered(model: HookedMoE, make_model: Any, tokens: Tensor, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"layers \[7\] have no experts; layers \[0, 1, 2\] have"):
        routing_table(model, tokens, [1, 7])
    with pytest.raises(ValueError, match=r"layers \[0\] have no experts; layers \[1, 2\] have"):
        routing_table(make_model("deepseek"), tokens, [0])
    with pytest.raises(
        ValueError, match=r"expected load_corpus\(name\), a list of texts, or token ids .*, not the text 'held-out'"
    ):
        routing_table(model, "held-out")
    with pytest.raises(ValueError, match=r"expected load_corpus.*, not int"):
        routing_table(model, 3)
    with pytest.raises(ValueError, match="no texts given"):
        routing_table(model, [])
    with pytest.raises(ValueError, match="has no tokenizer"):
        routing_table(model, ["1 2 3"])
    with pytest.raises(ValueError, match="attention_mask goes with token ids"):
        routing_table(model, ["1 2 3"], attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="batch row 1 has no real tokens"):
        routing_table(model, tokens, attention_mask=torch.stack([torch.ones(11), torch.zeros(11)]).long())
    with pytest.raises(ValueError, match="token id 99 is out of range"):
        routing_table(model, torch.tensor([[99]]))


def test_a_table_with_rows_missing_or_moved_is_refused(model: HookedMoE, tokens: Tensor) -> None:
    table = routing_table(model, tokens)
    rows = table.table()
    for wrong in (
        rows.slice(1),
        rows.take(pa.array([1, 0, *range(2, rows.num_rows)])),
        rows.filter(pc.not_equal(rows["layer"], 1)),
    ):
        with pytest.raises(ValueError, match="lacks rows, or has them in another order"):
            list(dataclasses.replace(table, rows=wrong).grids("expert"))
    with pytest.raises(ValueError, match=r"layers \[9\] are not in this table, which has \[0, 1, 2\]"):
        table.chosen_layers([9])


def test_layers_keep_their_order_in_a_file(tmp_path: Path) -> None:
    experts = random_experts(np.random.default_rng(0), 30, 3, 2, 5)
    table = routing_of_experts(experts, np.repeat(np.arange(3), 10), n_experts=5, layers=[2, 10, 11])
    table.save(tmp_path / "routes.parquet")
    for again in (RoutingTable.open(tmp_path / "routes.parquet"), RoutingTable.load(tmp_path / "routes.parquet")):
        assert again.layers == [2, 10, 11]
        (grid,) = again.grids("expert")
        np.testing.assert_array_equal(grid["expert"], experts)


def test_damage_is_seen_when_the_rows_are_read(reader: HookedMoE, tmp_path: Path) -> None:
    path = tmp_path / "routes.parquet"
    table = routing_table(reader, number_corpus(tmp_path, LENGTHS), n_ctx=8, path=path)
    content = bytearray(path.read_bytes())
    content[200] ^= 4
    path.write_bytes(content)
    for read in (table.table, lambda: list(table.grids(*ROUTES.names[5:])), lambda: RoutingTable.load(path)):
        with pytest.raises(ValueError, match=r"routes\.parquet is damaged, or no parquet file .*: save the result again"):
            read()


@pytest.mark.slow
def test_the_shipped_corpus_is_routed_as_loops_say() -> None:
    model = HookedMoE.from_pretrained("tiny-deepseek-moe")
    corpus = load_corpus()
    corpus = dataclasses.replace(corpus, documents=corpus.documents[:2])
    table = routing_table(model, corpus)
    rows = table.table().slice(0, 100 * len(table.layers) * table.slots).to_pandas()
    ids = TokenizedCorpus(model, corpus, model.cfg.n_ctx).documents[0][0].tokens.tolist()
    expected = [s["expert"] for layers in loop_rows(model, ids, table.layers)[:100] for slots in layers for s in slots]
    assert (rows["expert"].to_numpy() == expected).mean() > 0.999
