"""Hook points: named places in the forward pass where an activation can be read, replaced or differentiated.

`HOOK_TABLE` is the one declaration of every hook point: its name, its shape, and what an edit of it does. The model's
`hook_dict`, the documentation and the tests are all held to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hooked_moe.config import HookedMoEConfig
from hooked_moe.kernels.alignment import begins_aligned


class HookFunction(Protocol):
    """Called with the activation and its `HookPoint`; returns a replacement of the same shape and dtype, or None."""

    def __call__(self, activation: Tensor, /, *, hook: HookPoint) -> Tensor | None: ...


class UnknownNameError(ValueError, KeyError):
    """A name that does not exist, with the nearest ones that do."""

    def __str__(self) -> str:
        return str(self.args[0])


def unknown_name(kind: str, name: str, known: Iterable[str], advice: str = "") -> UnknownNameError:
    """An `UnknownNameError` that suggests the nearest known names."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    suggestion = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return UnknownNameError(f"unknown {kind} {name!r}{suggestion}{' ' + advice if advice else ''}")


@dataclass(eq=False)
class _Registered:
    fn: Callable[..., Any]
    permanent: bool = False
    reads_only: bool = False


class HookPoint(nn.Module):
    """An identity that calls its hooks on what passes through it; without hooks it costs one attribute test."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.ctx: dict[str, Any] = {}
        """Facts about the activation that its tensor does not hold, and a place for hooks to keep what they like."""
        self.fwd_hooks: list[_Registered] = []
        self.bwd_hooks: list[_Registered] = []

    @property
    def active(self) -> bool:
        """Whether any hook is attached. Layouts that only a hook would need are built only then."""
        return bool(self.fwd_hooks or self.bwd_hooks)

    @property
    def may_edit(self) -> bool:
        """Whether a hook may change the activation or its gradient. What is only looked at need not be computed from."""
        return bool(self.bwd_hooks) or not all(registered.reads_only for registered in self.fwd_hooks)

    def add_hook(
        self, fn: Callable[..., Any], dir: str = "fwd", is_permanent: bool = False, reads_only: bool = False
    ) -> _Registered:
        """Attach `fn(activation, hook=self)` (dir "fwd") or `fn(gradient, hook=self)` (dir "bwd"); later hooks see earlier edits.

        `reads_only` promises that `fn` neither writes to the activation nor returns another: it is not copied for it then, and
        the forward pass goes on by its fused way around the activation.
        """
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"dir must be 'fwd' or 'bwd', not {dir!r}")
        registered = _Registered(fn, is_permanent, reads_only)
        (self.fwd_hooks if dir == "fwd" else self.bwd_hooks).append(registered)
        return registered

    def remove(self, registered: _Registered) -> None:
        self.fwd_hooks = [r for r in self.fwd_hooks if r is not registered]
        self.bwd_hooks = [r for r in self.bwd_hooks if r is not registered]

    def reset(self, including_permanent: bool = False) -> None:
        self.fwd_hooks = [r for r in self.fwd_hooks if r.permanent and not including_permanent]
        self.bwd_hooks = [r for r in self.bwd_hooks if r.permanent and not including_permanent]
        self.ctx.clear()

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fwd_hooks or self.bwd_hooks):
            return x
        if not all(registered.reads_only for registered in self.fwd_hooks):
            x = x.clone()  # hooks may write in place, and hook points share memory with each other and with the caller
        for registered in self.fwd_hooks:
            edited = registered.fn(x, hook=self)
            if edited is not None:
                x = laid_out_like(x, self.checked(edited, x))
        if self.bwd_hooks:
            x = self._watch_gradient(x)
        return x

    def checked(self, edited: Any, original: Tensor) -> Tensor:
        """What a hook returned, if it can stand in for the activation."""
        if not isinstance(edited, Tensor):
            raise TypeError(f"the hook on {self.name} returned a {type(edited).__name__}; return a tensor or None")
        if edited.shape != original.shape:
            raise ValueError(f"the hook on {self.name} returned shape {list(edited.shape)}; expected {list(original.shape)}")
        if edited.dtype != original.dtype:
            raise TypeError(
                f"the hook on {self.name} returned {edited.dtype}; expected {original.dtype}: convert with .to(activation)"
            )
        return edited

    def _watch_gradient(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            raise RuntimeError(
                f"a backward hook on {self.name} cannot fire: no gradient flows here. Run with gradients enabled on a model "
                "whose parameters (or whose edited activations) require them."
            )
        x = x.view_as(x)  # a tensor of its own, so that the gradient seen is that of this place alone

        for registered in self.bwd_hooks:

            def on_gradient(gradient: Tensor, fn: Callable[..., Any] = registered.fn) -> Tensor | None:
                edited = fn(gradient, hook=self)
                return None if edited is None else self.checked(edited, gradient)

            x.register_hook(on_gradient)
        return x

    def layer(self) -> int:
        """The block this hook point is in; `ValueError` outside the blocks."""
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise ValueError(f"{self.name} is not in a block")
        return int(parts[1])

    def extra_repr(self) -> str:
        return self.name


def laid_out_like(original: Tensor, edited: Tensor) -> Tensor:
    """The edited activation in memory of the original's layout, copied there if it is in another: a view of a transposed tensor,
    say, or a slice that begins in the middle of one.

    The last bits of products depend on how their matrices lie in memory, and are to depend on nothing but the edit.
    """
    if edited.stride() == original.stride() and begins_aligned(edited):
        return edited
    return edited.new_empty_strided(original.shape, original.stride()).copy_(edited)


def keep_unedited_bits(spelled_out: Tensor, fused: Tensor, same: Tensor) -> Tensor:
    """The spelled-out result where a hook changed something, and elsewhere the fused one, to the bit.

    A hook that changes nothing then changes no bit of the output. Gradients always flow through the spelled-out computation,
    which holds the hooked activation: `spelled_out - spelled_out.detach()` is zero in value only.
    """
    return torch.where(same, fused.detach() + (spelled_out - spelled_out.detach()), spelled_out)


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
