"""What a model is given, checked before anything runs: token ids or texts, masks, residual streams, layers.

`ValueError` says what is wrong with anything else. Padding is masked, so its id is never looked up: it may be any number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_moe.checks import WrongTypeError, described, whole_number
from hooked_moe.components.key_value_cache import KeyValueCache
from hooked_moe.config import HookedMoEConfig
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.tokenizer import Tokenizer, as_texts

TEXTS_ARE_MASKED = "attention_mask goes with tokens; texts are padded and masked by the model itself"


def as_tokens(
    input: Any, attention_mask: Any, cfg: HookedMoEConfig, tokenizer: Tokenizer | None
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
    """Token ids on the model's device, and which of them are real (None: all), of token ids or of texts."""
    if not isinstance(input, Tensor):
        items = list(input) if isinstance(input, Iterable) and not isinstance(input, str | Mapping) else input
        if not isinstance(items, str) and not (isinstance(items, list) and all(isinstance(item, str) for item in items)):
            raise WrongTypeError(
                f"expected token ids as an integer tensor [batch, pos], or text, not {described(input)}; "
                "torch.tensor([ids]) makes one of a list of ids"
            )
        if attention_mask is not None:
            raise ValueError(TEXTS_ARE_MASKED)
        return pad_texts(items, cfg, tokenizer)
    if input.dim() != 2 or input.is_floating_point() or input.is_complex() or input.dtype == torch.bool:
        one_row = "; tokens[None] makes a batch of one row" if input.dim() == 1 else ""
        raise WrongTypeError(
            f"expected token ids as an integer tensor [batch, pos], or text, not {input.dtype} {list(input.shape)}{one_row}"
        )
    if input.shape[1] == 0 or input.shape[0] == 0:
        raise ValueError(f"no tokens: the input has shape {list(input.shape)}")
    tokens, mask = input.to(cfg.device, torch.long), as_mask(attention_mask, input.shape[0], input.shape[1], cfg)
    tokens, outside = _looked_up(tokens, mask, cfg)
    if outside is not None:
        raise ValueError(f"token id {outside} is out of range: {cfg.model_name} has ids 0 to {cfg.d_vocab - 1}")
    return tokens, mask


def pad_texts(
    texts: Any,
    cfg: HookedMoEConfig,
    tokenizer: Tokenizer | None,
    prepend_bos: bool | None = None,
    side: Literal["left", "right"] = "right",
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids of texts in rows of one length, and which of them are real."""
    tokens, real = require_tokenizer(tokenizer).pad(as_texts(texts), cfg.device, prepend_bos, side)
    tokens, outside = _looked_up(tokens, real, cfg)
    if outside is not None:
        raise ValueError(foreign_tokenizer(outside, cfg))
    return tokens, real


def foreign_tokenizer(token: int, cfg: HookedMoEConfig) -> str:
    """What is wrong where a tokenizer gives an id that its model has no embedding for."""
    return (
        f"the tokenizer gives token id {token}, but {cfg.model_name} has ids 0 to {cfg.d_vocab - 1}: put the model's own "
        "tokenizer.json beside its weights"
    )


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer; `ValueError` if there is none."""
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: pass token ids, or set model.tokenizer = Tokenizer.from_file(...)")
    return tokenizer


def _looked_up(tokens: Tensor, real: Tensor | None, cfg: HookedMoEConfig) -> tuple[Tensor, int | None]:
    """Token ids with an embedding each, and a real one that has none, if there is one. Padding that has none becomes 0."""
    low, high = int(tokens.min()), int(tokens.max())
    if (low < 0 or high >= cfg.d_vocab) and real is not None:
        tokens = tokens.masked_fill(~real, 0)
        low, high = int(tokens.min()), int(tokens.max())
    outside = low if low < 0 else high if high >= cfg.d_vocab else None
    return tokens, outside


def as_mask(attention_mask: Any, batch: int, pos: int, cfg: HookedMoEConfig) -> Bool[Tensor, "batch pos"] | None:
    """Which tokens are real. A float mask is refused: one that is added to attention scores says the opposite with its zeros."""
    if attention_mask is None:
        return None
    mask = torch.as_tensor(attention_mask, device=cfg.device)
    if mask.shape != (batch, pos):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; expected {[batch, pos]}")
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"attention_mask must be bool, or whole numbers: 1 at real tokens and 0 at padding, not {mask.dtype} with values "
            f"such as {mask.flatten()[:4].tolist()}"
        )
    return mask.bool()


def as_residual(input: Any, cfg: HookedMoEConfig) -> Float[Tensor, "batch pos d_model"]:
    """A residual stream in the model's dtype, on its device."""
    if not isinstance(input, Tensor) or input.dim() != 3 or input.shape[-1] != cfg.d_model or not input.is_floating_point():
        got = f"{input.dtype} {list(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"start_at_layer takes a residual stream [batch, pos, d_model={cfg.d_model}], not {got}")
    return input.to(cfg.device, cfg.dtype)


def layer_bound(name: str, layer: Any, default: int, cfg: HookedMoEConfig) -> int:
    """A layer to begin or to end before, counted from 0; negative ones count from the end."""
    if layer is None:
        return default
    number = whole_number(layer, name)
    bound = number + cfg.n_layers if number < 0 else number
    if not 0 <= bound <= cfg.n_layers:
        raise ValueError(f"{name}={number} is out of range: the model has layers 0 to {cfg.n_layers - 1}")
    return bound


def check_expert_mask(mask: Any, cfg: HookedMoEConfig) -> None:
    """Raise `WrongTypeError` for what is no expert mask, and `ValueError` for one of layers that have no experts."""
    if not isinstance(mask, ExpertMask):
        raise WrongTypeError(f"expert_mask must be an ExpertMask, as ExpertMask({{layer: keep}}), not {described(mask)}")
    mask.check_layers(cfg)


def check_continues(cache: KeyValueCache, batch: int, pos: int, layers: range, cfg: HookedMoEConfig) -> None:
    """Raise `ValueError` unless a pass of `pos` new tokens through these layers continues what the cache holds."""
    if layers != range(cfg.n_layers):
        raise ValueError("past_kv_cache keeps what every layer makes: leave out start_at_layer and stop_at_layer")
    if len(cache.layers) != cfg.n_layers:
        raise ValueError(f"past_kv_cache is for {len(cache.layers)} layers, and the model has {cfg.n_layers}")
    if cache.real is not None and len(cache.real) != batch:
        raise ValueError(f"past_kv_cache holds {len(cache.real)} rows, and the input has {batch}: each row continues its own")
    if cache.width is not None and cache.length + pos > cache.width:
        raise ValueError(f"past_kv_cache was made for rows of {cache.width} tokens, and these would have {cache.length + pos}")
