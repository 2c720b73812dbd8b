"""The models that ship with the package are what their cards say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hooked_moe import HookedMoE
from hooked_moe.corpus import load_corpus
from hooked_moe.loading.registry import SHIPPED
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus

DIRECTORY = Path(__file__).parents[2] / "hooked_moe" / "pretrained"


@pytest.fixture(params=SHIPPED, scope="module")
def shipped(request: pytest.FixtureRequest) -> HookedMoE:
    return HookedMoE.from_pretrained(request.param)


def test_it_is_small_enough_to_ship(shipped: HookedMoE) -> None:
    files = list((DIRECTORY / shipped.cfg.model_name).iterdir())
    assert sum(file.stat().st_size for file in files if file.suffix == ".safetensors") <= 10_000_000
    assert {"README.md", "config.json", "tokenizer.json", "evaluation.json", "recipe.json"} <= {file.name for file in files}


@pytest.mark.usefixtures("unchecked")  # of the same call over and over
@pytest.mark.parametrize(
    "shipped",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "tiny-olmoe")) for name in SHIPPED],
    indirect=True,
)
def test_its_held_out_loss_and_expert_load_are_those_of_its_card(shipped: HookedMoE) -> None:
    evaluation = json.loads((DIRECTORY / shipped.cfg.model_name / "evaluation.json").read_text())
    corpus = TokenizedCorpus(shipped, load_corpus(), shipped.cfg.n_ctx)
    losses: dict[str, list[torch.Tensor]] = {}
    layers = shipped.cfg.moe_layers
    selected = torch.zeros(len(layers), shipped.cfg.num_experts)

    def count(indices: torch.Tensor, hook) -> None:  # type: ignore[no-untyped-def]
        selected[layers.index(hook.layer())] += torch.bincount(indices.flatten(), minlength=shipped.cfg.num_experts)

    with torch.inference_mode(), shipped.hooks([(lambda name: name.endswith("hook_expert_indices"), count)]):
        for document, windows in zip(corpus.corpus.documents, corpus.documents, strict=True):
            for window in windows:
                loss = shipped(torch.from_numpy(window.tokens)[None], return_type="loss", loss_per_token=True)[0]
                losses.setdefault(document.domain, []).append(loss)
    for domain, parts in losses.items():
        assert float(torch.cat(parts).mean()) == pytest.approx(evaluation["loss_nats"][domain]["model"], abs=1e-3)
    everything = torch.cat([part for parts in losses.values() for part in parts])
    assert float(everything.mean()) == pytest.approx(evaluation["loss_nats"]["all"]["model"], abs=1e-3)
    assert float(everything.mean()) < evaluation["loss_nats"]["all"]["trigram"]
    assert (selected > 0).all(), "no expert is dead"
    card = (DIRECTORY / shipped.cfg.model_name / "README.md").read_text(encoding="utf-8")
    assert f"| all | {evaluation['loss_nats']['all']['model']:.3f} |" in card


def test_transformers_loads_it_with_equal_logits_losses_and_tokens(shipped: HookedMoE) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = DIRECTORY / shipped.cfg.model_name
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    text = load_corpus().documents[0].text[:800]
    tokens = shipped.to_tokens(text)
    assert AutoTokenizer.from_pretrained(directory)(text).input_ids == tokens[0].tolist()
    with torch.no_grad():
        expected = reference(tokens).logits
        logits, losses = shipped(tokens, return_type="both", loss_per_token=True)
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    expected_losses = torch.nn.functional.cross_entropy(expected[0, :-1], tokens[0, 1:], reduction="none")
    torch.testing.assert_close(losses[0], expected_losses, atol=2e-5, rtol=0)
    torch.testing.assert_close(losses.mean(), expected_losses.mean(), atol=2e-6, rtol=0)


def test_saving_it_again_writes_the_same_weights(shipped: HookedMoE, tmp_path: Path) -> None:
    directory = DIRECTORY / shipped.cfg.model_name
    stored = getattr(torch, json.loads((directory / "config.json").read_text())["dtype"])
    HookedMoE.from_pretrained(directory, dtype=stored).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
