"""The architecture of a mixture-of-experts language model as plain values.

Families differ only in the values here and in a weight map (`weights_conversion/`); no module asks which family it serves.
Names follow TransformerLens where it has them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hooked_moe.checks import as_int_or_none, described, quoted, require_between, whole_numbers

MOST = {"n_layers": 4_096, "num_experts": 16_384}
"""Every layer and every expert takes objects of its own, before there is a weight: bounds far beyond the families here."""


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): rotary positions for contexts `factor` times longer than `original_ctx`.

    Fast rotations stay, slow ones slow down by `factor`, and those that turn between `beta_slow` and `beta_fast` times within
    `original_ctx` tokens lie in between.
    """

    factor: float
    original_ctx: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    """DeepSeek-V2's split of YaRN's temperature: rotations are scaled by `m(mscale) / m(mscale_all_dim)` and attention scores by
    `m(mscale_all_dim)^2`, where m(x) = 0.1 x ln(factor) + 1. The defaults are YaRN's own: all of it in the rotations."""

    truncate: bool = True
    """Whether the range in between is widened to whole pairs of coordinates; not in gpt-oss."""

    def __post_init__(self) -> None:
        require_between(self, 0, 1e9, "factor", "original_ctx", "beta_fast", "mscale", "mscale_all_dim")
        if self.factor < 1 or self.original_ctx < 1 or self.beta_fast < self.beta_slow or self.beta_slow <= 0:
            raise ValueError(f"factor and original_ctx must be at least 1, and beta_fast >= beta_slow > 0, not as in {self}")

    @property
    def rotation_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by, besides the usual scale."""
        return self._temperature(self.mscale_all_dim) ** 2

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """The experts' activation in gpt-oss (arXiv 2508.10925): `(u + 1) g sigmoid(alpha g)`, where `g = min(gate, limit)` and
    `u = clamp(up, -limit, limit)`."""

    limit: float
    alpha: float

    def __post_init__(self) -> None:
        if self.limit <= 0 or self.alpha <= 0:
            raise ValueError(f"limit and alpha must be positive, not as in {self}")


@dataclass(frozen=True, kw_only=True)
class HookedMoEConfig:
    """Shapes and options of a `HookedMoE`. Raises `ValueError` for values that cannot describe a model."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    """Longest context the model was trained for, in tokens."""

    n_heads: int
    n_key_value_heads: int
    """Smaller than `n_heads` for grouped-query attention: each key/value head serves `n_heads / n_key_value_heads` queries."""
    d_head: int
    """Width of one head's query and key."""
    rotary_base: float = 10_000.0
    rotary_interleaved: bool = False
    """Which coordinates turn together: j with j + 1 (True), or j with j + half the rotated width, as in Llama."""
    rotary_scaling: YarnScaling | None = None
    d_rotary: int | None = None
    """How many coordinates of a head carry the position: the first ones, or in latent attention the last ones; None: all."""
    qk_norm: Literal["full", "head", None] = None
    """An RMSNorm of q and of k before rotation: over the whole projected width (OLMoE), or over each head (Qwen3)."""
    clip_qkv: float | None = None
    """Clamp q, k and v to [-clip, clip], after the norm."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether the attention's output projection has a bias."""

    attention_sink: bool = False
    """A learned logit of each head in the denominator of its softmax (gpt-oss): attention that goes to no token."""
    windowed_layers: tuple[int, ...] = ()
    """Layers in which a token sees only the last positions up to its own ..."""
    sliding_window: int | None = None
    """... and how many these are, its own among them."""

    kv_lora_rank: int | None = None
    """Latent attention (DeepSeek-V2): keys and values of all heads are projected from one vector of this width per token."""
    q_lora_rank: int | None = None
    """Latent attention: queries likewise; None: straight from the residual stream."""
    d_value: int | None = None
    """Latent attention: width of one head's value; None: `d_head`."""

    num_experts: int
    """Routed experts of a layer; `experts_by_layer` where layers differ."""
    experts_per_token: int
    d_expert: int
    """Hidden width of one expert."""
    experts_by_layer: tuple[int, ...] | None = None
    """Routed experts of every layer, 0 in dense ones: only where `HookedMoE.remove_experts` left unequal numbers."""
    norm_topk_prob: bool = False
    """Whether the routing weights of the selected experts are rescaled to sum to one."""
    routed_scaling_factor: float = 1.0
    """What routing weights are multiplied by at last."""
    n_expert_groups: int = 1
    """Experts stand in this many groups of equal size (DeepSeek-V2's devices) ..."""
    groups_per_token: int = 1
    """... and a token goes only to experts of the groups with the best score."""
    router_bias: bool = False
    """A bias of the router's logits (gpt-oss)."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores: "sigmoid" in DeepSeek-V3."""
    selection_bias: bool = False
    """A bias of each expert's score for the selection only, which the weights leave out (DeepSeek-V3); in float32 or wider."""
    group_score: Literal["max", "top2"] = "max"
    """A group's score: that of its best expert, or the sum of its two best (DeepSeek-V3)."""
    expert_bias: bool = False
    """Whether the experts' projections have biases (gpt-oss)."""
    clamped_swiglu: ClampedSwiGLU | None = None
    """The experts' activation; None: SwiGLU, `silu(gate) * up`."""
    d_shared: int | None = None
    """Width of the shared experts together, which serve every token; None: there are none."""
    shared_gate: bool = False
    """Whether the shared experts' output is multiplied by `sigmoid(x w)` (Qwen1.5-MoE)."""

    dense_layers: tuple[int, ...] = ()
    """Layers with one ordinary MLP in place of experts."""
    d_mlp: int | None = None
    """Hidden width of the dense layers' MLP."""

    eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    model_type: str = "olmoe"
    """Names the module of `weights_conversion` that reads and writes this architecture."""
    model_name: str = "custom"
    revision: str | None = None
    """The hub commit the weights came from; None for local weights."""
    bos_token_id: int | None = None
    """Put before every text when the family's tokenizer does so; None where it does not."""
    eos_token_id: int | tuple[int, ...] | None = None
    """The token that ends a text; several, where any of them does."""
    pad_token_id: int | None = None
    dtype: torch.dtype = torch.float32
    store: torch.dtype | None = None
    """The narrower dtype in which the weights of routed experts are kept, one expert's at a time widened to `dtype` for its
    products; None: they are kept in `dtype`."""
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        sizes = ("n_layers", "d_model", "d_vocab", "n_ctx", "n_heads", "n_key_value_heads", "d_head")
        optional = ("kv_lora_rank", "q_lora_rank", "d_rotary", "d_value", "d_shared", "d_mlp", "sliding_window")
        routing = ("num_experts", "experts_per_token", "d_expert", "n_expert_groups", "groups_per_token")
        for name in (*sizes, *routing, *(name for name in optional if getattr(self, name) is not None)):
            number, most = as_int_or_none(getattr(self, name)), MOST.get(name, 2**31 - 1)
            if number is None or not 1 <= number <= most:
                raise ValueError(
                    f"{name} must be a positive whole number, not {described(getattr(self, name))}; {most:,} at most"
                )
            object.__setattr__(self, name, number)
        require_between(self, 0, 1e6, "eps", "initializer_range", "routed_scaling_factor", "clip_qkv")
        require_between(self, 2, 1e15, "rotary_base")
        if self.store is not None and self.store.itemsize >= self.dtype.itemsize:
            raise ValueError(f"store ({self.store}) must be narrower than dtype ({self.dtype}), or None")
        self._check_attention()
        self._check_experts()

    def _check_attention(self) -> None:
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_key_value_heads ({self.n_key_value_heads})")
        rotated = "d_head" if self.d_rotary is None else "d_rotary"
        if self.rotary_width % 2:
            raise ValueError(f"{rotated} must be even, for positions rotate pairs of coordinates, not {getattr(self, rotated)}")
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise ValueError(f"clip_qkv must be positive or None, not {self.clip_qkv}")
        if self.qk_norm not in ("full", "head", None):
            raise ValueError(f"qk_norm must be 'full', 'head' or None, not {quoted(self.qk_norm)}")
        self._check_layers("windowed_layers", "sliding_window", "the window of windowed layers")
        if self.rotary_width > self.d_head:
            raise ValueError(f"d_rotary ({self.d_rotary}) cannot exceed d_head ({self.d_head})")
        if self.kv_lora_rank is None:
            latent_only = [name for name in ("q_lora_rank", "d_value") if getattr(self, name) is not None]
            if latent_only:
                raise ValueError(f"{', '.join(latent_only)} go with latent attention, which kv_lora_rank makes")
        else:
            if self.rotary_width >= self.d_head:
                raise ValueError(f"d_rotary ({self.d_rotary}) must be less than d_head ({self.d_head}) in latent attention")
            if self.n_key_value_heads != self.n_heads or self.qk_norm or self.clip_qkv or self.qkv_bias:
                raise ValueError("latent attention has a key and value head for every query head, and no norm, clipping or bias")

    def _check_experts(self) -> None:
        self._check_layers("dense_layers", "d_mlp", "the width of dense layers")
        if not self.moe_layers:
            raise ValueError("every layer is dense: there are no experts")
        if self.experts_by_layer is not None and len(self.experts_by_layer) != self.n_layers:
            raise ValueError(f"experts_by_layer must have {self.n_layers} entries, not {len(self.experts_by_layer)}")
        for layer in range(self.n_layers):
            if (self.experts_in(layer) == 0) != (layer in self.dense_layers):
                raise ValueError(
                    f"layer {layer} has {self.experts_in(layer)} experts, and dense_layers are {quoted(self.dense_layers)}"
                )
        fewest = min(self.experts_in(layer) for layer in self.moe_layers)
        if self.experts_per_token > fewest:
            raise ValueError(f"experts_per_token ({self.experts_per_token}) cannot exceed num_experts ({fewest})")
        if self.groups_per_token > self.n_expert_groups:
            raise ValueError(f"groups_per_token ({self.groups_per_token}) cannot exceed n_expert_groups ({self.n_expert_groups})")
        if self.n_expert_groups > 1:
            if self.num_experts % self.n_expert_groups or self.experts_by_layer is not None:
                raise ValueError(f"{self.n_expert_groups} groups of equal size cannot hold {self.num_experts} experts")
            reachable = self.num_experts // self.n_expert_groups * self.groups_per_token
            if self.experts_per_token > reachable:
                raise ValueError(
                    f"experts_per_token ({self.experts_per_token}) cannot exceed the {reachable} of a token's groups"
                )
        if self.router_score not in ("softmax", "sigmoid"):
            raise ValueError(f"router_score must be 'softmax' or 'sigmoid', not {quoted(self.router_score)}")
        if self.group_score not in ("max", "top2"):
            raise ValueError(f"group_score must be 'max' or 'top2', not {quoted(self.group_score)}")
        if self.group_score == "top2" and 1 < self.n_expert_groups == self.num_experts:
            raise ValueError("group_score='top2' needs two experts in every group")
        if self.shared_gate and self.d_shared is None:
            raise ValueError("shared_gate needs shared experts: set d_shared")

    def _check_layers(self, layers: str, size: str, meaning: str) -> None:
        """A tuple of layers, and the size that it goes with."""
        given, width = getattr(self, layers), getattr(self, size)
        if given != tuple(layer for layer in range(self.n_layers) if layer in given):
            raise ValueError(f"{layers} must be ascending layers from 0 to {self.n_layers - 1}, not {quoted(given)}")
        if bool(given) != (width is not None):
            raise ValueError(f"{size} is {meaning}: got {layers}={quoted(given)}, {size}={width}")

    normalization_type: ClassVar[str] = "RMS"
    attn_only: ClassVar[bool] = False
    """These two for TransformerLens's tools, which ask for them."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text, each of them."""
        ends = self.eos_token_id
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(whole_numbers(ends, "eos_token_id"))

    def experts_in(self, layer: int) -> int:
        """Routed experts of a layer; 0 if it is dense."""
        if self.experts_by_layer is not None:
            return self.experts_by_layer[layer]
        return 0 if layer in self.dense_layers else self.num_experts

    def window_of(self, layer: int) -> int | None:
        """How many positions up to its own a token sees in a layer; None: all."""
        return self.sliding_window if layer in self.windowed_layers else None

    @property
    def moe_layers(self) -> list[int]:
        """The layers with experts."""
        return [layer for layer in range(self.n_layers) if layer not in self.dense_layers]

    @property
    def rotary_width(self) -> int:
        """How many coordinates of a head carry the position."""
        return self.d_head if self.d_rotary is None else self.d_rotary

    @property
    def value_width(self) -> int:
        """Width of one head's value."""
        return self.d_head if self.d_value is None else self.d_value

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by before the softmax."""
        scale: float = self.d_head**-0.5
        return scale if self.rotary_scaling is None else scale * self.rotary_scaling.score_scale

    def replace(self, **changes: object) -> HookedMoEConfig:
        """A copy with some values changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
