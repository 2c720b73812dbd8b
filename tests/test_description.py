"""A model says what it is in a few lines, and when a context is longer than those it was trained for."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from hooked_moe import HookedMoE
from hooked_moe.chat import ChatTemplate
from hooked_moe.loading.placement import as_device, as_dtype, available
from tests.conftest import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_models_repr_fits_a_screen_and_has_its_sizes(model: HookedMoE) -> None:
    lines = repr(model).splitlines()
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 100
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(x.numel() for name, x in model.named_parameters() if ".mlp.experts." in name)
    assert f"custom (olmoe): {total:,} parameters, {total - routed // 2:,} of them active" in lines[0]  # 3 of 6 experts
    assert any("6 in a layer, 3 of them for a token, width 12" in line for line in lines)
    assert any(f"{len(model.hook_dict)} hook points" in line for line in lines)
    for word in ("dense", "latent", "shared ones"):
        has = {"dense": model.cfg.dense_layers, "latent": model.cfg.kv_lora_rank, "shared ones": model.cfg.d_shared}[word]
        assert (word in repr(model)) == bool(has)


def test_a_repr_speaks_of_the_tokenizer_and_of_unequal_layers() -> None:
    model = HookedMoE.from_pretrained("tiny-olmoe")
    assert "tokenizer: 4096 tokens\n" in repr(model)
    model.require_tokenizer().chat_template = ChatTemplate({"default": ""})
    assert "tokenizer: 4096 tokens, with a chat template\n" in repr(model)
    model.remove_experts({0: range(10)})
    assert "54 to 64 in a layer" in repr(model)


def test_a_long_context_is_noted_once(make_model: Callable[..., HookedMoE]) -> None:
    model = make_model(n_ctx=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(2, 8, dtype=torch.long))
    with pytest.warns(UserWarning, match=r"a context of 9 tokens exceeds the 8 that custom was trained for"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 10, dtype=torch.long))
    other = make_model(n_ctx=8)
    with pytest.warns(UserWarning, match=r"a context of 9 tokens"):  # with what the cache holds
        other.generate(torch.zeros(1, 6, dtype=torch.long), 5, stop_at_eos=False, verbose=False)


@pytest.mark.usefixtures("unchecked")
def test_dtypes_and_devices_have_names(make_model: Callable[..., HookedMoE]) -> None:
    assert as_dtype("bfloat16") == as_dtype("torch.bfloat16") == as_dtype(torch.bfloat16) == torch.bfloat16
    assert HookedMoE.from_pretrained("tiny-olmoe", dtype="bfloat16", device="cpu").cfg.dtype == torch.bfloat16
    assert as_device(None) == as_device("cpu") == torch.device("cpu")
    assert as_device("meta").type == "meta"
    assert available()[0] == "cpu"
    for wrong in ("bf16", "int8", "float"):
        with pytest.raises(ValueError, match=rf"unknown dtype {wrong!r}.*must be one of float64, float32, float16, bfloat16"):
            as_dtype(wrong)
    with pytest.raises(ValueError, match=r"'bf16'; did you mean 'bfloat16'"):
        as_dtype("bf16")
    for device in ("gpu", "cuda:99", "mps:7", "xpu"):
        with pytest.raises(ValueError, match=rf"there is no device '{device}'( here)?: this machine has cpu"):
            HookedMoE.from_pretrained("tiny-olmoe", device=device)
