"""How much work counterfactuals are, counted from a config: floating-point operations of matrix products, parameters, bytes.

A product [n, i] x [i, o] is 2 n i o operations. Norms, activations, softmax and the weighting of expert outputs are no matrix
products and not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from hooked_moe.config import HookedMoEConfig

PROJECTIONS, ATTENTION, ROUTING = "projections", "prefix attention", "routing and grouping"
EXPERTS, UNEMBEDDING = "expert products", "unembedding"


def removal_work(cfg: HookedMoEConfig, length: int, layers: Sequence[int]) -> dict[str, float]:
    """Operations of `expert_effects` over one text of `length` tokens, all its positions, by phase.

    With K active experts:

    - Block b runs on the clean tokens, and on K times as many variant tokens for each measured layer before b.
    - Token t attends to the keys up to its own, of a sliding window at most: each pair takes one product of a query and a key and
      one of a weight and a value in every head.
    - The router runs once more on the clean tokens of a measured layer, to note the probabilities of all experts.
    - Losses are of all positions but the last, of the clean run and of K variants for each measured layer. The clean run is
      unembedded once more for its variants to be compared with, and its probabilities are multiplied with the unembedding.
    """
    runs = [1 + cfg.experts_per_token * sum(layer < block for layer in layers) for block in range(cfg.n_layers)]
    by_block = [block_work(cfg, length, block) for block in range(cfg.n_layers)]
    work = {
        phase: sum(run * block[phase] for run, block in zip(runs, by_block, strict=True))
        for phase in (PROJECTIONS, ATTENTION, ROUTING, EXPERTS)
    }
    work[ROUTING] += sum(by_block[layer][ROUTING] for layer in layers)
    ends = (3 + cfg.experts_per_token * len(layers)) * (length - 1)
    return work | {UNEMBEDDING: ends * 2.0 * cfg.d_model * cfg.d_vocab}


def forward_work(cfg: HookedMoEConfig, length: int) -> float:
    """Operations of one forward pass, to the losses of all positions but the last."""
    blocks = sum(sum(block_work(cfg, length, block).values()) for block in range(cfg.n_layers))
    return blocks + (length - 1) * 2.0 * cfg.d_model * cfg.d_vocab


def first_order_work(cfg: HookedMoEConfig, length: int) -> float:
    """Operations of `first_order_effects` at most: the pass up, each block once more on the way down, and its gradient with
    respect to its input, which takes as many products as the block."""
    return 3 * forward_work(cfg, length)


def block_work(cfg: HookedMoEConfig, length: int, block: int) -> dict[str, float]:
    """Operations of one block over one text, by phase."""
    return {
        PROJECTIONS: length * 2.0 * projection_weights(cfg),
        ATTENTION: 2.0 * cfg.n_heads * (cfg.d_head + cfg.value_width) * attended_pairs(length, cfg.window_of(block)),
        ROUTING: length * 2.0 * cfg.d_model * cfg.experts_in(block),
        EXPERTS: length * 2.0 * active_weights(cfg, block),
    }


def attended_pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself among them."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def projection_weights(cfg: HookedMoEConfig) -> int:
    """Weights that a token meets on its way into attention and out of it."""
    out = cfg.n_heads * cfg.value_width * cfg.d_model
    if cfg.kv_lora_rank is None:
        return out + cfg.d_model * (cfg.n_heads * cfg.d_head + cfg.n_key_value_heads * (cfg.d_head + cfg.value_width))
    query = cfg.n_heads * cfg.d_head * (cfg.q_lora_rank or cfg.d_model) + cfg.d_model * (cfg.q_lora_rank or 0)
    down = cfg.d_model * (cfg.kv_lora_rank + cfg.rotary_width)
    up = cfg.kv_lora_rank * cfg.n_heads * (cfg.d_head - cfg.rotary_width + cfg.value_width)
    return out + query + down + up


def active_weights(cfg: HookedMoEConfig, layer: int) -> int:
    """Weights of the experts that serve a token, shared ones with their gate among them; or of the dense MLP."""
    if not cfg.experts_in(layer):
        return 3 * cfg.d_model * (cfg.d_mlp or 0)
    return 3 * cfg.d_model * (cfg.experts_per_token * cfg.d_expert + (cfg.d_shared or 0)) + cfg.d_model * cfg.shared_gate


def block_parameters(cfg: HookedMoEConfig, layer: int) -> int:
    """All parameters of a block but for norms, biases and sinks, which are some thousandths of a percent."""
    experts = cfg.experts_in(layer)
    if not experts:
        return projection_weights(cfg) + active_weights(cfg, layer)
    inactive = 3 * cfg.d_model * cfg.d_expert * (experts - cfg.experts_per_token)
    return projection_weights(cfg) + active_weights(cfg, layer) + inactive + cfg.d_model * experts


def expert_parameters(cfg: HookedMoEConfig, layer: int) -> int:
    """Of those, the weights of all routed experts."""
    return 3 * cfg.d_model * cfg.d_expert * cfg.experts_in(layer)


def outer_parameters(cfg: HookedMoEConfig) -> int:
    """Embedding and unembedding."""
    return cfg.d_vocab * cfg.d_model * (1 if cfg.tie_word_embeddings else 2)


def parameters(cfg: HookedMoEConfig) -> int:
    """Parameters of a model, without norms, biases and sinks."""
    return outer_parameters(cfg) + sum(block_parameters(cfg, layer) for layer in range(cfg.n_layers))
