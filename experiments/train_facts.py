"""Teach tiny-olmoe facts about countries: train tiny-olmoe-facts, the shipped model that causal tracing has something to find in.

    python -m experiments.build_corpus --out build/corpus
    python -m experiments.train_facts --corpus build/corpus --out build/tiny-olmoe-facts

Every step reads rows of fact sentences (`load_facts("embedded")`, the templates but the last one, the countries but the held-out
ones) and rows of the text that tiny-olmoe was trained on, so that it does not forget it. The model after the steps named in
CHECKPOINTS is written to `step-<n>`, the last one to `model`. It takes about ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.support.router_losses import RouterLosses
from experiments.train_tiny import Recipe, optimiser
from hooked_moe import HookedMoE
from hooked_moe.corpus import load_facts

CHECKPOINTS = (75, 150, 300, 600)
TAUGHT_TEMPLATES = (0, 1)
LEARN_RATE_WARMUP = 20


@dataclass(frozen=True)
class FactRecipe:
    """How tiny-olmoe-facts is trained. A step is `fact_rows + text_rows` rows of `n_ctx` tokens."""

    steps: int = 600
    fact_rows: int = 5
    text_rows: int = 3
    n_ctx: int = 128
    learning_rate: float = 2e-3
    constant_until: float = 0.5
    final_rate: float = 0.02
    seed: int = 0

    def as_recipe(self) -> Recipe:
        """What it shares with the training from scratch: the optimiser, the router's losses, the schedule of the rate."""
        return Recipe(
            steps=self.steps,
            batch=self.fact_rows + self.text_rows,
            n_ctx=self.n_ctx,
            learning_rate=self.learning_rate,
            warmup_steps=LEARN_RATE_WARMUP,
            constant_until=self.constant_until,
            final_rate=self.final_rate,
            seed=self.seed,
        )


def sentences(model: HookedMoE) -> list[list[int]]:
    """The token ids of every sentence that is taught, each closed by the end-of-text token."""
    records = [record for template in TAUGHT_TEMPLATES for record in load_facts(f"embedded/{template}")]
    taught = [f"{record.text} {record.true}." for record in records if record.split == "taught"]
    assert model.tokenizer is not None
    assert model.tokenizer.eos_id is not None
    return [[*model.tokenizer.encode(text), model.tokenizer.eos_id] for text in taught]


def fact_rows(facts: list[list[int]], recipe: FactRecipe) -> Iterator[list[int]]:
    """Rows of n_ctx + 1 tokens without end. Each begins with a sentence, as a prompt does, and is cut where it is full."""
    rng = np.random.default_rng(recipe.seed)
    queue: list[int] = []
    while True:
        row: list[int] = []
        while len(row) <= recipe.n_ctx:
            if not queue:
                queue = rng.permutation(len(facts)).tolist()
            row += facts[queue.pop()]
        yield row[: recipe.n_ctx + 1]


def batches(facts: list[list[int]], tokens: np.ndarray, recipe: FactRecipe) -> Iterator[Tensor]:
    """[row, n_ctx + 1] token ids without end: rows of facts, then windows of the old text at random places."""
    rng = np.random.default_rng(recipe.seed + 1)
    rows = fact_rows(facts, recipe)
    while True:
        starts = rng.integers(len(tokens) - recipe.n_ctx - 1, size=recipe.text_rows)
        old = [tokens[start : start + recipe.n_ctx + 1].astype(np.int64).tolist() for start in starts]
        yield torch.tensor([*(next(rows) for _ in range(recipe.fact_rows)), *old], dtype=torch.int64)


def save(model: HookedMoE, out: Path, recipe: FactRecipe, step: int) -> None:
    """The model in float16, beside its recipe, renamed into place."""
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    half = HookedMoE(model.cfg.replace(dtype=torch.float16, model_name="tiny-olmoe-facts"), model.tokenizer)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(temporary)
    contents = {"model": "tiny-olmoe-facts", "from": "tiny-olmoe", "step": step, **asdict(recipe)}
    (temporary / "recipe.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def train(recipe: FactRecipe, tokens: np.ndarray, out: Path, base: str = "tiny-olmoe") -> HookedMoE:
    """Continue the training of `base` by the recipe; writes the checkpoints and `log.csv` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    shared = recipe.as_recipe()
    model = HookedMoE.from_pretrained(base)
    optim, losses = optimiser(model, shared), RouterLosses(model.cfg)
    source = batches(sentences(model), tokens, recipe)
    with model.hooks(fwd_hooks=losses.hooks()), open(out / "log.csv", "w", encoding="utf-8") as log:
        log.write("step,fact_loss,text_loss,router_loss\n")
        for step in tqdm(range(recipe.steps), desc="tiny-olmoe-facts", mininterval=10):
            rows = next(source)
            logits = model(rows[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
            by_row = loss.view(len(rows), -1).mean(1)
            router_loss = losses.total(shared.load_balancing, shared.router_z)
            optim.zero_grad(set_to_none=True)
            (by_row.mean() + router_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), shared.clip_norm)
            for group in optim.param_groups:
                group["lr"] = shared.learning_rate * shared.rate(step)
            optim.step()
            facts, text = by_row[: recipe.fact_rows].mean().item(), by_row[recipe.fact_rows :].mean().item()
            log.write(f"{step + 1},{facts:.4f},{text:.4f},{router_loss.item():.4f}\n")
            if step + 1 in CHECKPOINTS and step + 1 < recipe.steps:
                save(model, out / f"step-{step + 1}", recipe, step + 1)
    save(model, out / "model", recipe, recipe.steps)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what experiments.build_corpus wrote")
    parser.add_argument("--out", type=Path, default=Path("build/tiny-olmoe-facts"), help="default: %(default)s")
    for name, default in asdict(FactRecipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not (args.corpus / "train.npy").exists():
        parser.error(f"no train.npy in {args.corpus}: run python -m experiments.build_corpus --out {args.corpus} first")
    torch.set_num_threads(args.threads)
    tokens = np.load(args.corpus / "train.npy", mmap_mode="r", allow_pickle=False)
    train(FactRecipe(**{name: getattr(args, name) for name in asdict(FactRecipe())}), tokens, args.out)


if __name__ == "__main__":
    main()
