"""Generation: cached equals uncached, greedy equals transformers', and hooks and masks act while tokens are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_moe import ExpertMask, HookedMoE
from hooked_moe.components.key_value_cache import KeyValueCache
from hooked_moe.generation import _choose
from tests.conftest import random_model
from tests.support.hf_models import random_tokens, save, tiny_olmoe

GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False}


@pytest.fixture(scope="module", params=["olmoe", "deepseek", "gpt-oss"])
def own(request: pytest.FixtureRequest) -> HookedMoE:
    return random_model(request.param)


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(2))


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    reference = tiny_olmoe()
    own = HookedMoE.from_pretrained(save(reference, tmp_path))
    tokens = random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    expected = reference.generate(
        tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(own.generate(tokens, 12, attention_mask=mask, **GREEDY), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_logits_over_a_cache_are_those_of_the_whole(own: HookedMoE, prompt: Tensor, padded: bool) -> None:
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :3] = 0
    with torch.no_grad():
        whole = own(prompt, attention_mask=mask)
        for cuts in ([3, 4], [1] * 7, [6, 1], [2, 4, 1]):
            cache, parts = KeyValueCache(own.cfg.n_layers), []
            for some, real in zip(prompt.split(cuts, dim=1), mask.split(cuts, dim=1), strict=True):
                parts.append(own(some, attention_mask=real, past_kv_cache=cache))
            assert cache.length == 7
            torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_greedy_tokens_are_the_most_probable_of_plain_forwards(own: HookedMoE, prompt: Tensor, cached: bool) -> None:
    tokens = prompt
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat((tokens, own(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(own.generate(prompt, 6, use_past_kv_cache=cached, **GREEDY), tokens)
    assert torch.equal(own.generate(prompt, 6, temperature=0.0, stop_at_eos=False, verbose=False), tokens)


@pytest.mark.parametrize("removal", ["zero", "renormalize", "reroute"])
def test_masks_act_on_the_positions_of_the_whole(own: HookedMoE, prompt: Tensor, removal: Any) -> None:
    mask = ExpertMask.ablate([(1, 0, 3, 2), (1, None, 8, 1), (2, 1, None, 4), (2, None, 10, 0)], removal)
    tokens = prompt
    for _ in range(5):
        with torch.no_grad():
            logits = own(tokens, expert_mask=mask, past_kv_cache=KeyValueCache(3, width=12))
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    for cached in (False, True):
        assert torch.equal(own.generate(prompt, 5, expert_mask=mask, use_past_kv_cache=cached, **GREEDY), tokens)
    with torch.no_grad():
        cache, parts = KeyValueCache(3, width=12), []
        for some in tokens.split([7, 1, 1, 1, 1, 1], dim=1):
            parts.append(own(some, expert_mask=mask, past_kv_cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), own(tokens, expert_mask=mask), atol=1e-5, rtol=1e-5)


def test_a_mask_of_the_prompt_alone_is_refused_for_what_comes_after(own: HookedMoE, prompt: Tensor) -> None:
    mask = ExpertMask({1: torch.ones(2, 7, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"must broadcast to \[batch, pos, expert\] = \[2, 12, 6\]"):
        own.generate(prompt, 5, expert_mask=mask, **GREEDY)


def test_hooks_act_at_every_step_and_see_new_tokens_only(own: HookedMoE, prompt: Tensor) -> None:
    seen: list[int] = []

    def only_expert_0_and_1(logits: Tensor, hook: Any) -> Tensor:
        if hook.layer() == 1:
            seen.append(logits.shape[1])
        logits[..., 3:] = -torch.inf
        return logits

    hooks = [(lambda name: name.endswith("router_logits"), only_expert_0_and_1)]
    with own.hooks(hooks):
        cached = own.generate(prompt, 4, **GREEDY)
        assert seen == [7, 1, 1, 1]
        assert torch.equal(own.generate(prompt, 4, use_past_kv_cache=False, **GREEDY), cached)
    assert seen[4:] == [7, 8, 9, 10]
    assert not torch.equal(own.generate(prompt, 4, **GREEDY), cached)


# Sampling

PROBABILITIES = torch.tensor([[0.5, 0.05, 0.3, 0.15]])


def sampled(**options: Any) -> Tensor:
    """How often each of four tokens is drawn."""
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": torch.Generator().manual_seed(0)} | options
    drawn = _choose(PROBABILITIES.log().expand(20_000, -1), **settings)
    return torch.bincount(drawn, minlength=4) / 20_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.05, 0.3, 0.15]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
        ({"top_k": 2}, [0.625, 0.0, 0.375, 0.0]),
        ({"top_k": 9}, [0.5, 0.05, 0.3, 0.15]),
        ({"top_p": 0.4}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_p": 0.6}, [0.625, 0.0, 0.375, 0.0]),
        ({"top_p": 1.0}, [0.5, 0.05, 0.3, 0.15]),
        ({"top_k": 3, "top_p": 0.9}, [0.5 / 0.95, 0.0, 0.3 / 0.95, 0.15 / 0.95]),
        ({"temperature": 1e-3}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1e-38}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(options: dict[str, Any], expected: list[float]) -> None:
    torch.testing.assert_close(sampled(**options), torch.tensor(expected), atol=0.015, rtol=0)


def test_a_generator_makes_samples_repeatable(own: HookedMoE, prompt: Tensor) -> None:
    def run(seed: int) -> Tensor:
        return own.generate(prompt, 8, generator=torch.Generator().manual_seed(seed), stop_at_eos=False, verbose=False)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


# The end of a text


def test_rows_that_have_ended_are_filled_up_and_all_ended_stops(own: HookedMoE, prompt: Tensor) -> None:
    free = own.generate(prompt, 6, **GREEDY)[:, 7:]
    end = int(free[0, 2])
    first = [row.tolist().index(end) if end in row.tolist() else None for row in free]
    stopped = own.generate(prompt, 6, do_sample=False, eos_token_id=end, verbose=False)[:, 7:]
    assert stopped[0, : first[0] + 1].tolist() == free[0, : first[0] + 1].tolist()
    assert set(stopped[0, first[0] :].tolist()) == {end}
    if first[1] is None:
        assert stopped[1].tolist() == free[1].tolist()
    everything = own.generate(prompt, 6, do_sample=False, eos_token_id=free[:, 0].tolist(), verbose=False)
    assert everything.shape == (2, 8)


# Text


def test_texts_come_back_as_texts_whatever_their_lengths() -> None:
    model = HookedMoE.from_pretrained("tiny-olmoe")
    options: dict[str, Any] = {"do_sample": False, "verbose": False}
    alone = [model.generate(text, 8, **options) for text in ("In the beginning God", "The President of the United States shall")]
    assert alone[0].startswith("In the beginning God")
    assert model.generate(["In the beginning God", "The President of the United States shall"], 8, **options) == alone
    tokens = model.to_tokens("In the beginning God")
    assert model.generate(tokens, 8, return_type="str", **options) == alone[0]
    assert model.to_string(model.generate("In the beginning God", 8, return_type="tokens", **options)[0]) == alone[0]
    assert model.generate(["In the beginning God"], 0, **options) == ["In the beginning God"]


# What is refused

Refused = Callable[[HookedMoE, Tensor], Any]
REFUSALS: dict[str, tuple[Refused, str]] = {
    "temperature": (lambda m, t: m.generate(t, 2, temperature=-1.0), "temperature must be 0"),
    "top_k": (lambda m, t: m.generate(t, 2, top_k=0), "top_k must be at least 1"),
    "top_p": (lambda m, t: m.generate(t, 2, top_p=1.5), "top_p must be above 0"),
    "negative length": (lambda m, t: m.generate(t, -1), "max_new_tokens must be 0 or more"),
    "return type": (lambda m, t: m.generate(t, 2, return_type="text"), "return_type must be"),
    "no end": (lambda m, t: m.generate(t, 2), "names no end-of-text token"),
    "no tokenizer": (lambda m, t: m.generate("text", 2, stop_at_eos=False), "no tokenizer"),
    "padding on the right": (
        lambda m, t: m.generate(t, 2, stop_at_eos=False, attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2])),
        "pad on the left",
    ),
    "mask with text": (
        lambda m, t: m.generate("text", 2, stop_at_eos=False, attention_mask=torch.ones(1, 4)),
        "attention_mask goes with tokens",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_generated_is_refused_by_name(refusal: str, own: HookedMoE, prompt: Tensor) -> None:
    run, message = REFUSALS[refusal]
    with pytest.raises(ValueError, match=message):
        run(own, prompt)


# End tokens, from files and from users


@pytest.mark.usefixtures("unchecked")
def test_any_of_several_end_tokens_ends_a_row(model: HookedMoE, tokens: Tensor) -> None:
    """They are those of generation_config.json if it names some, or else of config.json; one that cannot occur ends nothing."""
    free = model.generate(tokens, 6, do_sample=False, stop_at_eos=False, verbose=False)[0, tokens.shape[1] :].tolist()
    end = next(token for token in free[1:] if token != free[0])
    expected = free[: free.index(end) + 1]
    others = [token for token in range(61) if token not in free][:2]
    cfg = model.cfg

    def generated(**options: Any) -> list[int]:
        return model.generate(tokens[:1], 6, do_sample=False, verbose=False, **options)[0, tokens.shape[1] :].tolist()

    try:
        for ends in (end, (others[0], end), (end, others[0]), (*others, end), (-1, end), (end, 61), (10**9, end, -1)):
            model.cfg = cfg.replace(eos_token_id=ends)
            assert generated() == expected
            model.cfg = cfg.replace(eos_token_id=others[0])
            model.generation_config = {"eos_token_id": list(ends) if isinstance(ends, tuple) else ends}
            assert generated() == expected
            model.generation_config = {"temperature": 0.6}
            assert generated() == free
        for given in (torch.tensor([others[0], end]), np.array([end]), (token for token in (others[0], end)), torch.tensor(end)):
            assert generated(eos_token_id=given) == expected
        model.cfg = cfg.replace(eos_token_id=(-1, 61))
        with pytest.raises(ValueError, match="this model names no end-of-text token"):
            generated()
    finally:
        model.cfg, model.generation_config = cfg, {}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [[], 61, -1, [3, 61], 2.0, [2.5], True, "3", torch.tensor([1.0])], ids=repr)
def test_end_tokens_that_a_user_gives_must_be_token_ids(wrong: Any, model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="eos_token_id must be"):
        model.generate(tokens, 2, eos_token_id=wrong)


def test_rows_that_have_ended_are_filled_with_an_end_token_of_the_vocabulary(model: HookedMoE, tokens: Tensor) -> None:
    free = model.generate(tokens, 4, do_sample=False, stop_at_eos=False, verbose=False)[:, tokens.shape[1] :]
    first, other = free[0, 0].item(), next(token for token in range(61) if not (free == token).any())
    if first in free[1].tolist():
        pytest.skip("the rows of this model do not end apart")
    cfg = model.cfg
    try:
        model.cfg = cfg.replace(eos_token_id=(-1, first, other))
        ended = model.generate(tokens, 4, do_sample=False, verbose=False)[:, tokens.shape[1] :]
    finally:
        model.cfg = cfg
    assert ended[0].tolist() == [first] * 4
    assert torch.equal(ended[1], free[1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, not True"),
        ({"top_k": 1.5}, "top_k must be a whole number, not 1.5"),
        ({"temperature": float("nan")}, "temperature must be 0 .greedy. or more, not nan"),
        ({"top_p": float("nan")}, "top_p must be above 0"),
    ],
    ids=repr,
)
def test_numbers_of_generation_are_checked(options: dict[str, Any], message: str, model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, **({"stop_at_eos": False} | options))
    again = model.generate(tokens, torch.tensor(2), top_k=np.int64(1), stop_at_eos=False, verbose=False)
    assert torch.equal(again, model.generate(tokens, 2, do_sample=False, stop_at_eos=False, verbose=False))
