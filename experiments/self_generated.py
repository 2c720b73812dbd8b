"""Real against self-generated text: continue tiny-olmoe on each, and see what it costs and which layers carry it.

    python -m experiments.self_generated --corpus build/corpus --seeds 0 1 2     # minutes of one core for each seed

For every seed, the model samples a text of its own, as long as the real one, and is trained further on either for as many steps,
with the same optimiser and schedule. Written to --out: self_generated.csv (held-out loss of the base and of both, seed by seed,
with the paired difference over seeds on the console) and the models. The layers: `hooked-moe study grafts --a <out>/real-0/model
--b <out>/generated-0/model --readout loss`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy
import torch

from experiments.train_tiny import Recipe, train
from hooked_moe import HookedMoE, load_corpus
from hooked_moe.measurement import TokenizedCorpus
from hooked_moe.measurement.document_losses import document_losses, predicted_tokens
from hooked_moe.statistics.contrasts import detectable_t
from hooked_moe.tables import write_csv_atomic

ROWS = 64
ROW_LENGTH = 256


def generated_text(model: HookedMoE, n_tokens: int, seed: int) -> np.ndarray:
    """Tokens that the model samples from its own distribution (temperature 1), in texts of `ROW_LENGTH` that begin with the token
    between documents."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.full((ROWS, 1), model.cfg.end_tokens[0])
    rows = []
    for _ in range(-(-n_tokens // (ROWS * ROW_LENGTH))):
        with torch.inference_mode():
            options = {"generator": generator, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
            sampled = model.generate(start, ROW_LENGTH - 1, **options)
        assert isinstance(sampled, torch.Tensor)
        rows.append(sampled)
    return torch.cat(rows).flatten().numpy().astype(np.uint16)[:n_tokens]


def real_text(tokens: np.ndarray, n_tokens: int, seed: int) -> np.ndarray:
    """As long a text out of the training text, in pieces of `ROW_LENGTH` from random places: one place would be of one domain."""
    starts = np.random.default_rng(seed).integers(len(tokens) - ROW_LENGTH, size=-(-n_tokens // ROW_LENGTH))
    return np.concatenate([tokens[start : start + ROW_LENGTH] for start in starts])[:n_tokens]


def held_out_loss(model: HookedMoE) -> float:
    tokenized = TokenizedCorpus(model, load_corpus(), model.cfg.n_ctx, 256)
    return float(document_losses(model, tokenized).sum() / predicted_tokens(tokenized).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what experiments.build_corpus wrote")
    parser.add_argument("--model", default="tiny-olmoe", help="what is trained further (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/self-generated"), help="where to write (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="of 1,024 tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    base = HookedMoE.from_pretrained(args.model)
    rows = [{"seed": -1, "text": "base", "held_out_loss": held_out_loss(base)}]
    for seed in args.seeds:
        recipe = Recipe(steps=args.steps, n_ctx=128, learning_rate=1e-3, warmup_steps=20, seed=seed)
        for kind in ("real", "generated"):
            text = text_of(kind, base, args, recipe.steps * recipe.batch * recipe.n_ctx, seed)
            out = args.out / f"{kind}-{seed}"
            model = train(base.cfg, recipe, text, out, 50, HookedMoE.from_pretrained(args.model))
            model.save_pretrained(out / "model")
            rows.append({"seed": seed, "text": kind, "held_out_loss": held_out_loss(model)})
            write_csv_atomic(pa.Table.from_pylist(rows), args.out / "self_generated.csv")
    print(summary(rows))
    return 0


def text_of(kind: str, base: HookedMoE, args: argparse.Namespace, n_tokens: int, seed: int) -> np.ndarray:
    """Kept beside the models, so that a killed run resumes on the same text."""
    path = args.out / f"{kind}-{seed}.npy"
    if not path.exists():
        if kind == "real":
            text = real_text(np.load(args.corpus / "train.npy", mmap_mode="r", allow_pickle=False), n_tokens, seed)
        else:
            text = generated_text(base, n_tokens, seed)
        np.save(path, text, allow_pickle=False)
    return np.load(path, allow_pickle=False)


def summary(rows: list[dict[str, object]]) -> str:
    """The difference over seeds, which are the unit."""
    loss = {(row["text"], row["seed"]): float(str(row["held_out_loss"])) for row in rows}
    seeds = sorted({seed for _, seed in loss} - {-1}, key=str)
    difference = np.array([loss["generated", seed] - loss["real", seed] for seed in seeds])
    text = f"held-out loss: base {loss['base', -1]:.3f}; generated less real {difference.mean():+.3f} nats"
    if len(seeds) < 2:
        return f"{text} (one seed: no interval)"
    error, df = difference.std(ddof=1) / np.sqrt(len(seeds)), float(len(seeds) - 1)
    half = scipy.stats.t.ppf(0.975, df) * error
    ends = f"[{difference.mean() - half:+.3f}, {difference.mean() + half:+.3f}]"
    return f"{text} {ends} over {len(seeds)} seeds, which would find {error * detectable_t(df, 0.05):.3f} with 80% chance"


if __name__ == "__main__":
    sys.exit(main())
