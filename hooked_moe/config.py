"""The architecture of a mixture-of-experts language model as plain values.

Families differ only in the values here and in a weight map (`weights_conversion/`); no module asks which family it serves.
Names follow TransformerLens where it has them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch


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
    rotary_base: float = 10_000.0
    qk_norm: Literal["full", None] = None
    """"full": an RMSNorm over the whole projected width of q and of k, before they are split into heads (OLMoE)."""
    clip_qkv: float | None = None
    """Clamp q, k and v to [-clip, clip], after the norm."""
    attention_bias: bool = False
    """Whether the q, k, v and output projections have biases."""

    num_experts: int
    experts_per_token: int
    d_expert: int
    """Hidden width of one expert."""
    norm_topk_prob: bool = False
    """Whether the routing weights of the selected experts are rescaled to sum to one."""

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
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        sizes = ("n_layers", "d_model", "d_vocab", "n_ctx", "n_heads", "n_key_value_heads", "d_head")
        for name in (*sizes, "num_experts", "experts_per_token", "d_expert"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_key_value_heads ({self.n_key_value_heads})")
        if self.d_head % 2:
            raise ValueError(f"d_head must be even, for rotary positions rotate pairs of coordinates, not {self.d_head}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token ({self.experts_per_token}) cannot exceed num_experts ({self.num_experts})")
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise ValueError(f"clip_qkv must be positive or None, not {self.clip_qkv}")
        if self.qk_norm not in ("full", None):
            raise ValueError(f"qk_norm must be 'full' or None, not {self.qk_norm!r}")

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by before the softmax."""
        return self.d_head**-0.5

    def replace(self, **changes: object) -> HookedMoEConfig:
        """A copy with some values changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
