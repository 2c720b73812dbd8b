"""The tables of a measurement, against one obvious forward pass per removal, and how windows, samples and shards fit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from number_text import number_corpus, number_reader, number_tokenizer, token_ids

from hooked_moe import ExpertMask, HookedMoE, measurement
from hooked_moe.corpus import Corpus
from hooked_moe.counterfactuals import Scope
from hooked_moe.effect_grid import read_effects
from hooked_moe.expert_mask import Removal
from hooked_moe.measurement import Plan, TokenizedCorpus, measure, remove_shards
from hooked_moe.tables import DOCUMENTS, EFFECTS, EFFECTS_SEQUENCE, TOKENS

N_CTX = 8
KEYS = ["document", "position", "layer", "slot"]


@pytest.fixture
def reader(make_model: Callable[..., HookedMoE]) -> HookedMoE:
    return number_reader(make_model)


def run(
    model: HookedMoE, corpus: Corpus, directory: Path, *, limit: int | None = None, **options: object
) -> dict[str, pd.DataFrame]:
    """Measure into `directory`; the tables by name."""
    plan = Plan(**({"layers": (0, 1, 2), "n_ctx": N_CTX} | options))  # type: ignore[arg-type]
    directory.mkdir(exist_ok=True)
    measure(model, TokenizedCorpus(model, corpus, plan.n_ctx, limit), plan, directory, progress=False)
    return {path.stem: pq.read_table(path).to_pandas() for path in directory.glob("*.parquet")}


def reference(
    model: HookedMoE, lengths: Sequence[int], layers: Sequence[int], scope: Scope, removal: Removal
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
                clean = model(window, "loss", loss_per_token=True)[0].tolist()
                _, cache = model.run_with_cache(window)
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
                            without = model(window, "loss", loss_per_token=True, expert_mask=removed)[0].tolist()
                        delta = without[j] - clean[j] if j + 1 < here else np.nan
                        rest = contributions.sum(0) - contributions[slot]
                        norms = float(outputs[slot].norm()), float(contributions[slot].norm())
                        cosine = float(torch.cosine_similarity(contributions[slot], rest, dim=0))
                        effects.append(
                            (document, position, layer, slot, expert, float(weights[slot]), *norms, cosine, loss, delta)
                        )
            start += N_CTX - 1
            number += 1
    return pd.DataFrame(effects, columns=EFFECTS.names), pd.DataFrame(tokens, columns=TOKENS.names)


def assert_equal(found: pd.DataFrame, expected: pd.DataFrame, atol: float = 1e-5) -> None:
    """Whole numbers to the digit, the others within `atol`, nan at nan."""
    assert list(found.columns) == list(expected.columns)
    assert len(found) == len(expected)
    for name in expected.columns:
        a, b = found[name].to_numpy(), expected[name].to_numpy()
        if np.issubdtype(a.dtype, np.integer):
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
def test_every_row_equals_one_full_forward_per_removal(reader: HookedMoE, removal: Removal, tmp_path: Path) -> None:
    lengths, layers = (12, 2, 8), (0, 2)
    tables = run(
        reader, number_corpus(tmp_path, lengths), tmp_path, layers=layers, removal=removal, scopes=("position", "sequence")
    )
    for scope, name in (("position", "effects"), ("sequence", "effects_sequence")):
        effects, tokens = reference(reader, lengths, layers, scope, removal)  # type: ignore[arg-type]
        assert_equal(tables[name], effects[tables[name].columns])
        assert_equal(tables["tokens"], tokens)
        assert np.nanmax(np.abs(tables[name]["delta_loss"])) > 0.01


@pytest.mark.parametrize("windows_at_once", [1, 2, 4])
def test_every_token_is_reported_once_and_predicted_once_whatever_the_lengths(
    reader: HookedMoE, windows_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "WINDOWS_AT_ONCE", windows_at_once)
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
    corpus = number_corpus(tmp_path, (40, 9, 23))
    expected = run(reader, corpus, tmp_path / "four", scopes=("position", "sequence"))
    for at_once in (1, 3):
        monkeypatch.setattr(measurement, "WINDOWS_AT_ONCE", at_once)
        found = run(reader, corpus, tmp_path / str(at_once), scopes=("position", "sequence"))
        assert found.keys() == expected.keys()
        for name in ("tokens", "effects", "effects_sequence"):
            assert_equal(found[name], expected[name], atol=1e-5)


def test_documents_are_described(reader: HookedMoE, tmp_path: Path) -> None:
    documents = run(reader, number_corpus(tmp_path, (5, 12)), tmp_path)["documents"]
    assert documents.to_dict("records") == [
        {"document": 0, "id": "d0", "domain": "a", "title": "Title 0", "n_tokens": 5},
        {"document": 1, "id": "d1", "domain": "b", "title": "Title 1", "n_tokens": 12},
    ]


def test_files_have_the_documented_columns(reader: HookedMoE, tmp_path: Path) -> None:
    run(reader, number_corpus(tmp_path, (12, 3)), tmp_path, scopes=("position", "sequence"))
    schemas = {"documents": DOCUMENTS, "tokens": TOKENS, "effects": EFFECTS, "effects_sequence": EFFECTS_SEQUENCE}
    assert {path.stem for path in tmp_path.glob("*.parquet")} == schemas.keys()
    for name, schema in schemas.items():
        assert pq.read_schema(tmp_path / f"{name}.parquet").equals(schema, check_metadata=True), name
    assert read_effects(tmp_path / "effects.parquet").layers == (0, 1, 2)


def test_a_sample_is_removed_at_its_positions_only_and_routing_is_observed_everywhere(reader: HookedMoE, tmp_path: Path) -> None:
    corpus = number_corpus(tmp_path, (20, 9, 12))
    sample = frozenset([(0, 0), (0, 6), (0, 7), (0, 18), (2, 3)])  # 7 ends the first window and begins the second
    scopes = ("position", "sequence")
    every = run(reader, corpus, tmp_path / "every", scopes=scopes)
    some = run(reader, corpus, tmp_path / "some", scopes=scopes, sample=sample)
    assert_equal(some["tokens"], every["tokens"])
    for name in ("effects", "effects_sequence"):
        asked = [place in sample for place in zip(every[name]["document"], every[name]["position"], strict=True)]
        expected = every[name].copy()
        expected["delta_loss"] = expected["delta_loss"].where(asked)
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
    tables = run(
        number_reader(make_model, dtype=dtype), number_corpus(tmp_path, (11,)), tmp_path, scopes=("position", "sequence")
    )
    for name in ("effects", "effects_sequence"):
        measured = tables[name][tables[name]["position"] < 10]
        assert np.isfinite(measured["delta_loss"]).all()
        assert measured["delta_loss"].abs().max() > 0.01


def test_a_measurement_goes_on_with_the_documents_that_lack_a_shard(
    reader: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = number_corpus(tmp_path, (12, 9, 20, 5))
    run(reader, corpus, tmp_path / "whole")
    run(reader, corpus, tmp_path / "resumed")
    shards = tmp_path / "resumed" / "shards"
    assert len(list(shards.iterdir())) == 8
    (shards / "000001.effects.parquet").unlink()
    (shards / "000003.tokens.parquet").unlink()
    measured, original = [], measurement._measure_document
    monkeypatch.setattr(
        measurement,
        "_measure_document",
        lambda model, windows, *rest: measured.append(windows[0].document) or original(model, windows, *rest),
    )
    run(reader, corpus, tmp_path / "resumed")
    assert measured == [1, 3]
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name
    remove_shards(tmp_path / "resumed")
    assert not shards.exists()
    remove_shards(tmp_path / "resumed")  # nothing left to do


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
