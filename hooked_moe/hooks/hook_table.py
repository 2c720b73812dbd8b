"""`HOOK_TABLE`, the one declaration of every hook point: its name, its shape, and what an edit of it does.

The model's `hook_dict`, the documentation and the tests are all held to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hooked_moe.config import HookedMoEConfig


@dataclass(frozen=True)
class Where:
    """In which layers of which models a hook point is."""

    words: str
    holds: Callable[[HookedMoEConfig, int], bool]


_EVERYWHERE = Where("every layer", lambda cfg, layer: True)
_ROUTED = Where("layers with experts", lambda cfg, layer: cfg.experts_in(layer) > 0)
_DENSE = Where("dense layers", lambda cfg, layer: cfg.experts_in(layer) == 0)
_SHARED = Where("layers with shared experts", lambda cfg, layer: cfg.experts_in(layer) > 0 and cfg.d_shared is not None)
_GATED = Where("layers with gated shared experts", lambda cfg, layer: cfg.experts_in(layer) > 0 and cfg.shared_gate)
_LATENT = Where("latent attention", lambda cfg, layer: cfg.kv_lora_rank is not None)


@dataclass(frozen=True)
class HookSpec:
    """One row of the hook table. `{i}` stands for a layer and `{e}` for an expert."""

    name: str
    shape: str
    what: str
    edit: str
    where: Where = _EVERYWHERE

    def names(self, cfg: HookedMoEConfig) -> Iterator[str]:
        """Every concrete name of this row in a model of this configuration."""
        for layer in range(cfg.n_layers) if "{i}" in self.name else (0,):
            if self.where.holds(cfg, layer):
                for expert in range(cfg.experts_in(layer)) if "{e}" in self.name else (0,):
                    yield self.name.replace("{i}", str(layer)).replace("{e}", str(expert))


_STREAM = "everything after it follows"
_B = "blocks.{i}."
HOOK_TABLE: tuple[HookSpec, ...] = (
    HookSpec("hook_embed", "batch pos d_model", "token embeddings", _STREAM),
    HookSpec(_B + "hook_resid_pre", "batch pos d_model", "residual stream before the block", _STREAM),
    HookSpec(_B + "ln1.hook_scale", "batch pos 1", "root mean square of the attention input", "rescales the normalised input"),
    HookSpec(_B + "ln1.hook_normalized", "batch pos d_model", "attention input, normalised, before its weight", "changes what attention reads"),
    HookSpec(_B + "attn.hook_kv_latent", "batch pos kv_lora_rank", "latent vector that keys and values of all heads are made of, normalised", "changes what the position is found by and passes on", _LATENT),
    HookSpec(_B + "attn.hook_q", "batch pos head d_head", "queries as projected, before norm, clipping and rotation", "changes where the position looks"),
    HookSpec(_B + "attn.hook_k", "batch pos kv_head d_head", "keys as projected, before norm, clipping and rotation", "changes what the position is found by"),
    HookSpec(_B + "attn.hook_v", "batch pos kv_head d_value", "values, before clipping", "changes what the position passes on"),
    HookSpec(_B + "attn.hook_rot_q", "batch pos head d_head", "queries as used", "changes where the position looks"),
    HookSpec(_B + "attn.hook_rot_k", "batch pos kv_head d_head", "keys as used", "changes what the position is found by"),
    HookSpec(_B + "attn.hook_attn_scores", "batch head query key", "scaled query-key products; -inf where masked", "the pattern follows"),
    HookSpec(_B + "attn.hook_pattern", "batch head query key", "attention probabilities", "values are mixed by the edited pattern"),
    HookSpec(_B + "attn.hook_z", "batch pos head d_value", "each head's mix of values", "changes the head's output"),
    HookSpec(_B + "attn.hook_result", "batch pos head d_model", "each head's output in the residual stream", "the attention output is the sum of the edited ones"),
    HookSpec(_B + "hook_attn_out", "batch pos d_model", "attention output", _STREAM),
    HookSpec(_B + "hook_resid_mid", "batch pos d_model", "residual stream between attention and experts", _STREAM),
    HookSpec(_B + "ln2.hook_scale", "batch pos 1", "root mean square of the experts' input", "rescales the normalised input"),
    HookSpec(_B + "ln2.hook_normalized", "batch pos d_model", "experts' input, normalised, before its weight", "changes what router and experts read"),
    HookSpec(_B + "mlp.hook_router_logits", "batch pos expert", "router logits, fp32", "re-routes: probabilities, selection and weights follow", _ROUTED),
    HookSpec(_B + "mlp.hook_expert_indices", "batch pos slot", "selected experts, highest probability first", "re-routes: weights are taken anew at the edited experts", _ROUTED),
    HookSpec(_B + "mlp.hook_expert_weights", "batch pos slot", "routing weights as applied", "scales each expert's contribution", _ROUTED),
    HookSpec(_B + "mlp.hook_expert_pre", "batch pos slot d_expert", "gate projection inside each active expert, before SiLU", "changes the expert's output", _ROUTED),
    HookSpec(_B + "mlp.hook_expert_pre_linear", "batch pos slot d_expert", "up projection inside each active expert", "changes the expert's output", _ROUTED),
    HookSpec(_B + "mlp.hook_expert_post", "batch pos slot d_expert", "neurons of each active expert: SiLU(gate) x up", "changes the expert's output", _ROUTED),
    HookSpec(_B + "mlp.experts.{e}.hook_out", "n d_model", 'expert e on the n tokens routed to it, before weighting; hook.ctx["tokens"] of the latest forward is [n, 2]: (batch, pos)', "changes the expert's output", _ROUTED),
    HookSpec(_B + "mlp.hook_expert_out", "batch pos slot d_model", "each active expert's output, before weighting", "changes the routed sum", _ROUTED),
    HookSpec(_B + "mlp.hook_routed_out", "batch pos d_model", "weighted sum over the active experts", _STREAM, _ROUTED),
    HookSpec(_B + "mlp.shared.hook_pre", "batch pos d_shared", "gate projection inside the shared experts, before SiLU", "changes their output", _SHARED),
    HookSpec(_B + "mlp.shared.hook_pre_linear", "batch pos d_shared", "up projection inside the shared experts", "changes their output", _SHARED),
    HookSpec(_B + "mlp.shared.hook_post", "batch pos d_shared", "neurons of the shared experts: SiLU(gate) x up", "changes their output", _SHARED),
    HookSpec(_B + "mlp.hook_shared_gate", "batch pos 1", "gate of the shared experts, after its sigmoid", "scales their output", _GATED),
    HookSpec(_B + "mlp.hook_shared_out", "batch pos d_model", "output of the shared experts, gated", _STREAM, _SHARED),
    HookSpec(_B + "mlp.hook_pre", "batch pos d_mlp", "gate projection of the dense MLP, before SiLU", "changes the MLP's output", _DENSE),
    HookSpec(_B + "mlp.hook_pre_linear", "batch pos d_mlp", "up projection of the dense MLP", "changes the MLP's output", _DENSE),
    HookSpec(_B + "mlp.hook_post", "batch pos d_mlp", "neurons of the dense MLP: SiLU(gate) x up", "changes the MLP's output", _DENSE),
    HookSpec(_B + "hook_mlp_out", "batch pos d_model", "output of routed and shared experts together, or of the dense MLP", _STREAM),
    HookSpec(_B + "hook_resid_post", "batch pos d_model", "residual stream after the block", _STREAM),
    HookSpec("ln_final.hook_scale", "batch pos 1", "root mean square of the last residual stream", "rescales the logits"),
    HookSpec("ln_final.hook_normalized", "batch pos d_model", "last residual stream, normalised, before its weight", "changes the logits"),
)  # fmt: skip


def declared_names(cfg: HookedMoEConfig) -> list[str]:
    """The name of every hook point of a model of this configuration, from `HOOK_TABLE`."""
    return [name for spec in HOOK_TABLE for name in spec.names(cfg)]


def hook_table_markdown() -> str:
    """The hook table as a Markdown table, as the documentation shows it."""
    rows = ["| name | shape | what it is | an edit | where |", "|---|---|---|---|---|"]
    for s in HOOK_TABLE:
        where = s.where.words if "{i}" in s.name else "the model"
        rows.append(f"| `{s.name}` | `[{s.shape}]` | {s.what} | {s.edit} | {where} |")
    return "\n".join(rows) + "\n"
