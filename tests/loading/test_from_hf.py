"""Models of transformers that are in memory: the same logits, and the same memory where both lay it out alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from hooked_moe import HookedMoE, Tokenizer
from tests.support.hf_models import CASES, FAMILIES, logits_of, pair_of, random_tokens, save, tiny

pytestmark = pytest.mark.usefixtures("unchecked")
FAMILY = pytest.mark.parametrize("family", FAMILIES)
COPIED = {"gpt_oss": {"W_in", "W_out", "b_in"}}
"""Parameters that lie otherwise in transformers: there, gpt-oss's experts have the input first, and gate and up alternate."""
SOME = [case for case in CASES if case.endswith(("-plain", "-tied", "-all-at-once", "-biased", "-latent-queries"))]


@pytest.mark.parametrize("case", SOME)
def test_the_model_is_that_of_its_checkpoint(case: str) -> None:
    pair = pair_of(case)
    ours = HookedMoE.from_hf(pair.hf)
    assert ours.cfg == pair.ours.cfg.replace(model_name=ours.cfg.model_name)
    assert not ours.training
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, pair.ours.get_parameter(name)), name
    tokens = random_tokens()
    assert torch.equal(logits_of(ours, tokens), logits_of(pair.ours, tokens))
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(pair.hf, tokens), atol=2e-5, rtol=1e-4)


@FAMILY
def test_memory_is_shared(family: str) -> None:
    hf = tiny(f"{family}-plain")
    ours = HookedMoE.from_hf(hf)
    theirs = {tensor.data_ptr() for tensor in hf.state_dict(keep_vars=True).values()}
    copied = {name for name, parameter in ours.named_parameters() if parameter.data_ptr() not in theirs}
    assert {name.rpartition(".")[2] for name in copied} == COPIED.get(family, set())
    if copied:
        return
    before = logits_of(ours, random_tokens())
    with torch.no_grad():
        hf.model.layers[-1].mlp.experts.down_proj.mul_(2.0)
    after = logits_of(ours, random_tokens())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, logits_of(hf, random_tokens()), atol=2e-5, rtol=1e-4)


def test_tensors_that_lie_otherwise_are_copied() -> None:
    hf = tiny("olmoe-plain")
    expected = logits_of(hf, random_tokens())
    proj = hf.model.layers[0].self_attn.q_proj
    proj.weight = torch.nn.Parameter(proj.weight.detach().T.contiguous().T)
    ours = HookedMoE.from_hf(hf)
    torch.testing.assert_close(logits_of(ours, random_tokens()), expected, atol=2e-5, rtol=1e-4)
    assert ours.blocks[0].attn.W_Q.data_ptr() != proj.weight.data_ptr()
    assert ours.blocks[1].attn.W_Q.data_ptr() == hf.model.layers[1].self_attn.q_proj.weight.data_ptr()


def test_dtype_mode_and_frozen_parameters_are_those_of_the_model() -> None:
    hf = tiny("qwen2_moe-plain").bfloat16().train()
    hf.model.embed_tokens.weight.requires_grad_(False)
    ours = HookedMoE.from_hf(hf)
    assert ours.cfg.dtype == torch.bfloat16
    assert ours.training
    assert not ours.embed.W_E.requires_grad
    assert ours.unembed.W_U.requires_grad


class Fast:
    """What a fast tokenizer of transformers has."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend_tokenizer = backend
        self.eos_token_id, self.pad_token_id = 7, 8
        self.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        self.special_tokens_map = {"bos_token": "<s>"}


@pytest.fixture
def backend() -> tokenizers.Tokenizer:
    return copy.deepcopy(HookedMoE.from_pretrained("tiny-olmoe").require_tokenizer().backend)


def test_a_tokenizer_comes_along(backend: tokenizers.Tokenizer) -> None:
    hf = FAMILIES["olmoe"].tiny(vocab_size=backend.get_vocab_size(), pad_token_id=None)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    text = "The cat sat on the mat."
    for tokenizer in (fast, backend, Tokenizer(backend, None, 1, None)):
        ours = HookedMoE.from_hf(hf, tokenizer)
        assert ours.to_tokens(text)[0].tolist() == fast(text)["input_ids"]
        assert ours.tokenizer is not None
        assert ours.tokenizer.eos_id == 1
    whole = fast(text)["input_ids"]
    before = HookedMoE.from_hf(hf, fast)
    fast(text, truncation=True, max_length=2)  # theirs truncates from now on, ours does not
    fast.backend_tokenizer.enable_padding(length=30)
    for ours in (before, HookedMoE.from_hf(hf, fast)):
        assert ours.to_tokens(text)[0].tolist() == whole
    made = HookedMoE.from_hf(hf, Fast(backend)).require_tokenizer()
    assert (made.eos_id, made.pad_id) == (1, 8)
    assert made.chat_template is not None
    assert made.chat_template.render([{"role": "user", "content": "Hi"}]) == "<s>[user] Hi"


def test_from_pretrained_takes_the_weights_of_a_model(tmp_path: Path) -> None:
    hf = tiny("mixtral-plain")
    save(tiny("mixtral-plain"), tmp_path / "base")
    with torch.no_grad():
        hf.lm_head.weight.mul_(3.0)
    ours = HookedMoE.from_pretrained(tmp_path / "base", hf_model=hf)
    assert ours.cfg.model_name == "base"
    assert ours.unembed.W_U.data_ptr() == hf.lm_head.weight.data_ptr()
    half = HookedMoE.from_pretrained(tmp_path / "base", hf_model=hf, dtype="bfloat16")
    assert torch.equal(half.unembed.W_U, hf.lm_head.weight.bfloat16())
    assert hf.lm_head.weight.dtype == torch.float32
    for options, message in (
        ({"hf_model": tiny("olmoe-plain")}, r"of the family 'mixtral', and hf_model of 'olmoe'"),
        ({"hf_model": hf, "stream": True}, r"leave out stream, store and adapter"),
        ({"hf_model": hf, "adapter": "x"}, r"leave out stream, store and adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            HookedMoE.from_pretrained(tmp_path / "base", **options)


def _with(change: Any) -> Any:
    hf = tiny("olmoe-plain")
    change(hf)
    return hf


def test_what_is_no_plain_model_is_refused() -> None:
    for hf, message in (
        (_with(lambda hf: setattr(hf.config, "hidden_act", "gelu")), r"this OlmoeForCausalLM's config: hidden_act='gelu'"),
        (_with(lambda hf: setattr(hf.config, "num_experts", 11)), r"(?s)the tensors in this OlmoeForCausalLM .*of another shape"),
        (_with(lambda hf: hf.lm_head.half()), r"has weights in torch.float16 on cpu, torch.float32 on cpu: they must be"),
        (tiny("olmoe-plain").to("meta"), r"has weights in torch.float32 on meta"),
        (tiny("olmoe-plain").model, r"(?s)the tensors in this OlmoeModel .*missing"),
        (
            transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=5)),
            r"model_type 'gpt2' is not supported",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            HookedMoE.from_hf(hf)
    for wrong in ("olmoe", torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"from_hf takes a model of transformers, not (str|Linear)"):
            HookedMoE.from_hf(wrong)
    with pytest.raises(TypeError, match=r"must be a fast tokenizer of transformers.*not str"):
        HookedMoE.from_hf(tiny("olmoe-plain"), "gpt2")


def test_embeddings_that_are_tied_in_the_config_alone_are_refused() -> None:
    hf = tiny("olmoe-tied")
    assert HookedMoE.from_hf(hf).unembed.W_U.data_ptr() == hf.lm_head.weight.data_ptr()
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight + 1)
    with pytest.raises(ValueError, match=r"(?s)ties the embeddings .*lm_head.weight"):
        HookedMoE.from_hf(hf)
