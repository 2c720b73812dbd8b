"""Half precision on the change: how fast all removals are, and how far off, in four forms.

    python -m benchmarks.products                                # the shipped models
    python -m benchmarks.products --random                       # random weights, d_model 1024, 4 layers of 64 experts top-8
    python -m benchmarks.products --small                        # seconds; shows that it works, measures nothing

float32 throughout; float32 with the products of removals in bfloat16 or float16, of what they change (`products="bfloat16"`); and
a model in bfloat16 throughout. The four take turns. How far off an effect is, in nats, is against float32 in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.tables import Table, count, parse, parser, show, threads
from benchmarks.timing import ratio, summary, timed
from hooked_moe import HookedMoE, load_corpus
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.counterfactuals.results import ExpertEffects

SHIPPED = ("tiny-olmoe", "tiny-qwen-moe", "tiny-deepseek-moe", "tiny-mixtral")
HEADER = [
    "model",
    "form",
    "time",
    "of float32's, by turns",
    "median effect",
    "off by, median",
    "99th percentile",
    "share of a median effect",
]


def main(argv: Sequence[str] | None = None) -> list[Table]:
    args = parse(options(), argv, roofline.SMALL | {"models": ["tiny-mixtral"]})
    with threads(args.threads):
        table = Table(
            f"All removals over {args.context} tokens, {count(args.threads, 'thread')}",
            "Less than 1 by turns: it takes less time than float32. Differences are in nats, of the effects against those in "
            "float32. Median (lowest to highest).",
            HEADER,
            [row for name, model, tokens in measured_models(args) for row in rows(name, model, tokens, args.repeats)],
        )
    show([table])
    return [table]


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    roofline.add_sizes(result)
    result.add_argument("--random", action="store_true", help="random weights of the sizes given, in place of shipped models")
    result.add_argument("--models", nargs="+", default=list(SHIPPED), help="shipped ones (default: %(default)s)")
    return result


def measured_models(args: argparse.Namespace) -> Iterator[tuple[str, HookedMoE, Tensor]]:
    """Models in float32, by name, and tokens for each."""
    if args.random:
        model = roofline.random_model(roofline.config(args, torch.float32))
        tokens = torch.randint(0, args.vocabulary, (1, args.context), generator=torch.Generator().manual_seed(0))
        yield f"random, d_model {args.d_model}, d_expert {args.d_expert}, {args.layers} layers", model, tokens
        return
    text = max((document.text for document in load_corpus("held-out").documents[:8]), key=len)
    for name in args.models:
        model = HookedMoE.from_pretrained(name)
        yield name, model, model.to_tokens(text)[:, : args.context]


def rows(name: str, model: HookedMoE, tokens: Tensor, repeats: int) -> Iterator[list[str]]:
    half = HookedMoE(model.cfg.replace(dtype=torch.bfloat16))
    half.load_state_dict(model.state_dict())
    forms: dict[str, Callable[[], ExpertEffects]] = {
        "float32": lambda: expert_effects(model, tokens),
        "products in bfloat16": lambda: expert_effects(model, tokens, products="bfloat16"),
        "products in float16": lambda: expert_effects(model, tokens, products="float16"),
        "all in bfloat16": lambda: expert_effects(half, tokens),
    }
    seconds, exact = timed(forms, repeats), forms["float32"]()
    for form, run in forms.items():
        yield [name, form, summary(seconds[form]), ratio(seconds[form], seconds["float32"]), *differences(run(), exact)]


def differences(found: ExpertEffects, exact: ExpertEffects) -> list[str]:
    """The median effect, and how far off effects are."""
    measured = exact.delta_loss.isfinite()
    effect = float(exact.delta_loss[measured].abs().median())
    off = (found.delta_loss - exact.delta_loss)[measured].abs().sort().values
    median, high = (float(off[int(share * (len(off) - 1))]) for share in (0.5, 0.99))
    return [f"{effect:.2g}", f"{median:.1e}", f"{high:.1e}", f"{median / effect:.2%}"]


if __name__ == "__main__":
    main()
