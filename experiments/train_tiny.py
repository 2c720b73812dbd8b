"""Train one of the small models that ship with the package, on public-domain text.

    python -m experiments.build_corpus --out build/corpus
    python -m experiments.train_tiny --model tiny-olmoe --corpus build/corpus --out build/tiny-olmoe

The length is a number of steps, not of minutes, so that a retrain repeats. The optimiser's state is saved beside the weights
every `--save-every` steps; a killed run resumes there. On a GPU: `--device cuda`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.support.router_losses import RouterLosses
from experiments.support.training_state import load_state, save_state
from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.cli.console import Parser, run_command, whole_number
from hooked_moe.cli.options import choose_device
from hooked_moe.components.moe import MoE
from hooked_moe.config import YarnScaling
from hooked_moe.tables import remove_temporaries, write_text_atomic
from hooked_moe.tokenizer import Tokenizer

_COMMON: dict[str, Any] = {
    "n_layers": 6,
    "d_model": 128,
    "d_vocab": 4096,
    "n_ctx": 512,
    "n_heads": 4,
    "n_key_value_heads": 4,
    "d_expert": 24,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "tiny-olmoe": HookedMoEConfig(
        **_COMMON,
        model_type="olmoe",
        model_name="tiny-olmoe",
        d_head=32,
        qk_norm="full",
        num_experts=64,
        experts_per_token=8,
    ),
    "tiny-qwen-moe": HookedMoEConfig(
        **_COMMON,
        model_type="qwen2_moe",
        model_name="tiny-qwen-moe",
        d_head=32,
        rotary_base=1_000_000.0,
        qkv_bias=True,
        num_experts=60,
        experts_per_token=4,
        d_shared=128,
        shared_gate=True,
        eps=1e-6,
    ),
    "tiny-deepseek-moe": HookedMoEConfig(
        **_COMMON,
        model_type="deepseek_v2",
        model_name="tiny-deepseek-moe",
        d_head=48,
        d_rotary=16,
        d_value=32,
        kv_lora_rank=32,
        rotary_interleaved=True,
        rotary_scaling=YarnScaling(factor=4.0, original_ctx=128, mscale=0.707, mscale_all_dim=0.707),
        num_experts=64,
        experts_per_token=6,
        d_shared=48,
        dense_layers=(0,),
        d_mlp=384,
        eps=1e-6,
    ),
    "tiny-mixtral": HookedMoEConfig(
        **_COMMON | {"n_key_value_heads": 2, "d_expert": 96},
        model_type="mixtral",
        model_name="tiny-mixtral",
        d_head=32,
        rotary_base=1_000_000.0,
        num_experts=8,
        experts_per_token=2,
        norm_topk_prob=True,
    ),
}
"""Each as its family's published models are, down to the long-context scaling of DeepSeek-V2-Lite's positions."""


RESTART_STEPS = 20
"""A new optimiser knows no second moments yet, and its first steps are as long as the learning rate."""


@dataclass(frozen=True)
class Recipe:
    """How the shipped models were trained. A step is `batch` windows of `n_ctx` tokens."""

    steps: int = 4200
    batch: int = 8
    n_ctx: int = 512
    learning_rate: float = 4e-3
    warmup_steps: int = 200
    constant_until: float = 0.6
    final_rate: float = 0.02
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    load_balancing: float = 0.01
    router_z: float = 0.001
    expert_out_scale: float = 3.0
    """Initial scale of the experts' down projections: at 1 the routed experts stay weak for most of a short training."""
    seed: int = 0
    first_step: int = 0
    """The steps another model made before (upcycling): schedule and text continue there, after a warm-up of `RESTART_STEPS`."""

    def rate(self, step: int) -> float:
        """Learning rate as a share of the peak: linear warm-up, constant, linear to `final_rate`."""
        since_start = step - self.first_step + 1
        restart = min(1.0, since_start / RESTART_STEPS) if self.first_step else 1.0
        return restart * self._scheduled(step)

    def _scheduled(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_from = self.constant_until * self.steps
        progress = max(0.0, (step - decay_from) / (self.steps - decay_from))
        return 1.0 - (1.0 - self.final_rate) * progress


LOG_HEADER = "step,loss,router_loss,dead_experts,max_load,tokens_per_second\n"
RECIPES = {
    "tiny-qwen-moe": Recipe(steps=3600, load_balancing=0.02),
    "tiny-deepseek-moe": Recipe(steps=3600, load_balancing=0.02),
    "tiny-mixtral": Recipe(load_balancing=0.02),
}
"""Where they differ from the default. Beside shared experts, two in a thousand routed ones die at .01; Mixtral's own is .02."""


def batches(tokens: np.ndarray, recipe: Recipe) -> Iterator[Tensor]:
    """[batch, n_ctx + 1] windows without end: every epoch cuts the text again at a random offset and shuffles the windows."""
    rng = np.random.default_rng(recipe.seed)
    queue: list[int] = []
    while True:
        while len(queue) < recipe.batch:
            starts = np.arange(rng.integers(recipe.n_ctx), len(tokens) - recipe.n_ctx - 1, recipe.n_ctx)
            queue.extend(rng.permutation(starts).tolist())
        rows = [tokens[s : s + recipe.n_ctx + 1] for s in queue[: recipe.batch]]
        del queue[: recipe.batch]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def new_model(cfg: HookedMoEConfig, recipe: Recipe) -> HookedMoE:
    torch.manual_seed(recipe.seed)
    model = HookedMoE(cfg)
    with torch.no_grad():
        for block in model.blocks:
            if isinstance(block.mlp, MoE):
                block.mlp.experts.W_out.mul_(recipe.expert_out_scale)
    return model


def optimiser(model: HookedMoE, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW without weight decay on norms and biases."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.rpartition(".")[2].startswith("b_")
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def begin_log(path: Path, done: int) -> None:
    """The log with the steps that the saved state has: a killed run has written more, and they are taken again."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if done and path.is_file() else []
    kept = [row for row in rows if row.endswith("\n") and int(row.partition(",")[0]) <= done]
    write_text_atomic(LOG_HEADER + "".join(kept), path)


def train(
    cfg: HookedMoEConfig,
    recipe: Recipe,
    tokens: np.ndarray,
    out: Path,
    save_every: int,
    start: HookedMoE | None = None,
    stop_at: int | None = None,
) -> HookedMoE:
    """Train by the recipe, from the last saved state if there is one; writes `log.csv` and `state.safetensors` to `out`.

    `start` is the model to train further, in place; by default a new one. `stop_at` ends the training before that step of the
    recipe's schedule; by default it runs to the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    remove_temporaries(out)
    model, losses = start or new_model(cfg, recipe), RouterLosses(cfg)
    optim = optimiser(model, recipe)
    state = out / "state.safetensors"
    done = load_state(state, model, optim) if state.exists() else recipe.first_step
    begin_log(out / "log.csv", done if state.exists() else 0)
    source = batches(tokens, recipe)
    for _ in range(done):
        next(source)
    end = recipe.steps if stop_at is None else stop_at
    progress = tqdm(range(done, end), initial=done, total=end, desc=cfg.model_name, mininterval=10)
    started, smooth = time.perf_counter(), None
    with model.hooks(fwd_hooks=losses.hooks()):
        for step in progress:
            window = next(source).to(cfg.device)
            logits = model(window[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            router_loss = losses.total(recipe.load_balancing, recipe.router_z)
            optim.zero_grad(set_to_none=True)
            (loss + router_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            for group in optim.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate(step)
            optim.step()
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            if (step + 1) % 20 == 0 or step + 1 == end:
                speed = (step + 1 - done) * window[:, 1:].numel() / (time.perf_counter() - started)
                load = losses.counts / losses.counts.mean(-1, keepdim=True)
                progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)
                dead = int((load == 0).sum())
                with open(out / "log.csv", "a") as log:
                    log.write(f"{step + 1},{smooth:.4f},{router_loss.item():.4f},{dead},{load.max():.2f},{speed:.0f}\n")
            if (step + 1) % save_every == 0 or step + 1 == end:
                save_state(state, model, optim, step + 1)
    return model


def main() -> int:
    parser = Parser(prog="train_tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="tiny-olmoe")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what experiments.build_corpus wrote")
    parser.add_argument("--out", type=Path, help="where to write; default build/<model>")
    parser.add_argument("--steps", type=whole_number, help="default: the recipe's")
    parser.add_argument("--seed", type=whole_number, default=0, help="of the weights and of the order of the text (default: 0)")
    parser.add_argument("--save-every", type=whole_number, default=200, help="steps between saved states")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=whole_number, default=1)
    return run_command(train_and_save, parser.parse_args())


def train_and_save(args: argparse.Namespace) -> None:
    """Raises `ValueError` and `OSError` that say what to do."""
    for name in ("steps", "save_every", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    out = args.out or Path("build") / args.model
    recipe = replace(RECIPES.get(args.model, Recipe()), seed=args.seed, **({} if args.steps is None else {"steps": args.steps}))
    cfg = ARCHITECTURES[args.model].replace(device=device)
    if not (args.corpus / "train.npy").exists():
        raise FileNotFoundError(
            f"no train.npy in {args.corpus}: run python -m experiments.build_corpus --out {args.corpus} first"
        )
    tokens = np.load(args.corpus / "train.npy", mmap_mode="r", allow_pickle=False)
    model = train(cfg, recipe, tokens, out, args.save_every)
    model.tokenizer = Tokenizer.from_file(args.corpus / "tokenizer.json", eos_id=cfg.end_tokens[0], pad_id=cfg.pad_token_id)
    model.to("cpu", torch.float16).save_pretrained(out / "model")
    write_text_atomic(json.dumps({"model": args.model, **asdict(recipe)}, indent=1) + "\n", out / "model" / "recipe.json")


if __name__ == "__main__":
    sys.exit(main())
