"""The script that trains the shipped models, and the baselines of their cards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import train_tiny
from experiments.support.model_card import DISCOUNT, NGramModel
from experiments.train_tiny import ARCHITECTURES, Recipe, RouterLosses, batches, new_model, train
from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.corpus import load_corpus

SMALL = HookedMoEConfig(
    n_layers=2,
    d_model=16,
    d_vocab=50,
    n_ctx=12,
    n_heads=2,
    n_key_value_heads=2,
    d_head=8,
    qk_norm="full",
    num_experts=5,
    experts_per_token=2,
    d_expert=8,
    tie_word_embeddings=True,
    model_name="small",
)
RECIPE = Recipe(steps=6, batch=3, n_ctx=12, warmup_steps=2)
TOKENS = np.random.default_rng(0).integers(0, 50, 400).astype(np.uint16)


def test_every_epoch_visits_the_text_once_in_windows_cut_anew() -> None:
    source = batches(TOKENS, RECIPE)
    text = {tuple(TOKENS[start : start + 13]): start for start in range(len(TOKENS) - 12)}
    starts = [text[tuple(row.tolist())] for _ in range(20) for row in next(source)]
    per_epoch = len(np.arange(0, len(TOKENS) - 13, 12)) - 1
    first = starts[:per_epoch]
    assert len(set(first)) == len(first)
    assert len({start % 12 for start in first}) == 1
    assert len({start % 12 for start in starts}) > 1
    again = batches(TOKENS, RECIPE)
    assert [text[tuple(row.tolist())] for _ in range(20) for row in next(again)] == starts


def test_the_learning_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(steps=1000, warmup_steps=100, constant_until=0.6, final_rate=0.02)
    assert [round(recipe.rate(step), 3) for step in (0, 49, 99, 100, 600, 800, 999)] == [0.01, 0.5, 1.0, 1.0, 1.0, 0.51, 0.022]


def test_router_losses_are_those_of_their_papers() -> None:
    model = new_model(SMALL, RECIPE)
    losses = RouterLosses(SMALL)
    tokens = torch.randint(0, 50, (2, 9))
    with model.hooks(fwd_hooks=losses.hooks()):
        _, cache = model.run_with_cache(tokens)
    balance = z = 0.0
    for layer in range(2):
        logits = cache["router_logits", layer].flatten(0, 1)
        chosen = cache["expert_indices", layer].flatten().tolist()
        probability = logits.softmax(-1).mean(0)
        balance += sum(5 * chosen.count(e) / len(chosen) * float(probability[e]) for e in range(5))
        z += float(logits.exp().sum(-1).log().square().mean())
    expected = RECIPE.load_balancing * balance + RECIPE.router_z * z
    assert losses.total(RECIPE.load_balancing, RECIPE.router_z).item() == pytest.approx(expected, rel=1e-5)
    assert losses.counts.sum(-1).tolist() == [36.0, 36.0]


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(SMALL, RECIPE, TOKENS, tmp_path / "whole", save_every=2)

    class Killed(Exception):
        pass

    def stop_after_three(tokens: np.ndarray, recipe: Recipe):  # type: ignore[no-untyped-def]
        for step, batch in enumerate(batches(tokens, recipe)):
            if step == 3:
                raise Killed
            yield batch

    monkeypatch.setattr(train_tiny, "batches", stop_after_three)
    with pytest.raises(Killed):
        train(SMALL, RECIPE, TOKENS, tmp_path / "killed", save_every=2)
    monkeypatch.undo()
    resumed = train(SMALL, RECIPE, TOKENS, tmp_path / "killed", save_every=2)
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found), name
    assert not list(tmp_path.rglob("*.tmp"))
    logged = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("whole", "killed")]
    assert [row.split(",")[0] for row in logged[1]] == [row.split(",")[0] for row in logged[0]]


def test_a_log_goes_on_after_the_steps_of_the_saved_state(tmp_path: Path) -> None:
    """A killed run has logged steps that its saved state lacks, the last of them in part."""
    path = tmp_path / "log.csv"
    path.write_text(train_tiny.LOG_HEADER + "20,2.0,1,0,1,9\n40,1.9,1,0,1,9\n60,1.8,1,0,1,9\n8")
    train_tiny.begin_log(path, 40)
    assert path.read_text() == train_tiny.LOG_HEADER + "20,2.0,1,0,1,9\n40,1.9,1,0,1,9\n"
    train_tiny.begin_log(path, 0)
    assert path.read_text() == train_tiny.LOG_HEADER


def test_another_seed_is_another_training_of_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    def begin(cfg: object, recipe: Recipe, *rest: object) -> None:
        recipes.append(recipe)
        raise Begun

    recipes: list[Recipe] = []
    monkeypatch.setattr(train_tiny, "train", begin)
    np.save(tmp_path / "train.npy", TOKENS)
    for options in ([], ["--seed", "1"]):
        monkeypatch.setattr("sys.argv", ["train_tiny", "--steps", "660", "--corpus", str(tmp_path), *options])
        with pytest.raises(Begun):
            train_tiny.main()
    assert recipes == [Recipe(steps=660), Recipe(steps=660, seed=1)]
    models = [new_model(SMALL, recipe) for recipe in recipes]
    assert not torch.equal(models[0].embed.W_E, models[1].embed.W_E)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_n_gram_baselines_equal_their_definition_and_sum_to_one(order: int) -> None:
    rng = np.random.default_rng(1)
    train_text, held_out = rng.integers(0, 7, 200), rng.integers(0, 8, 30)
    model = NGramModel(train_text, order, vocabulary=8)
    counts = [Counter(tuple(train_text[i : i + n]) for i in range(len(train_text) - n + 1)) for n in range(1, order + 1)]

    def probability(context: tuple[int, ...], token: int) -> float:
        p = 1 / 8
        for n in range(1, min(order, len(context) + 1) + 1):
            before = context[len(context) - n + 1 :] if n > 1 else ()
            following = {gram: c for gram, c in counts[n - 1].items() if gram[:-1] == before}
            total = sum(following.values())
            if total:
                p = (max(following.get((*before, token), 0) - DISCOUNT, 0) + DISCOUNT * len(following) * p) / total
        return p

    losses = model.losses(held_out)
    for t in range(1, len(held_out)):
        context = tuple(held_out[max(0, t - order + 1) : t])
        assert losses[t - 1] == pytest.approx(-np.log(probability(context, held_out[t])))
        assert sum(probability(context, token) for token in range(8)) == pytest.approx(1)


@pytest.mark.slow
def test_150_steps_learn_something(tmp_path: Path) -> None:
    tokenizer = HookedMoE.from_pretrained("tiny-olmoe").tokenizer
    assert tokenizer is not None
    text = [token for document in load_corpus().documents for token in tokenizer.encode(document.text)]
    model = train(ARCHITECTURES["tiny-olmoe"], Recipe(steps=150), np.array(text, dtype=np.uint16), tmp_path, save_every=150)
    with torch.no_grad():
        assert float(model(torch.tensor(text[:512])[None], return_type="loss")) < 6.4
