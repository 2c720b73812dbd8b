"""The checks that gate a measurement (arXiv 2606.10703, appendix B), each in a form that can fail.

The paper's four checks, as stated rather than as released (there the fourth was always true), and a fifth that the paper
could not make: that the fast counterfactuals equal full forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_moe.counterfactuals import Scope, expert_effects
from hooked_moe.counterfactuals.engine.clean_run import CleanBlock
from hooked_moe.counterfactuals.engine.clean_run import as_expert_block as with_experts
from hooked_moe.counterfactuals.engine.fan_out import FanOut, fan_out
from hooked_moe.counterfactuals.engine.padding import Packed, pack
from hooked_moe.counterfactuals.engine.steps import run_to_end as finish
from hooked_moe.counterfactuals.removals import Zero
from hooked_moe.expert_mask import ExpertMask, RemovalName
from hooked_moe.transformer import Transformer

MINIMUM_TOKENS = 8
SEQUENCE_TOKENS = 64
"""Scope "sequence" is checked on the first so many tokens: it costs a forward per expert."""

EXACTNESS: dict[Scope, str] = {
    "position": "effects are exact",
    "sequence": "effects are exact, sequence-wide",
    "from_position": "effects are exact, from the position on",
}
"""The name of the last check in each scope."""

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Nats between two ways of computing the same loss. Half precision rounds every activation; its checks are that loose."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    value: float
    threshold: float
    detail: str


def verify(
    model: Transformer,
    tokens: Int[Tensor, "1 pos"],
    removal: RemovalName = "zero",
    scopes: Sequence[Scope] = ("position",),
    seed: int = 0,
) -> list[Check]:
    """Run every check on one sequence of at least 8 tokens, the last with the removal and in each of the scopes to be measured.

    Never raises for a failed check: look at `passed`.
    """
    if tokens.shape[0] != 1 or tokens.shape[1] < MINIMUM_TOKENS:
        raise ValueError(f"verification takes one sequence [1, pos] of {MINIMUM_TOKENS} tokens or more, not {list(tokens.shape)}")
    tokens = tokens.to(model.cfg.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        return [
            _loss_matches_logits(model, tokens),
            _no_stale_state(model, tokens),
            _losses_differ(model, tokens),
            _inactive_expert_has_no_effect(model, tokens, generator),
            *(_effects_equal_full_forwards(model, tokens, generator, removal, scope) for scope in scopes),
        ]


def noise_floor(model: Transformer, tokens: Int[Tensor, "batch pos"]) -> float:
    """Largest "effect", in nats, of removing nothing: through the counterfactuals of every layer, in a batch, against the
    baseline of each sequence alone.

    Effects below it are rounding. Zero is possible: the same operations in the same order.
    """

    def nothing_removed(clean: CleanBlock) -> Float[Tensor, "1 batch pos d_model"]:
        experts = with_experts(clean)
        return Zero().without(experts, torch.ones_like(experts.routing.weights, dtype=torch.bool)[None])

    def run(packed: Packed, layers: Sequence[int]) -> FanOut:
        return finish(fan_out(model, packed.tokens, packed.targets, layers, 1, nothing_removed))

    with torch.inference_mode():
        packed = pack(tokens.to(model.cfg.device), None)
        together = run(packed, model.cfg.moe_layers).losses
        alone = torch.cat([run(row, []).baseline for row in packed.split(1)])
    return float((together - alone)[..., :-1].abs().max())


def _losses(model: Transformer, tokens: Tensor, mask: ExpertMask | None = None) -> Tensor:
    return model(tokens, return_type="loss", loss_per_token=True, expert_mask=mask)


def _loss_matches_logits(model: Transformer, tokens: Tensor) -> Check:
    """1. The loss in use is the cross-entropy of the logits at the right token: recomputed in float64, by its definition."""
    log_probabilities = model(tokens)[0, :-1].double().log_softmax(-1)
    by_definition = -log_probabilities[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    engine = expert_effects(model, tokens, layers=model.cfg.moe_layers[-1:]).baseline_loss[0, :-1]
    used = torch.stack([engine, _losses(model, tokens)[0]])
    difference = float((used.double() - by_definition).abs().max())
    threshold = LOSS_TOLERANCE[model.cfg.dtype]
    return Check(
        "loss", difference <= threshold, difference, threshold, "largest |losses used - cross-entropy of the logits|, nats"
    )


def _no_stale_state(model: Transformer, tokens: Tensor) -> Check:
    """2. A removal leaves nothing behind: the loss before and after it is the same to the bit."""
    before = _losses(model, tokens)
    everything = ExpertMask({layer: torch.zeros(1, 1, 1, dtype=torch.bool) for layer in model.cfg.moe_layers})
    removed = _losses(model, tokens, everything)
    after = _losses(model, tokens)
    moved = float((removed - before).abs().max())
    left = float((after - before).abs().max())
    passed = left == 0 and moved > 0
    return Check(
        "no stale state", passed, left, 0.0, f"largest change after a removal that moved the loss by up to {moved:.3g} nats"
    )


def _losses_differ(model: Transformer, tokens: Tensor) -> Check:
    """3. Different positions have different losses: a loss read at the wrong place would repeat."""
    losses = _losses(model, tokens)[0]
    share = len(losses[~losses.isnan()].unique()) / len(losses)
    return Check("losses differ", share > 0.5, share, 0.5, "share of positions whose loss no other position has")


def _inactive_expert_has_no_effect(model: Transformer, tokens: Tensor, generator: torch.Generator) -> Check:
    """4. Removing an expert where it is not active changes no loss, to the bit; where it is, none before that position.

    Before that position, up to rounding: later tokens may be routed otherwise, and products over groups of other sizes round
    otherwise.
    """
    layer, pos = _somewhere(model, tokens, generator)
    effects = expert_effects(model, tokens, layers=[layer], positions=[pos])
    active = effects.expert_index[0, 0, pos].tolist()
    experts = model.cfg.experts_in(layer)
    inactive = next(e for e in range(experts + 1) if e not in active)
    clean = _losses(model, tokens)[0]
    if inactive == experts:
        nothing = 0.0  # every expert is active everywhere: there is no inactive one to remove
    else:
        nothing = float((_losses(model, tokens, ExpertMask.ablate([(layer, 0, pos, inactive)]))[0] - clean).abs().max())
    something = (_losses(model, tokens, ExpertMask.ablate([(layer, 0, pos, active[0])]))[0] - clean).abs()
    before = float(something[:pos].max()) if pos else 0.0
    passed = nothing == 0 and before <= LOSS_TOLERANCE[model.cfg.dtype] and float(something[pos:].max()) > 0
    other = "every expert active" if inactive == experts else f"expert {inactive} inactive"
    detail = f"layer {layer}, position {pos}: {other}; expert {active[0]} removed moves earlier losses by {before:.1g} nats"
    return Check("inactive expert", passed, nothing, 0.0, detail)


def _effects_equal_full_forwards(
    model: Transformer, tokens: Tensor, generator: torch.Generator, removal: RemovalName, scope: Scope, samples: int = 12
) -> Check:
    """5. The fast counterfactuals equal one full forward pass per removal."""
    layers = None
    if scope == "sequence":
        tokens = tokens[:, :SEQUENCE_TOKENS]
        layers = [_somewhere(model, tokens, generator)[0]]
    effects = expert_effects(model, tokens, layers, scope, removal)
    clean = _losses(model, tokens)[0]
    differences = []
    for _ in range(samples):
        layer, pos = _somewhere(model, tokens, generator)
        layer = layer if layers is None else layers[0]
        slot = int(torch.randint(model.cfg.experts_per_token, (1,), generator=generator))
        where = (effects.layers.index(layer), 0, pos, slot)
        entry = (layer, 0, pos if scope == "position" else None, int(effects.expert_index[where]))
        full = _losses(model, tokens, ExpertMask.ablate([entry], removal))[0, pos] - clean[pos]
        differences.append(abs(float(full - effects.delta_loss[where])))
    # In half precision single removals differ by the rounding of every activation; their median must still be small.
    half = model.cfg.dtype.itemsize < 4
    value = float(torch.tensor(differences).median()) if half else _largest(differences)
    threshold = LOSS_TOLERANCE[model.cfg.dtype]
    detail = f"{'median' if half else 'largest'} |fast - full forward| over {len(differences)} random removals, nats"
    return Check(EXACTNESS[scope], value <= threshold, value, threshold, detail)


def _largest(values: Sequence[float]) -> float:
    """nan if one of them is: Python's max would pass over it."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _somewhere(model: Transformer, tokens: Tensor, generator: torch.Generator) -> tuple[int, int]:
    layer = model.cfg.moe_layers[int(torch.randint(len(model.cfg.moe_layers), (1,), generator=generator))]
    return layer, int(torch.randint(tokens.shape[1] - 1, (1,), generator=generator))
