"""Generating tokens one after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from hooked_moe import inputs
from hooked_moe.checks import as_int_or_none, whole_number, whole_numbers
from hooked_moe.components.key_value_cache import KeyValueCache
from hooked_moe.expert_mask import ExpertMask
from hooked_moe.transformer import Transformer

ReturnKind = Literal["input", "str", "tokens"]


@torch.no_grad()
def generate(
    model: Transformer,
    input: Int[Tensor, "batch pos"] | str | list[str],
    max_new_tokens: int = 10,
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_at_eos: bool = True,
    eos_token_id: int | Iterable[int] | None = None,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = None,
    attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    expert_mask: ExpertMask | None = None,
    return_type: ReturnKind = "input",
    verbose: bool = True,
) -> Any:
    """See `HookedMoE.generate`."""
    if return_type not in ("input", "str", "tokens"):
        raise ValueError(f"return_type must be 'input', 'str' or 'tokens', not {return_type!r}")
    max_new_tokens = whole_number(max_new_tokens, "max_new_tokens")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    top_k = None if top_k is None else whole_number(top_k, "top_k")
    _check_sampling(temperature, top_k, top_p)
    ends = _end_tokens(model, eos_token_id) if stop_at_eos else []
    tokens, real = _prompt(model, input, attention_mask, prepend_bos)

    def choose(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        return _choose(logits, temperature, top_k, top_p, generator) if do_sample and temperature else logits.argmax(-1)

    steps = tqdm(range(max_new_tokens), desc="generating", unit="tok", delay=2.0, disable=None if verbose else True)
    with torch.no_grad() if model.has_hooks else torch.inference_mode():  # what hooks see may be wanted for a gradient
        tokens, real = _continued(model, tokens, real, steps, choose, ends, expert_mask, use_past_kv_cache)
    tokens = tokens.clone()  # an ordinary tensor
    if return_type == "tokens" or (return_type == "input" and isinstance(input, Tensor)):
        return tokens
    texts = [model.require_tokenizer().decode(row[kept].tolist(), special=False) for row, kept in zip(tokens, real, strict=True)]
    return texts[0] if isinstance(input, str) or (isinstance(input, Tensor) and len(texts) == 1) else texts


def _continued(
    model: Transformer,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    steps: Collection[int],
    choose: Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]],
    ends: list[int],
    expert_mask: ExpertMask | None,
    use_past_kv_cache: bool,
) -> tuple[Int[Tensor, "batch all_pos"], Bool[Tensor, "batch all_pos"]]:
    """The same with a token more for each of the steps, until all rows have ended."""
    width = tokens.shape[1] + len(steps)
    cache = KeyValueCache(model.cfg.n_layers, width)
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in steps:
        if not use_past_kv_cache:
            cache = KeyValueCache(model.cfg.n_layers, width)  # forget: every token is run again
        new = slice(cache.length, None)
        resid = model(
            tokens[:, new],
            attention_mask=real[:, new],
            expert_mask=expert_mask,
            past_kv_cache=cache,
            stop_at_layer=model.cfg.n_layers,
        )
        chosen = choose(model.logits(resid[:, -1:])[:, 0])
        if ends:
            chosen = torch.where(finished, ends[0], chosen)
            finished |= torch.isin(chosen, torch.tensor(ends, dtype=torch.long, device=chosen.device))
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        real = torch.cat((real, torch.ones_like(real[:, :1])), dim=1)
        if bool(finished.all()):
            break
    return tokens, real


def _prompt(
    model: Transformer, input: Any, attention_mask: Tensor | None, prepend_bos: bool | None
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids that end together, and which are real."""
    if isinstance(input, Tensor):
        tokens, mask = model.as_tokens(input, attention_mask)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if not bool(real[:, -1].all()):
            raise ValueError("generation continues the last token of every row: pad on the left, so that it is a real one")
        return tokens, real
    if attention_mask is not None:
        raise ValueError(inputs.TEXTS_ARE_MASKED)
    return inputs.pad_texts(input, model.cfg, model.tokenizer, prepend_bos, side="left")


def end_tokens(model: Transformer) -> tuple[int, ...]:
    """The token ids any of which ends a text: those of the checkpoint's generation_config.json if it states some, as in
    transformers, or else of its config.json. Those outside the vocabulary, which cannot be generated, are left out."""
    stated = model.generation_config.get("eos_token_id")
    ends = model.cfg.end_tokens if stated is None else tuple(stated) if isinstance(stated, list) else (stated,)
    return tuple(end for end in ends if 0 <= end < model.cfg.d_vocab)


def _end_tokens(model: Transformer, eos_token_id: int | Iterable[int] | None) -> list[int]:
    """Any of which ends a row; the first fills up the rows that have ended."""
    cfg = model.cfg
    if eos_token_id is None:
        ends = list(end_tokens(model))
        if not ends:
            raise ValueError("this model names no end-of-text token: pass eos_token_id, or stop_at_eos=False")
        return ends
    number = as_int_or_none(eos_token_id)
    ends = whole_numbers(eos_token_id, "eos_token_id") if number is None else [number]
    outside = [end for end in ends if not 0 <= end < cfg.d_vocab]
    if outside or not ends:
        raise ValueError(f"eos_token_id must be token ids from 0 to {cfg.d_vocab - 1}, one or more, not {outside or 'none'}")
    return ends


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, " batch"]:
    """Sample among the `top_k` most probable tokens, and of those the fewest whose probabilities reach `top_p`."""
    below = logits - logits.amax(dim=-1, keepdim=True)  # which no temperature, however low, makes infinite
    ordered, tokens = (below / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    probabilities = ordered.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)  # the first has nothing before it, and stays
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]
