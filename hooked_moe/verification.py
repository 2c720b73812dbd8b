"""The checks that gate a measurement (arXiv 2606.10703, appendix B), each in a form that can fail.

The paper's four checks, as stated rather than as released (there the fourth was always true), and a fifth that the paper
could not make: that the fast counterfactuals equal full forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_moe.counterfactuals import expert_effects
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.model import HookedMoE

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Nats between two ways of computing the same loss. Half precision rounds every activation; its checks are that loose."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    value: float
    threshold: float
    detail: str


def verify(model: HookedMoE, tokens: Int[Tensor, "1 pos"], seed: int = 0) -> list[Check]:
    """Run every check on one sequence of at least 8 tokens. Never raises for a failed check: look at `passed`."""
    if tokens.shape[0] != 1 or tokens.shape[1] < 8:
        raise ValueError(f"verification takes one sequence [1, pos] of at least 8 tokens, not {list(tokens.shape)}")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        return [
            _loss_matches_logits(model, tokens),
            _no_stale_state(model, tokens),
            _losses_differ(model, tokens),
            _inactive_expert_has_no_effect(model, tokens, generator),
            _effects_equal_full_forwards(model, tokens, generator),
        ]


def noise_floor(model: HookedMoE, tokens: Int[Tensor, "batch pos"]) -> float:
    """Largest change of a loss, in nats, when nothing is removed but the sequence runs alone instead of in a batch.

    Effects below it are rounding. Zero is possible: the same operations in the same order.
    """
    with torch.inference_mode():
        together = _losses(model, tokens)
        alone = torch.cat([_losses(model, row[None]) for row in tokens])
    return float((together - alone).abs().max())


def _losses(model: HookedMoE, tokens: Tensor, mask: ExpertMask | None = None) -> Tensor:
    return model(tokens, return_type="loss", loss_per_token=True, expert_mask=mask)


def _loss_matches_logits(model: HookedMoE, tokens: Tensor) -> Check:
    """1. The loss in use is the cross-entropy of the logits at the right token: recomputed in float64, by its definition."""
    log_probabilities = model(tokens)[0, :-1].double().log_softmax(-1)
    by_definition = -log_probabilities[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    engine = expert_effects(model, tokens, layers=[model.cfg.n_layers - 1]).baseline_loss[0, :-1]
    difference = float((engine.double() - by_definition).abs().max())
    threshold = LOSS_TOLERANCE[model.cfg.dtype]
    return Check("loss", difference <= threshold, difference, threshold, "largest |loss used - cross-entropy of the logits|, nats")


def _no_stale_state(model: HookedMoE, tokens: Tensor) -> Check:
    """2. A removal leaves nothing behind: the loss before and after it is the same to the bit."""
    before = _losses(model, tokens)
    everything = ExpertMask({layer: torch.zeros(1, 1, 1, dtype=torch.bool) for layer in range(model.cfg.n_layers)})
    removed = _losses(model, tokens, everything)
    after = _losses(model, tokens)
    moved = float((removed - before).abs().max())
    left = float((after - before).abs().max())
    passed = left == 0 and moved > 0
    return Check("no stale state", passed, left, 0.0, f"largest change after a removal that moved the loss by up to {moved:.3g} nats")


def _losses_differ(model: HookedMoE, tokens: Tensor) -> Check:
    """3. Different positions have different losses: a loss read at the wrong place would repeat."""
    losses = _losses(model, tokens)[0]
    share = len(losses.unique()) / len(losses)
    return Check("losses differ", share > 0.5, share, 0.5, "share of positions whose loss no other position has")


def _inactive_expert_has_no_effect(model: HookedMoE, tokens: Tensor, generator: torch.Generator) -> Check:
    """4. Removing an expert where it is not active changes no loss at all; where it is, none before that position."""
    layer, pos = _somewhere(model, tokens, generator)
    effects = expert_effects(model, tokens, layers=[layer], positions=[pos])
    active = effects.expert_index[0, 0, pos].tolist()
    inactive = next(e for e in range(model.cfg.num_experts + 1) if e not in active)
    clean = _losses(model, tokens)[0]
    threshold = 0.0
    if inactive == model.cfg.num_experts:
        nothing = 0.0  # every expert is active everywhere: there is no inactive one to remove
    else:
        nothing = float((_losses(model, tokens, ExpertMask.ablate([(layer, 0, pos, inactive)]))[0] - clean).abs().max())
    something = (_losses(model, tokens, ExpertMask.ablate([(layer, 0, pos, active[0])]))[0] - clean).abs()
    before = float(something[:pos].max()) if pos else 0.0
    passed = nothing == 0 and before == 0 and float(something[pos:].max()) > 0
    detail = f"layer {layer}, position {pos}: expert {inactive} inactive, expert {active[0]} active (moves later losses only)"
    return Check("inactive expert", passed, max(nothing, before), threshold, detail)


def _effects_equal_full_forwards(model: HookedMoE, tokens: Tensor, generator: torch.Generator, samples: int = 12) -> Check:
    """5. The fast counterfactuals equal one full forward pass per removal."""
    effects = expert_effects(model, tokens)
    clean = _losses(model, tokens)[0]
    worst = 0.0
    for _ in range(samples):
        layer, pos = _somewhere(model, tokens, generator)
        slot = int(torch.randint(model.cfg.experts_per_token, (1,), generator=generator))
        expert = int(effects.expert_index[layer, 0, pos, slot])
        full = _losses(model, tokens, ExpertMask.ablate([(layer, 0, pos, expert)]))[0, pos] - clean[pos]
        worst = max(worst, abs(float(full - effects.delta_loss[layer, 0, pos, slot])))
    threshold = LOSS_TOLERANCE[model.cfg.dtype]
    detail = f"largest |fast - full forward| over {samples} random removals, nats"
    return Check("effects are exact", worst <= threshold, worst, threshold, detail)


def _somewhere(model: HookedMoE, tokens: Tensor, generator: torch.Generator) -> tuple[int, int]:
    layer = int(torch.randint(model.cfg.n_layers, (1,), generator=generator))
    return layer, int(torch.randint(tokens.shape[1] - 1, (1,), generator=generator))
