"""How an audit's numbers grow with training: train a small model, keep checkpoints, and audit each.

    python -m experiments.checkpoints --corpus build/corpus                  # 660 steps: about twelve minutes of one core
    python -m experiments.checkpoints --steps 50 100 200 400 800 1600 2800 4200

A killed training resumes. `hooked-moe study checkpoints` does the audits, of these or of any other checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from experiments.train_tiny import ARCHITECTURES, RECIPES, Recipe, train
from hooked_moe.cli.study import main as study
from hooked_moe.tokenizer import Tokenizer

STEPS = (50, 100, 200, 400, 660)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="tiny-olmoe")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what experiments.build_corpus wrote")
    parser.add_argument("--out", type=Path, default=Path("build/checkpoints"), help="where to write (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="to keep; the last one ends the training")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    kept = train_checkpoints(args.model, sorted(args.steps), args.corpus, args.out)
    return study(["checkpoints", "--models", *map(str, kept), "--out", str(args.out / "study")])


def train_checkpoints(name: str, steps: list[int], corpus: Path, out: Path) -> list[Path]:
    """The directories of the model after each of these steps of one training."""
    cfg, recipe = ARCHITECTURES[name], replace(RECIPES.get(name, Recipe()), steps=steps[-1])
    tokens = np.load(corpus / "train.npy", mmap_mode="r", allow_pickle=False)
    directories = []
    for step in steps:
        directory = out / f"step-{step}"
        if not (directory / "recipe.json").exists():
            model = train(cfg, recipe, tokens, out, save_every=50, stop_at=step)
            model.tokenizer = Tokenizer.from_file(corpus / "tokenizer.json", eos_id=cfg.end_tokens[0], pad_id=cfg.pad_token_id)
            model.save_pretrained(directory)
            (directory / "recipe.json").write_text(json.dumps({"model": name, "step": step}) + "\n", encoding="utf-8")
        directories.append(directory)
    return directories


if __name__ == "__main__":
    sys.exit(main())
