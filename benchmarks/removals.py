"""How many expert removals take the time that one HuggingFace forward per removal would take for one.

    python benchmarks/removals.py                  # context 512, 8 layers, 64 experts top-8, d_model 256
    python benchmarks/removals.py --context 1024 --threads 1

The peer is transformers' own OLMoE with the same random weights, in the same process, with its fastest attention (sdpa) and
experts (grouped_mm): one forward per removal, as the released code of arXiv 2606.10703 does it, batch 1. Exactness is
measured along with speed: some removals are repeated by transformers, with the routing weight zeroed inside its experts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import summary, timed
from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import expert_effects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--active", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-expert", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    reference = random_reference(args)
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        model = HookedMoE.from_pretrained(directory)
    tokens = torch.randint(0, args.vocabulary, (1, args.context), generator=torch.Generator().manual_seed(0))

    def our_forward() -> None:
        with torch.inference_mode():
            model(tokens, return_type="loss", loss_per_token=True)

    candidates = {
        "transformers": lambda: hf_forward(reference, tokens),
        "hooked_moe": our_forward,
        "effects": lambda: expert_effects(model, tokens),
    }
    seconds = timed(candidates, args.repeats, warm_up=2)
    removals = (args.context - 1) * args.layers * args.active

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {vars(args)}")
    print(f"forward, transformers   {summary(seconds['transformers'])}")
    print(f"forward, hooked_moe     {summary(seconds['hooked_moe'])}")
    print(f"all {removals:,} removals    {summary(seconds['effects'])}")
    print(f"forward, ours / theirs  {median(seconds['hooked_moe']) / median(seconds['transformers']):.2f}")
    print(f"largest |difference| from transformers over 8 removals: {largest_difference(reference, model, tokens):.1e} nats")
    print(f"removals per transformers forward: {removals * median(seconds['transformers']) / median(seconds['effects']):,.0f}")


def random_reference(args: argparse.Namespace):  # type: ignore[no-untyped-def]  # a class of transformers, which has no types
    """A random OLMoE of transformers with its fastest kernels."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.d_model,
        intermediate_size=args.d_expert,
        num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 32,
        num_experts=args.experts,
        num_experts_per_tok=args.active,
        max_position_embeddings=max(4096, args.context),
        pad_token_id=None,
        eos_token_id=None,
        initializer_range=0.08,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    return OlmoeForCausalLM(config).eval()


@torch.inference_mode()
def hf_forward(reference, tokens: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The loss at every position: what one removal costs there."""
    logits = reference(tokens, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")


def largest_difference(reference, model: HookedMoE, tokens: torch.Tensor, samples: int = 8) -> float:  # type: ignore[no-untyped-def]
    effects = expert_effects(model, tokens)
    clean = hf_forward(reference, tokens)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(samples):
        layer = int(torch.randint(model.cfg.n_layers, (1,), generator=generator))
        pos = int(torch.randint(tokens.shape[1] - 1, (1,), generator=generator))
        slot = int(torch.randint(model.cfg.experts_per_token, (1,), generator=generator))
        expert = int(effects.expert_index[layer, 0, pos, slot])

        def zero(module, inputs, pos=pos, expert=expert):  # type: ignore[no-untyped-def]
            hidden, indices, weights = inputs
            weights = weights.clone()
            weights[pos, indices[pos] == expert] = 0
            return hidden, indices, weights

        handle = reference.model.layers[layer].mlp.experts.register_forward_pre_hook(zero)
        delta = (hf_forward(reference, tokens) - clean)[pos]
        handle.remove()
        worst = max(worst, abs(float(delta - effects.delta_loss[layer, 0, pos, slot])))
    return worst


if __name__ == "__main__":
    main()
