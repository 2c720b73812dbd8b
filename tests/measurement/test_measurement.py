"""The tables of a measurement, against one obvious forward pass per removal, and how windows, samples and shards fit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.corpus import Corpus
from hooked_moe.counterfactuals import Scope
from hooked_moe.counterfactuals.first_order import first_order_effects
from hooked_moe.executors import threads
from hooked_moe.expert_mask import RemovalName
from hooked_moe.measurement import document_tables, shards
from hooked_moe.measurement.document_tables import TABLES
from hooked_moe.measurement.expert_weights import expert_weights
from hooked_moe.measurement.part_spec import BUDGETED_PARTS, Part, PartSpec
from hooked_moe.measurement.shard_files import remove_shards
from hooked_moe.measurement.shards import measure_part
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.tables import EFFECTS, EXPERT_WEIGHTS, REMOVAL_ORDERS, TOKENS
from tests.conftest import without_type_checks
from tests.support.number_text import number_corpus, number_reader, number_tokenizer, token_ids
from tests.support.whole_tables import read_effects

N_CTX = 8
PARTS = tuple(part for part in TABLES if part not in BUDGETED_PARTS)
KEYS = ["document", "position", "layer", "slot"]


@pytest.fixture
def reader(make_model: Callable[..., HookedMoE]) -> HookedMoE:
    return number_reader(make_model)


def run(
    model: HookedMoE,
    corpus: Corpus,
    directory: Path,
    *parts: Part,
    limit: int | None = None,
    prepend_bos: bool | None = None,
    **options: object,
) -> dict[str, pd.DataFrame]:
    """Measure some parts ("position" if none is named) into `directory`; the tables by name."""
    directory.mkdir(exist_ok=True)
    tokenized = TokenizedCorpus(model, corpus, N_CTX, limit, prepend_bos)
    for part in parts or ("position",):
        spec = PartSpec(part, **({"layers": (0, 1, 2)} | options))  # type: ignore[arg-type]
        measure_part(model, tokenized, spec, directory / "shards" / part, directory, {"plan": "p"}, progress=False)
    return {path.stem: pq.read_table(path).to_pandas() for path in directory.glob("*.parquet")}


@without_type_checks()
def reference(
    model: HookedMoE, lengths: Sequence[int], layers: Sequence[int], scope: Scope, removal: RemovalName
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Effects and tokens, document by document, window by window, a full forward pass per removal."""
    effects, tokens = [], []
    for document, length in enumerate(lengths):
        ids = token_ids(length, document)
        start = number = 0
        while start + 1 < len(ids):
            window = torch.tensor([ids[start : start + N_CTX]])
            here = window.shape[1]
            last = start + here == len(ids)
            with torch.no_grad():
                logits, losses = model(window, "both", loss_per_token=True)
                clean, predicted = losses[0].tolist(), logits[0].double().log_softmax(-1)
                _, cache = model.run_with_cache(window)
            slopes = first_order_effects(model, window)
            for j in range(here if last else here - 1):
                position, loss = start + j, clean[j] if j + 1 < here else np.nan
                tokens.append((document, position, number, j, ids[position], [*ids, -1][position + 1], loss))
                for layer in layers:
                    prefix = f"blocks.{layer}.mlp.hook_expert"
                    weights, outputs = cache[f"{prefix}_weights"][0, j], cache[f"{prefix}_out"][0, j]
                    contributions = weights[:, None] * outputs
                    for slot, expert in enumerate(cache[f"{prefix}_indices"][0, j].tolist()):
                        removed = ExpertMask.ablate([(layer, 0, j if scope == "position" else None, expert)], removal)
                        with torch.no_grad():
                            logits, losses = model(window, "both", loss_per_token=True, expert_mask=removed)
                        delta = float(losses[0, j]) - clean[j] if j + 1 < here else np.nan
                        changed = logits[0, j].double().log_softmax(-1)
                        kl = float((predicted[j].exp() * (predicted[j] - changed)).sum()) if j + 1 < here else np.nan
                        rest = contributions.sum(0) - contributions[slot]
                        norms = float(outputs[slot].norm()), float(contributions[slot].norm())
                        cosine = float(torch.cosine_similarity(contributions[slot], rest, dim=0))
                        at = (slopes.layers.index(layer), 0, j, slot)
                        estimates = float(slopes.first_order[at]), float(slopes.first_order_curved[at])
                        observed = float(weights[slot]), *norms, cosine, float(rest.norm())
                        effects.append((document, position, layer, slot, expert, *observed, loss, delta, kl, *estimates))
            start += N_CTX - 1
            number += 1
    return pd.DataFrame(effects, columns=EFFECTS.names), pd.DataFrame(tokens, columns=TOKENS.names)


def assert_equal(found: pd.DataFrame, expected: pd.DataFrame, atol: float = 1e-5) -> None:
    """Whole numbers and names to the letter, the others within `atol`, nan at nan."""
    assert list(found.columns) == list(expected.columns)
    assert len(found) == len(expected)
    for name in expected.columns:
        a, b = found[name].to_numpy(), expected[name].to_numpy()
        if not np.issubdtype(a.dtype, np.floating):
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
def test_every_row_equals_one_full_forward_per_removal(reader: HookedMoE, removal: RemovalName, tmp_path: Path) -> None:
    lengths, layers = (12, 2, 8), (0, 2)
    tables = run(reader, number_corpus(tmp_path, lengths), tmp_path, "position", "sequence", layers=layers, removal=removal)
    for scope, name in (("position", "effects"), ("sequence", "effects_sequence")):
        effects, tokens = reference(reader, lengths, layers, scope, removal)  # type: ignore[arg-type]
        assert_equal(tables[name], effects[tables[name].columns])
        assert_equal(tables["tokens"], tokens)
        assert np.nanmax(np.abs(tables[name]["delta_loss"])) > 0.01


@pytest.mark.parametrize("windows_per_batch", [1, 2, 4])
def test_every_token_is_reported_once_and_predicted_once_whatever_the_lengths(
    reader: HookedMoE, windows_per_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_tables, "WINDOWS_PER_BATCH", windows_per_batch)
    lengths = (2, 7, 8, 9, 14, 15, 16, 50)
    tables = run(reader, number_corpus(tmp_path, lengths), tmp_path, layers=(1,))
    tokens, effects = tables["tokens"], tables["effects"]
    places = [(document, position) for document, length in enumerate(lengths) for position in range(length)]
    assert list(zip(tokens["document"], tokens["position"], strict=True)) == places
    assert tokens["token"].tolist() == [token_ids(lengths[d], d)[p] for d, p in places]
    for document, own in tokens.groupby("document"):
        assert own["target"].tolist() == [*own["token"].tolist()[1:], -1]
        assert own["baseline_loss"].isna().tolist() == [False] * (len(own) - 1) + [True]
        assert own["window"].tolist() == [min(p, lengths[document] - 2) // (N_CTX - 1) for p in own["position"]]
    assert (tokens["context_position"] == tokens["position"] - tokens["window"] * (N_CTX - 1)).all()
    assert effects[KEYS].to_numpy().tolist() == [[d, p, 1, slot] for d, p in places for slot in range(3)]
    per_row = effects.merge(tokens, on=["document", "position"], suffixes=("", "_of_token"))
    np.testing.assert_array_equal(per_row["baseline_loss"], per_row["baseline_loss_of_token"])
    np.testing.assert_array_equal(per_row["delta_loss"].isna(), per_row["target"] == -1)


def test_how_many_windows_run_together_changes_rounding_only(
    reader: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = number_corpus(tmp_path, (40, 9))
    expected = run(reader, corpus, tmp_path / "four", *PARTS, orders=("descending",))
    for windows in (1, 3):
        monkeypatch.setattr(document_tables, "WINDOWS_PER_BATCH", windows)
        found = run(reader, corpus, tmp_path / str(windows), *PARTS, orders=("descending",))
        assert found.keys() == expected.keys()
        for name in expected:
            assert_equal(found[name], expected[name], atol=1e-5)


def test_documents_are_described(reader: HookedMoE, tmp_path: Path) -> None:
    documents = TokenizedCorpus(reader, number_corpus(tmp_path, (5, 12)), N_CTX).table()
    assert documents.to_pylist() == [
        {"document": 0, "id": "d0", "domain": "a", "title": "Title 0", "n_tokens": 5},
        {"document": 1, "id": "d1", "domain": "b", "title": "Title 1", "n_tokens": 12},
    ]


def test_files_have_the_documented_columns(reader: HookedMoE, tmp_path: Path) -> None:
    run(reader, number_corpus(tmp_path, (12, 3)), tmp_path, *PARTS, orders=("ascending",))
    schemas = {name: schema for part in PARTS for name, schema in TABLES[part].items()}
    assert {path.stem for path in tmp_path.glob("*.parquet")} == schemas.keys()
    for name, schema in schemas.items():
        written = pq.read_schema(tmp_path / f"{name}.parquet")
        assert written.metadata == {b"plan": b"p"}
        assert written.remove_metadata().equals(schema, check_metadata=True), name
    assert read_effects(tmp_path / "effects.parquet").layers == (0, 1, 2)


def test_a_sample_is_removed_at_its_positions_only_and_routing_is_observed_everywhere(reader: HookedMoE, tmp_path: Path) -> None:
    corpus = number_corpus(tmp_path, (20, 9, 12))
    sample = frozenset([(0, 0), (0, 6), (0, 7), (0, 18), (2, 3)])  # 7 ends the first window and begins the second
    every = run(reader, corpus, tmp_path / "every", "position", "sequence")
    some = run(reader, corpus, tmp_path / "some", "position", "sequence", positions=sample)
    assert_equal(some["tokens"], every["tokens"])
    assert_equal(some["routing"], every["routing"])
    for name in ("effects", "effects_sequence"):
        asked = [place in sample for place in zip(every[name]["document"], every[name]["position"], strict=True)]
        expected = every[name].copy()
        for column in expected.columns.intersection(["delta_loss", "kl", "first_order", "first_order_curved"]):
            expected[column] = expected[column].where(asked)
        assert_equal(some[name], expected)
    assert read_effects(tmp_path / "some" / "effects.parquet").valid.sum() == len(sample)


def test_a_limit_keeps_the_first_tokens_of_each_document(reader: HookedMoE, tmp_path: Path) -> None:
    corpus = number_corpus(tmp_path, (20, 3, 10))
    tokenized = TokenizedCorpus(reader, corpus, N_CTX, limit=10)
    assert tokenized.lengths() == [10, 3, 10]
    assert tokenized.valid_positions() == [(d, p) for d, n in enumerate([10, 3, 10]) for p in range(n - 1)]
    tokens = run(reader, corpus, tmp_path, limit=10)["tokens"]
    assert tokens["token"].tolist() == [id for d, n in enumerate([20, 3, 10]) for id in token_ids(n, d)[:10]]
    assert tokens.groupby("document")["target"].last().tolist() == [-1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_numbers_too(make_model: Callable[..., HookedMoE], dtype: torch.dtype, tmp_path: Path) -> None:
    tables = run(number_reader(make_model, dtype=dtype), number_corpus(tmp_path, (11,)), tmp_path, "position", "sequence")
    for name in ("effects", "effects_sequence"):
        measured = tables[name][tables[name]["position"] < 10]
        assert np.isfinite(measured["delta_loss"]).all()
        assert measured["delta_loss"].abs().max() > 0.01


def test_a_measurement_resumes_with_the_documents_that_lack_a_shard(
    reader: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = number_corpus(tmp_path, (12, 9, 20, 5))
    run(reader, corpus, tmp_path / "whole")
    run(reader, corpus, tmp_path / "resumed")
    kept = tmp_path / "resumed" / "shards" / "position"
    assert len(list(kept.iterdir())) == 16
    (kept / "000001.effects.parquet").unlink()
    (kept / "000003.tokens.parquet").unlink()
    measured, original = [], shards.measure_document
    monkeypatch.setattr(
        shards,
        "measure_document",
        lambda model, windows, *rest: measured.append(windows[0].document) or original(model, windows, *rest),
    )
    run(reader, corpus, tmp_path / "resumed")
    assert measured == [1, 3]
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name
    remove_shards(kept)
    assert not kept.exists()
    remove_shards(kept)  # nothing left to do


def test_the_last_document_of_a_measurement_gets_the_threads_that_it_had_among_others(
    reader: HookedMoE, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    corpus = number_corpus(tmp_path, (12, 9, 20, 15))
    set_threads(2)
    run(reader, corpus, tmp_path / "whole")
    run(reader, corpus, tmp_path / "resumed")
    for shard in (tmp_path / "resumed" / "shards" / "position").glob("000002.*"):
        shard.unlink()
    run(reader, corpus, tmp_path / "resumed")
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name


def test_a_small_budget_has_fewer_documents_measured_side_by_side(
    reader: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    tokenized = TokenizedCorpus(reader, number_corpus(tmp_path, (20, 3, 10, 20)), N_CTX)
    spec = PartSpec("position", (0, 1, 2))
    least = shards._least_budget(reader, tokenized, spec)
    set_threads(3)
    workers: list[int] = []
    original = threads.ThreadPoolExecutor
    monkeypatch.setattr(threads, "ThreadPoolExecutor", lambda n, **options: workers.append(n) or original(n, **options))
    for times in (1, 2, 9):
        target = tmp_path / str(times)
        target.mkdir()
        measure_part(
            reader, tokenized, spec, target / "shards", target, {"plan": "p"}, progress=False, memory_budget=times * least
        )
    assert workers == [1, 2, 3]
    with pytest.raises(ValueError, match="memory_budget"):
        measure_part(reader, tokenized, spec, tmp_path / "no", tmp_path, {"plan": "p"}, progress=False, memory_budget=least // 2)


def test_token_ids_are_part_of_what_identifies_a_corpus(reader: HookedMoE, tmp_path: Path) -> None:
    corpus = number_corpus(tmp_path, (12, 9))
    plain = TokenizedCorpus(reader, corpus, N_CTX).sha256()
    assert TokenizedCorpus(reader, corpus, N_CTX).sha256() == plain
    assert TokenizedCorpus(reader, corpus, N_CTX, limit=10).sha256() != plain
    assert TokenizedCorpus(reader, corpus, 12).sha256() != plain
    reader.tokenizer = number_tokenizer(40)  # words from 40 on become 0
    assert TokenizedCorpus(reader, corpus, N_CTX).sha256() != plain


def test_a_model_without_a_tokenizer_or_with_another_models_is_refused(
    make_model: Callable[..., HookedMoE], tmp_path: Path
) -> None:
    corpus = number_corpus(tmp_path, (60,))
    with pytest.raises(ValueError, match=r"no tokenizer.*tokenizer\.json"):
        TokenizedCorpus(make_model(), corpus, N_CTX)
    with pytest.raises(ValueError, match=r"token id \d\d, but custom has ids 0 to 49"):
        TokenizedCorpus(number_reader(make_model, d_vocab=50), corpus, N_CTX)


def test_documents_too_short_to_predict_anything_are_named(reader: HookedMoE, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fewer than two tokens.*'d1' \(1\)"):
        TokenizedCorpus(reader, number_corpus(tmp_path, (9, 1)), N_CTX)


# --- routing and expert weights --------------------------------------------------------------------------------------


def test_routing_is_summed_over_each_documents_own_tokens(make_model: Callable[..., HookedMoE], tmp_path: Path) -> None:
    """Against the hooks of an ordinary forward of each window."""
    model, lengths = number_reader(make_model, architecture="qwen"), (12, 2, 15)
    tables = run(model, number_corpus(tmp_path, lengths), tmp_path, layers=(0, 2))
    rows = []
    for document, length in enumerate(lengths):
        ids = token_ids(length, document)
        seen: dict[int, list[list[torch.Tensor]]] = {0: [], 2: []}
        for start in range(0, length - 1, N_CTX - 1):
            window = torch.tensor([ids[start : start + N_CTX]])
            own = window.shape[1] if start + window.shape[1] == length else N_CTX - 1
            with torch.no_grad():
                _, cache = model.run_with_cache(window)
            names = ("router_logits", "expert_indices", "expert_out")
            for layer, pieces in seen.items():
                pieces.append([cache[name, layer][0, :own] for name in names])
        for layer, pieces in seen.items():
            logits, indices, outputs = (torch.cat(piece) for piece in zip(*pieces, strict=True))
            distribution = torch.distributions.Categorical(logits=logits)
            for expert in range(6):
                token, slot = (indices == expert).nonzero(as_tuple=True)
                largest = float(outputs[token, slot].abs().max()) if len(token) else np.nan
                sums = float(distribution.probs[:, expert].sum()), float(distribution.entropy()[token].sum())
                rows.append((document, layer, expert, len(token), length, *sums, largest))
    expected = pd.DataFrame(rows, columns=tables["routing"].columns)
    assert_equal(tables["routing"], expected)
    assert expected["max_activation"].isna().any(), "an expert that no token selects has no activation"


def test_expert_weights_are_norms_of_the_published_matrices(make_model: Callable[..., HookedMoE], tmp_path: Path) -> None:
    """Against the tensors of the checkpoint that the model saves, by transformers' names."""
    model = make_model(architecture="qwen", model_type="qwen2_moe", qk_norm=None)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    rows = []
    for layer in (0, 2):
        for expert in range(6):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            weights = np.concatenate([saved[f"{name}.{kind}_proj.weight"].numpy().ravel() for kind in ("gate", "up", "down")])
            weights = weights.astype(np.float64)
            router = saved[f"model.layers.{layer}.mlp.gate.weight"][expert].double()
            norms = float(router.norm()), float(np.linalg.norm(weights))
            rows.append((layer, expert, *norms, np.abs(weights).mean(), np.sqrt(np.mean(weights**2))))
    table = expert_weights(model, (0, 2))
    assert table.schema.equals(EXPERT_WEIGHTS, check_metadata=True)
    assert_equal(table.to_pandas(), pd.DataFrame(rows, columns=EXPERT_WEIGHTS.names), atol=1e-12)
    with pytest.raises(ValueError, match="layer 1 is dense"):
        expert_weights(model, (1,))


# --- progressive removal ---------------------------------------------------------------------------------------------


def test_progressive_rows_are_the_effects_of_removing_ever_more_experts(reader: HookedMoE, tmp_path: Path) -> None:
    """Against a masked forward for each row; orders by weight are of the observed slots."""
    lengths, sample = (12, 2, 9), frozenset([(0, 0), (0, 8), (2, 7)])
    tables = run(
        reader,
        number_corpus(tmp_path, lengths),
        tmp_path,
        "position",
        "progressive",
        layers=(0, 2),
        orders=("descending", "ascending", "random"),
        positions=sample,
    )
    found, effects = tables["progressive"], tables["effects"]
    every = [
        (d, p, layer, order, m) for d, p in sorted(sample) for layer in (0, 2) for order in REMOVAL_ORDERS for m in (1, 2, 3)
    ]
    assert list(found[["document", "position", "layer", "order", "removed"]].itertuples(index=False, name=None)) == every
    for row in found.itertuples():
        start = row.position // (N_CTX - 1) * (N_CTX - 1)
        window = torch.tensor([token_ids(lengths[row.document], row.document)[start : start + N_CTX]])
        here = (effects["document"] == row.document) & (effects["position"] == row.position) & (effects["layer"] == row.layer)
        experts = effects[here]["expert"].tolist()
        sets = {"descending": [experts], "ascending": [experts[::-1]], "random": list(permutations(experts))}[row.order]
        deltas = []
        for order in sets:
            gone = ExpertMask.ablate([(row.layer, 0, row.position - start, expert) for expert in order[: row.removed]])
            with torch.no_grad(), without_type_checks():
                loss = [reader(window, "loss", loss_per_token=True, expert_mask=mask)[0] for mask in (gone, None)]
            deltas.append(float((loss[0] - loss[1])[row.position - start]))
            assert row.baseline_loss == pytest.approx(float(loss[1][row.position - start]), abs=1e-5)
        assert min(abs(np.asarray(deltas) - row.delta_loss)) < 1e-5


def test_a_random_order_is_of_its_document_and_its_seed(reader: HookedMoE, tmp_path: Path) -> None:
    corpus = number_corpus(tmp_path, (40, 40))
    options = {"orders": ("random",), "layers": (0,)}
    first, again, other = (
        run(reader, corpus, tmp_path / str(n), "progressive", seed=seed, **options)["progressive"]["delta_loss"]
        for n, seed in enumerate((0, 0, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    sampled = run(reader, corpus, tmp_path / "sample", "progressive", positions=frozenset([(1, 9)]), **options)["progressive"]
    whole = run(reader, corpus, tmp_path / "0", "progressive", **options)["progressive"]
    here = whole[(whole["document"] == 1) & (whole["position"] == 9)].reset_index(drop=True)
    assert_equal(sampled, here)


# --- BOS ---------------------------------------------------------------------------------------------------------------


def test_a_bos_token_is_seen_by_the_model_and_is_in_no_table(reader: HookedMoE, tmp_path: Path) -> None:
    """The same windows with the BOS token written out as a first word, less its rows."""
    bos, n_ctx = 7, N_CTX
    assert reader.tokenizer is not None
    reader.tokenizer.bos_id = bos
    lengths = (12, 2, 7, 8)
    corpus = number_corpus(tmp_path, lengths)
    tables = run(reader, corpus, tmp_path / "bos", *PARTS, prepend_bos=True, orders=("descending",))
    for document, length in enumerate(lengths):
        ids = token_ids(length, document)
        tokens = tables["tokens"][tables["tokens"]["document"] == document]
        assert tokens["token"].tolist() == ids
        assert tokens["target"].tolist() == [*ids[1:], -1]
        assert tokens["position"].tolist() == list(range(length))
        for start in range(0, length - 1, n_ctx - 2):
            window = torch.tensor([[bos, *ids[start : start + n_ctx - 1]]])
            with torch.no_grad():
                expected = reader(window, "loss", loss_per_token=True)[0, 1:]
            found = tokens["baseline_loss"].to_numpy()[start : start + len(expected)]
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert tokens["context_position"].to_numpy()[start] == 1
        effects = tables["effects"][tables["effects"]["document"] == document]
        assert effects["position"].unique().tolist() == list(range(length))
        assert effects["delta_loss"].notna().sum() == effects["first_order"].notna().sum() == (length - 1) * 9
    per_document = tables["routing"].groupby(["document", "layer"])
    assert (per_document["n_tokens"].sum() == 3 * per_document["document_tokens"].first()).all()
    np.testing.assert_allclose(per_document["sum_probability"].sum(), per_document["document_tokens"].first(), rtol=1e-5)
    assert (per_document["document_tokens"].first().unstack() == np.asarray(lengths)[:, None]).all(axis=None)


def test_bos_is_as_the_tokenizer_has_it_unless_said_otherwise(reader: HookedMoE, tmp_path: Path) -> None:
    corpus = number_corpus(tmp_path, (20, 9))
    assert reader.tokenizer is not None
    assert TokenizedCorpus(reader, corpus, N_CTX).bos is None
    with pytest.raises(ValueError, match="no BOS token"):
        TokenizedCorpus(reader, corpus, N_CTX, prepend_bos=True)
    reader.tokenizer.bos_id, reader.tokenizer.adds_bos = 7, True
    tokenized = TokenizedCorpus(reader, corpus, N_CTX, limit=N_CTX)
    assert (tokenized.bos, tokenized.first) == (7, 1)
    assert tokenized.lengths() == [N_CTX - 1, N_CTX - 1], "a limit as long as the context leaves one full window"
    assert TokenizedCorpus(reader, corpus, N_CTX, prepend_bos=False).bos is None
    reader.tokenizer.adds_bos = False
    assert TokenizedCorpus(reader, corpus, N_CTX).bos is None
    assert TokenizedCorpus(reader, corpus, N_CTX).sha256() != tokenized.sha256()
