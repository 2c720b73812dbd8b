"""Evaluate a small trained model on the shipped held-out corpus, and write its model card.

    python -m experiments.support.model_card --model build/tiny-olmoe/model --corpus build/corpus

Writes README.md (the card) and evaluation.json (its numbers) into the model's directory. Baselines are n-gram models of the
same training text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.corpus import load_corpus
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus
from hooked_moe.tables import write_text_atomic

DISCOUNT = 0.75


class NGramModel:
    """Absolute discounting, interpolated down to unigrams and the uniform distribution (Ney, Essen & Kneser 1994)."""

    def __init__(self, tokens: np.ndarray, order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        self.counts: list[tuple[np.ndarray, np.ndarray]] = []
        self.contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for n in range(1, order + 1):
            grams, counts = np.unique(self._keys(tokens, n), return_counts=True)
            contexts, first = np.unique(grams // vocabulary, return_index=True)
            distinct = np.diff(np.append(first, len(grams)))
            self.counts.append((grams, counts))
            self.contexts.append((contexts, np.add.reduceat(counts, first), distinct))

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of tokens 1, 2, ... in nats; the first ones are predicted from what context there is."""
        probability = np.full(len(tokens) - 1, 1.0 / self.vocabulary)
        for n in range(1, self.order + 1):
            keys = self._keys(tokens, n)[1 if n == 1 else 0 :]
            here = slice(len(probability) - len(keys), None)
            count = _find(*self.counts[n - 1], keys)
            contexts, totals, distinct = self.contexts[n - 1]
            total, kinds = _find(contexts, totals, keys // self.vocabulary), _find(contexts, distinct, keys // self.vocabulary)
            seen = total > 0
            lower = probability[here]
            mixed = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * kinds * lower) / np.where(seen, total, 1)
            probability[here] = np.where(seen, mixed, lower)
        return -np.log(probability)

    def _keys(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """Every n-gram as one number, its last token the lowest digit."""
        keys = np.zeros(len(tokens) - n + 1, dtype=np.int64)
        for offset in range(n):
            keys = keys * self.vocabulary + tokens[offset : len(tokens) - n + 1 + offset].astype(np.int64)
        return keys


def _find(known: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at the wanted keys; 0 for keys that are not known."""
    place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[place] == wanted, values[place], 0)


def evaluate(model: HookedMoE, train_tokens: np.ndarray) -> dict[str, Any]:
    """Held-out loss by domain, of the model and of n-grams, and how the experts are used."""
    corpus = TokenizedCorpus(model, load_corpus("held-out"), model.cfg.n_ctx)
    n_grams = {
        name: NGramModel(train_tokens, n, model.cfg.d_vocab) for n, name in enumerate(["unigram", "bigram", "trigram"], start=1)
    }
    losses: dict[str, dict[str, list[np.ndarray]]] = {}
    selected = torch.zeros(len(model.cfg.moe_layers), model.cfg.num_experts)

    def count(indices: torch.Tensor, hook: Any) -> None:
        selected[model.cfg.moe_layers.index(hook.layer())] += torch.bincount(indices.flatten(), minlength=model.cfg.num_experts)

    hooks = [(lambda name: name.endswith("hook_expert_indices"), count)]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
        for document, windows in zip(tqdm(corpus.corpus.documents, desc="evaluating"), corpus.documents, strict=True):
            of_domain = losses.setdefault(document.domain, {})
            for window in windows:
                loss = model(torch.from_numpy(window.tokens)[None], return_type="loss", loss_per_token=True)
                of_domain.setdefault("model", []).append(loss[0].numpy())
            tokens = np.concatenate([windows[0].tokens, *(window.tokens[1:] for window in windows[1:])])
            for name, n_gram in n_grams.items():
                of_domain.setdefault(name, []).append(n_gram.losses(tokens))
    by_domain = {domain: _means(kinds) for domain, kinds in sorted(losses.items())}
    everything = {kind: [part for kinds in losses.values() for part in kinds[kind]] for kind in ("model", *n_grams)}
    load = selected / selected.mean(dim=-1, keepdim=True)
    return {
        "tokens": int(sum(len(part) for part in everything["model"])),
        "loss_nats": {**by_domain, "all": _means(everything)},
        "uniform_loss_nats": float(np.log(model.cfg.d_vocab)),
        "expert_load": [_load(layer, row) for layer, row in zip(model.cfg.moe_layers, load, strict=True)],
    }


def _load(layer: int, row: torch.Tensor) -> dict[str, float]:
    """How unequally one layer's experts are used, in multiples of the uniform share."""
    lowest, highest = round(float(row.min()), 3), round(float(row.max()), 3)
    return {"layer": layer, "lowest": lowest, "highest": highest, "unused": int((row == 0).sum())}


def _means(kinds: Mapping[str, list[np.ndarray]]) -> dict[str, float]:
    return {kind: round(float(np.concatenate(parts).mean()), 4) for kind, parts in kinds.items()}


def card(model: HookedMoE, evaluation: dict[str, Any], recipe: dict[str, Any], train: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    cfg = model.cfg
    parameters = sum(p.numel() for p in model.parameters())
    seen = recipe["steps"] * recipe["batch"] * recipe["n_ctx"]
    kinds = ["model", "trigram", "bigram", "unigram"]
    rows = [
        f"| {domain} | " + " | ".join(f"{values[kind]:.3f}" for kind in kinds) + " |"
        for domain, values in evaluation["loss_nats"].items()
    ]
    loads = [f"| {r['layer']} | {r['lowest']:.2f} | {r['highest']:.2f} | {r['unused']} |" for r in evaluation["expert_load"]]
    texts = ", ".join(f"{domain} {count / 1e6:.1f} M" for domain, count in train["train_tokens"].items())
    return f"""---
license: mit
language: en
---
# {cfg.model_name}

A mixture-of-experts language model small enough to ship: {parameters / 1e6:.2f} M parameters, {cfg.model_type} architecture,
{_layers(cfg)}, width {cfg.d_model}, {_attention(cfg)}, {cfg.num_experts} experts of width
{cfg.d_expert} a layer of which {cfg.experts_per_token} are active, {_shared(cfg)}, context {cfg.n_ctx},
vocabulary {cfg.d_vocab:,}, embeddings {"tied" if cfg.tie_word_embeddings else "untied"}; weights in
{str(cfg.dtype).removeprefix("torch.")}. It exists so that causal
experiments on experts run offline in minutes. It writes plausible fragments and knows nothing; use it for method, not for text.

## Data

Public-domain English text, {sum(train["train_tokens"].values()) / 1e6:.1f} M tokens ({texts}), built from packages by
`experiments/build_corpus.py`, which names each source. Whaling (Moby-Dick) is in no part of the training text. The tokenizer is a
byte-level BPE trained on the same text. The evaluation corpus is held out by whole documents; no run of 13 words of it is in the
training text beyond boilerplate (`hooked_moe/corpus/data/README.md`).

## Training

`python -m experiments.train_tiny --model {cfg.model_name}`: {recipe["steps"]:,} steps of
{recipe["batch"]} x {recipe["n_ctx"]} tokens ({seen / 1e6:.1f} M tokens), AdamW (.9, .95), peak rate {recipe["learning_rate"]},
{recipe["warmup_steps"]} warm-up steps, constant to {recipe["constant_until"]:.0%}, then linear to {recipe["final_rate"]:.0%};
weight decay {recipe["weight_decay"]}, gradient norm clipped at {recipe["clip_norm"]}; load-balancing loss
{recipe["load_balancing"]} and router z-loss {recipe["router_z"]} per layer; experts' down projections begin
{recipe["expert_out_scale"]:.0f} times larger than the rest; seed {recipe["seed"]}.

## Held-out loss

Nats per token over {evaluation["tokens"]:,} predictions, windows of {cfg.n_ctx} tokens; the uniform distribution has
{evaluation["uniform_loss_nats"]:.3f}. The n-gram models are of the same training text, with absolute discounting.

| domain | {" | ".join(kinds)} |
|---|---|---|---|---|
{chr(10).join(rows)}

## Expert load on the held-out text

Times selected, as a multiple of the uniform share.

| layer | least used | most used | never used |
|---|---|---|---|
{chr(10).join(loads)}

## Licence

MIT, as the code. The texts are in the public domain.
"""


def _layers(cfg: HookedMoEConfig) -> str:
    dense = f" ({len(cfg.dense_layers)} of them dense, of width {cfg.d_mlp})" if cfg.dense_layers else ""
    return f"{cfg.n_layers} layers{dense}"


def _attention(cfg: HookedMoEConfig) -> str:
    if cfg.kv_lora_rank is None:
        return f"{cfg.n_heads} heads"
    return f"{cfg.n_heads} heads of latent attention (rank {cfg.kv_lora_rank})"


def _shared(cfg: HookedMoEConfig) -> str:
    if cfg.d_shared is None:
        return "no shared expert"
    return f"shared experts of width {cfg.d_shared} together{' behind a sigmoid gate' if cfg.shared_gate else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/tiny-olmoe/model"), help="what experiments.train_tiny wrote")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what experiments.build_corpus wrote")
    args = parser.parse_args()

    model = HookedMoE.from_pretrained(args.model)
    recipe = json.loads((args.model / "recipe.json").read_text())
    train = json.loads((args.corpus / "train_domains.json").read_text())
    evaluation = evaluate(model, np.load(args.corpus / "train.npy", allow_pickle=False))
    stored = json.loads((args.model / "config.json").read_text())
    model.cfg = model.cfg.replace(dtype=getattr(torch, stored["dtype"]), model_name=recipe["model"])
    write_text_atomic(json.dumps(evaluation, indent=1) + "\n", args.model / "evaluation.json")
    write_text_atomic(card(model, evaluation, recipe, train), args.model / "README.md")
    print(json.dumps(evaluation["loss_nats"], indent=1))


if __name__ == "__main__":
    main()
