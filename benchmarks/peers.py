"""The same random OLMoE in transformers, in TransformerLens and in hooked_moe, and how each of them removes experts."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from hooked_moe import HookedMoE

FAST = ("sdpa", "grouped_mm")
"""Attention and experts of transformers by its fastest kernels on a CPU."""
EAGER = ("eager", "eager")
SMALL = {"layers": 2, "experts": 8, "active": 2, "d_model": 64, "d_expert": 32, "vocabulary": 128, "repeats": 2}


def add_model_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--active", type=int, default=8)
    options.add_argument("--d-model", type=int, default=256, help="in heads of 32 (default: %(default)s)")
    options.add_argument("--d-expert", type=int, default=128)
    options.add_argument("--vocabulary", type=int, default=4096)


def model_in_words(args: argparse.Namespace) -> str:
    return f"{args.layers} layers, {args.experts} experts top-{args.active}, d_model {args.d_model}, d_expert {args.d_expert}"


def random_olmoe(args: argparse.Namespace, context: int) -> Any:
    """Of transformers, in float32."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.d_model,
        intermediate_size=args.d_expert,
        num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 32,
        num_experts=args.experts,
        num_experts_per_tok=args.active,
        max_position_embeddings=max(4096, context),
        pad_token_id=None,
        eos_token_id=None,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    return with_kernels(OlmoeForCausalLM(config).eval(), FAST)


def with_kernels(reference: Any, kernels: tuple[str, str]) -> Any:
    """The same model, with other kernels from now on."""
    reference.config._attn_implementation, reference.config._experts_implementation = kernels
    return reference


def ours(reference: Any, dtype: torch.dtype = torch.float32) -> HookedMoE:
    """The same weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        return HookedMoE.from_pretrained(directory, dtype=dtype)


def bridge_of(reference: Any) -> Any:
    """TransformerLens 4's TransformerBridge around a copy of the model: it runs attention eagerly, and experts as they were."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    own = copy.deepcopy(reference)
    return build_bridge_from_module(own, "OlmoeForCausalLM", hf_config=own.config)


def installed(package: str) -> str | None:
    """Its version; None if it is not there."""
    return version(package) if importlib.util.find_spec(package.replace("-", "_")) else None


# --- removals ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removals:
    """Experts of one layer, each at one position: the i-th is removed in row i of a batch."""

    layer: int
    positions: Tensor
    experts: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def places(self, length: int) -> Tensor:
        """Their tokens in the batch, rows one after another."""
        return torch.arange(len(self)) * length + self.positions


LossesWithout = Callable[[Tensor, Removals], Tensor]
"""Losses in nats [removal] of one sequence [1, pos], each at its own position and without its own expert, in one forward."""


def by_transformers(reference: Any) -> LossesWithout:
    """The routing weight zeroed on its way into the experts."""

    def run(tokens: Tensor, removals: Removals) -> Tensor:
        places = removals.places(tokens.shape[1])

        def zero(module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            hidden, indices, weights = inputs
            weights = weights.clone()
            weights[places] = weights[places].masked_fill(indices[places] == removals.experts[:, None], 0)
            return hidden, indices, weights

        handle = reference.model.layers[removals.layer].mlp.experts.register_forward_pre_hook(zero)
        try:
            return losses_at(forward(reference, tokens.expand(len(removals), -1)), tokens, removals.positions)
        finally:
            handle.remove()

    return run


def by_transformer_lens(bridge: Any) -> LossesWithout:
    """The routing weight zeroed at the hook point of the router."""

    def run(tokens: Tensor, removals: Removals) -> Tensor:
        places = removals.places(tokens.shape[1])

        def zero(weights: Tensor, hook: Any) -> Tensor:  # [batch * pos, expert]
            weights = weights.clone()
            weights[places, removals.experts] = 0
            return weights

        hooks = [(f"blocks.{removals.layer}.mlp.gate.hook_expert_weights", zero)]
        with torch.inference_mode():
            logits = bridge.run_with_hooks(tokens.expand(len(removals), -1), fwd_hooks=hooks)
        return losses_at(logits, tokens, removals.positions)

    return run


def by_nnsight(reference: Any) -> LossesWithout:
    """The routing weight zeroed on its way into the experts, one invoke of a trace for each removal."""
    from nnsight import NNsight, save

    class RowsOfInvokes(NNsight):
        """Puts the tokens of all invokes into one batch."""

        def _batch_size(self, *inputs: Any, **options: Any) -> int:
            return len(inputs[0]) if inputs else 0

        def _batch(self, invokes: list[tuple[Any, Any]], fn: Any) -> tuple[Any, Any]:
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), {"use_cache": False}

    model = RowsOfInvokes(reference)

    @torch.inference_mode()
    def run(tokens: Tensor, removals: Removals) -> Tensor:
        pairs = list(zip(removals.places(tokens.shape[1]).tolist(), removals.experts.tolist(), strict=True))
        with model.trace() as tracer:
            rows: Any = save([])
            for place, expert in pairs:
                with tracer.invoke(tokens):
                    _, indices, weights = model.model.layers[removals.layer].mlp.experts.inputs[0]
                    weights[place] = weights[place].masked_fill(indices[place] == expert, 0)
                    rows.append(model.output.logits)
        return losses_at(torch.cat(rows), tokens, removals.positions)

    return run


@torch.inference_mode()
def forward(reference: Any, tokens: Tensor) -> Tensor:
    """Logits of a model of transformers."""
    return reference(tokens, use_cache=False).logits


@torch.inference_mode()
def generate(reference: Any, prompts: Tensor, new: int) -> Tensor:
    """The prompts and what transformers generates after them, greedily, never at an end."""
    mask = torch.ones_like(prompts)
    return reference.generate(
        prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )


def losses_at(logits: Tensor, tokens: Tensor, positions: Sequence[int] | Tensor) -> Tensor:
    """Of row i of the logits at the i-th position."""
    at = torch.as_tensor(positions)
    return torch.nn.functional.cross_entropy(logits[torch.arange(len(at)), at].float(), tokens[0, at + 1], reduction="none")
