"""`HOOK_TABLE`, the one declaration of every hook point: its name, its shape, and what an edit of it does.

The model's `hook_dict`, the documentation and the tests are all held to it.
"""

from __future__ import annotations

import re
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
_SIGMOID = Where("layers with a sigmoid router", lambda cfg, layer: cfg.experts_in(layer) > 0 and cfg.router_score == "sigmoid")
_BIASED = Where("layers with a selection bias", lambda cfg, layer: cfg.experts_in(layer) > 0 and cfg.selection_bias)
_SINKS = Where("attention with sinks", lambda cfg, layer: cfg.attention_sink)
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


def _norm_rows(prefix: str, of: str, edit_of_scale: str, edit: str) -> tuple[HookSpec, ...]:
    return (
        HookSpec(prefix + "hook_scale", "batch pos 1", f"root mean square of the {of}", edit_of_scale),
        HookSpec(prefix + "hook_normalized", "batch pos d_model", f"{of}, normalised, before its weight", edit),
    )


def _mlp_rows(prefix: str, shape: str, where_in: str, of: str, edit: str, where: Where) -> tuple[HookSpec, ...]:
    return (
        HookSpec(prefix + "pre", shape, f"gate projection {where_in} {of}, before SiLU", edit, where),
        HookSpec(prefix + "pre_linear", shape, f"up projection {where_in} {of}", edit, where),
        HookSpec(prefix + "post", shape, f"neurons of {of}: SiLU(gate) x up", edit, where),
    )


_B, _ATTN, _MLP = "blocks.{i}.", "blocks.{i}.attn.", "blocks.{i}.mlp."
_STREAM = "batch pos d_model"
_FOLLOWS = "everything after it follows"
_LOOKS, _FOUND = "changes where the position looks", "changes what the position is found by"
_RESCALES, _EXPERT, _SHARED_OUT = "rescales the normalised input", "changes the expert's output", "changes their output"
HOOK_TABLE: tuple[HookSpec, ...] = (
    HookSpec("hook_embed", _STREAM, "token embeddings", _FOLLOWS),
    HookSpec(_B + "hook_resid_pre", _STREAM, "residual stream before the block", _FOLLOWS),
    *_norm_rows(_B + "ln1.", "attention input", _RESCALES, "changes what attention reads"),
    HookSpec(_ATTN + "hook_kv_latent", "batch pos kv_lora_rank",
             "latent vector that keys and values of all heads are made of, normalised", _FOUND + " and passes on", _LATENT),
    HookSpec(_ATTN + "hook_q", "batch pos head d_head",
             "queries as projected, before norm, clipping and rotation", _LOOKS),
    HookSpec(_ATTN + "hook_k", "batch pos kv_head d_head",
             "keys as projected, before norm, clipping and rotation", _FOUND),
    HookSpec(_ATTN + "hook_v", "batch pos kv_head d_value",
             "values, before clipping", "changes what the position passes on"),
    HookSpec(_ATTN + "hook_rot_q", "batch pos head d_head", "queries as used", _LOOKS),
    HookSpec(_ATTN + "hook_rot_k", "batch pos kv_head d_head", "keys as used", _FOUND),
    HookSpec(_ATTN + "hook_attn_sink", "batch pos head",
             "logit of each head that takes a share of its attention", "the pattern follows", _SINKS),
    HookSpec(_ATTN + "hook_attn_scores", "batch head query key",
             "scaled query-key products; -inf where masked", "the pattern follows"),
    HookSpec(_ATTN + "hook_pattern", "batch head query key",
             "attention probabilities; with sinks, they sum to less than one", "values are mixed by the edited pattern"),
    HookSpec(_ATTN + "hook_z", "batch pos head d_value", "each head's mix of values", "changes the head's output"),
    HookSpec(_ATTN + "hook_result", "batch pos head d_model",
             "each head's output in the residual stream", "the attention output is the sum of the edited ones"),
    HookSpec(_B + "hook_attn_out", _STREAM, "attention output", _FOLLOWS),
    HookSpec(_B + "hook_resid_mid", _STREAM, "residual stream between attention and experts", _FOLLOWS),
    *_norm_rows(_B + "ln2.", "experts' input", _RESCALES, "changes what router and experts read"),
    HookSpec(_MLP + "hook_router_logits", "batch pos expert",
             "router logits, fp32", "re-routes: probabilities, selection and weights follow", _ROUTED),
    HookSpec(_MLP + "hook_router_scores", "batch pos expert",
             "sigmoid of the logits", "re-routes: selection and weights follow", _SIGMOID),
    HookSpec(_MLP + "hook_selection_bias", "batch pos expert",
             "added to the scores for the selection alone", "re-routes: weights are taken at the experts then selected", _BIASED),
    HookSpec(_MLP + "hook_expert_indices", "batch pos slot", "selected experts, highest probability or score first",
             "re-routes: weights are taken again at the edited experts", _ROUTED),
    HookSpec(_MLP + "hook_expert_weights", "batch pos slot",
             "routing weights as applied", "scales each expert's contribution", _ROUTED),
    *_mlp_rows(_MLP + "hook_expert_", "batch pos slot d_expert", "inside", "each active expert", _EXPERT, _ROUTED),
    HookSpec(_MLP + "experts.{e}.hook_out", "n d_model",
             "expert e on the n tokens routed to it, before weighting; "
             'hook.ctx["tokens"] of the latest forward is [n, 2]: (batch, pos)', _EXPERT, _ROUTED),
    HookSpec(_MLP + "hook_expert_out", "batch pos slot d_model",
             "each active expert's output, before weighting", "changes the routed sum", _ROUTED),
    HookSpec(_MLP + "hook_routed_out", _STREAM, "weighted sum over the active experts", _FOLLOWS, _ROUTED),
    *_mlp_rows(_MLP + "shared.hook_", "batch pos d_shared", "inside", "the shared experts", _SHARED_OUT, _SHARED),
    HookSpec(_MLP + "hook_shared_gate", "batch pos 1",
             "gate of the shared experts, after its sigmoid", "scales their output", _GATED),
    HookSpec(_MLP + "hook_shared_out", _STREAM, "output of the shared experts, gated", _FOLLOWS, _SHARED),
    *_mlp_rows(_MLP + "hook_", "batch pos d_mlp", "of", "the dense MLP", "changes the MLP's output", _DENSE),
    HookSpec(_B + "hook_mlp_out", _STREAM,
             "output of routed and shared experts together, or of the dense MLP", _FOLLOWS),
    HookSpec(_B + "hook_resid_post", _STREAM, "residual stream after the block", _FOLLOWS),
    *_norm_rows("ln_final.", "last residual stream", "rescales the logits", "changes the logits"),
)  # fmt: skip


def declared_names(cfg: HookedMoEConfig) -> list[str]:
    """The name of every hook point of a model of this configuration, from `HOOK_TABLE`."""
    return [name for spec in HOOK_TABLE for name in spec.names(cfg)]


_AXES = {spec.name: tuple(spec.shape.split()) for spec in HOOK_TABLE}


def axes_of(name: str) -> tuple[str, ...]:
    """The axes of a hook point's activation, or of its gradient, which a cache calls "..._grad"; none for an unknown name."""
    row = re.sub(r"\bexperts\.\d+", "experts.{e}", re.sub(r"\bblocks\.\d+", "blocks.{i}", name))
    return _AXES.get(row.removesuffix("_grad"), ())


def hook_table_markdown() -> str:
    """The hook table as a Markdown table, as the documentation shows it."""
    rows = ["| name | shape | what it is | an edit | where |", "|---|---|---|---|---|"]
    for s in HOOK_TABLE:
        where = s.where.words if "{i}" in s.name else "the model"
        rows.append(f"| `{s.name}` | `[{s.shape}]` | {s.what} | {s.edit} | {where} |")
    return "\n".join(rows) + "\n"
