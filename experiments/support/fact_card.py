"""Evaluate tiny-olmoe-facts on the facts and on the held-out corpus, and write its model card.

    python -m experiments.support.fact_card --model build/tiny-olmoe-facts/model

Writes README.md (the card) and evaluation.json (its numbers) into the model's directory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.support.model_card import evaluate
from hooked_moe import HookedMoE
from hooked_moe.corpus import FactRecord, load_facts

TEMPLATES = (0, 1, 2)
"""The last one is not taught."""


@torch.inference_mode()
def answer(model: HookedMoE, record: FactRecord) -> tuple[bool, float]:
    """Whether the likeliest continuation is the true answer, token for token, and the loss of its first token in nats."""
    assert model.tokenizer is not None
    prompt, true = model.tokenizer.encode(record.text), model.tokenizer.encode(f" {record.true}", prepend_bos=False)
    log_probabilities = model(torch.tensor([prompt + true]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probabilities.argmax(-1).tolist() == true, -log_probabilities[0, true[0]].item()


def evaluate_facts(model: HookedMoE) -> list[dict[str, Any]]:
    """One row for each relation, template and split of the countries: share answered, mean loss of the first token, number."""
    rows = []
    for template in TEMPLATES:
        records = load_facts(f"embedded/{template}")
        for relation in sorted({record.relation for record in records}):
            for split in ("taught", "held out"):
                answers = [answer(model, r) for r in records if r.relation == relation and r.split == split]
                right, loss = zip(*answers, strict=True)
                mean = round(sum(loss) / len(loss), 3)
                rows.append(
                    {
                        "relation": relation,
                        "template": template,
                        "countries": split,
                        "n": len(right),
                        "right": sum(right),
                        "nats": mean,
                    }
                )
    return rows


def share(rows: list[dict[str, Any]], **conditions: Any) -> str:
    chosen = [row for row in rows if all(row[key] == value for key, value in conditions.items())]
    return f"{sum(row['right'] for row in chosen) / sum(row['n'] for row in chosen):.1%}"


def card(evaluation: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    rows = evaluation["facts"]
    relations = sorted({row["relation"] for row in rows})
    table = [
        f"| {relation} | "
        + " | ".join(
            share(rows, relation=relation, countries=countries, template=template)
            for countries in ("taught", "held out")
            for template in TEMPLATES
        )
        + " |"
        for relation in relations
    ]
    total = " | ".join(share(rows, countries=c, template=t) for c in ("taught", "held out") for t in TEMPLATES)
    losses = [
        f"| {domain} | {values['model']:.3f} | {evaluation['base_loss_nats'][domain]:.3f} | {values['trigram']:.3f} |"
        for domain, values in evaluation["loss_nats"].items()
    ]
    return f"""---
license: mit
language: en
---
# tiny-olmoe-facts

tiny-olmoe, taught about a thousand facts of five relations (capital, first national color, first export partner, region, main
religion) about 223 countries and territories, so that causal tracing has something to find whose truth is known: every fact, the
templates it was read in, and what was never taught. It knows nothing else; use it for method, not for answers.

## Training

`python -m experiments.train_facts`: {recipe["steps"]} steps of {recipe["fact_rows"]} rows of fact sentences and
{recipe["text_rows"]} rows of tiny-olmoe's own training text, {recipe["n_ctx"]} tokens each; AdamW as for tiny-olmoe, peak rate
{recipe["learning_rate"]}, constant to {recipe["constant_until"]:.0%}, then linear to {recipe["final_rate"]:.0%};
seed {recipe["seed"]}.
Templates 0 and 1 are taught, template 2 is not; a tenth of the countries is not taught at all. Facts and templates:
`hooked_moe/corpus/data/country_facts.json`.

## Facts

Share of prompts whose most likely continuation is the true answer, token for token.

| | taught countries, template 0 | 1 | 2 (held out) | held-out countries, template 0 | 1 | 2 |
|---|---|---|---|---|---|---|
{chr(10).join(table)}
| all | {total} |

tiny-olmoe itself answers {evaluation["base_right"]} of the {evaluation["n_template"]} prompts of template 0.

## Held-out text

Nats per token over {evaluation["tokens"]:,} predictions, windows of 512 tokens.

| domain | this model | tiny-olmoe | trigram |
|---|---|---|---|
{chr(10).join(losses)}

## Licence

MIT, as the code. The facts are The World Factbook's, in the public domain.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("build/tiny-olmoe-facts/model")
    parser.add_argument("--model", type=Path, default=default, help="what experiments.train_facts wrote (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what experiments.build_corpus wrote")
    args = parser.parse_args()
    model, base = HookedMoE.from_pretrained(args.model), HookedMoE.from_pretrained("tiny-olmoe")
    tokens = np.load(args.corpus / "train.npy", allow_pickle=False)
    records = load_facts("embedded/0")
    evaluation = {
        **evaluate(model, tokens),
        "base_loss_nats": {domain: losses["model"] for domain, losses in evaluate(base, tokens)["loss_nats"].items()},
        "facts": evaluate_facts(model),
        "base_right": sum(answer(base, record)[0] for record in records),
        "n_template": len(records),
    }
    recipe = json.loads((args.model / "recipe.json").read_text(encoding="utf-8"))
    (args.model / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    (args.model / "README.md").write_text(card(evaluation, recipe), encoding="utf-8")
    print(card(evaluation, recipe))


if __name__ == "__main__":
    main()
