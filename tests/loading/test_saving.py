"""Writing checkpoints: transformers reads them, the round trip keeps every bit, and a save that is cut short does no harm."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, OlmoeForCausalLM

from hooked_moe import HookedMoE
from hooked_moe.loading import CheckpointError, saving
from hooked_moe.tokenizer import Tokenizer
from tests.support.hf_models import CASES, FAMILIES, logits_of, pair_of, random_tokens, save, tiny_olmoe
from weights_conversion import CONVERSIONS, HFConfig


def assert_same_bits(first: HookedMoE, second: HookedMoE) -> None:
    mine, other = dict(first.named_parameters()), dict(second.named_parameters())
    assert mine.keys() == other.keys()
    for name, parameter in mine.items():
        assert parameter.dtype == other[name].dtype
        assert torch.equal(parameter, other[name]), name


def word_tokenizer() -> Tokenizer:
    words = ["<pad>", "<end>", "<start>", "the", "expert", "router"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, bos_id=2, eos_id=1, pad_id=0)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 60_000)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_saved_with_equal_logits(case: str, tmp_path: Path) -> None:
    pair = pair_of(case)
    pair.ours.save_pretrained(tmp_path)
    theirs, report = type(pair.hf).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens()
    torch.testing.assert_close(logits_of(theirs.eval(), tokens), logits_of(pair.ours, tokens), atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_round_trip_keeps_every_bit_and_every_option(case: str, tmp_path: Path) -> None:
    """Also of the file: it holds the tensors that transformers saves."""
    pair = pair_of(case)
    save(pair.hf, tmp_path / "theirs")
    pair.ours.save_pretrained(tmp_path / "ours")
    expected, written = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    again = HookedMoE.from_pretrained(tmp_path / "ours")
    assert_same_bits(again, pair.ours)
    assert again.cfg.replace(model_name=pair.ours.cfg.model_name) == pair.ours.cfg


@pytest.mark.parametrize("dialect", [("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_saved_config_says_everything_in_both_dialects(case: str, dialect: tuple[str, ...]) -> None:
    cfg = pair_of(case).ours.cfg
    conversion = CONVERSIONS[cfg.model_type]
    values = conversion.to_hf(cfg)
    assert values.keys() >= set(dialect)
    other = HFConfig({key: value for key, value in values.items() if key not in dialect}, "config.json")
    assert conversion.from_hf(other).replace(model_name=cfg.model_name) == cfg


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_stored_fused_is_saved_one_expert_at_a_time(family: str, tmp_path: Path) -> None:
    pair = pair_of(f"{family}-all-at-once")
    HookedMoE.from_pretrained(save(pair.hf, tmp_path / "fused", fused=True)).save_pretrained(tmp_path / "again")
    pair.ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()


def test_saved_files_say_what_they_are(model: HookedMoE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_transformers_loads_a_deepseek_without_shared_experts(tmp_path: Path) -> None:
    """transformers then has shared experts of width 0, which add nothing."""
    ours = HookedMoE(pair_of("deepseek_v2-plain").ours.cfg.replace(d_shared=None, initializer_range=0.1)).eval()
    ours.save_pretrained(tmp_path)
    theirs = FAMILIES["deepseek_v2"].model.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = random_tokens()
    torch.testing.assert_close(logits_of(theirs, tokens), logits_of(ours, tokens), atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_is_saved_in_its_own_dtype(dtype: torch.dtype, make_model: Callable[..., HookedMoE], tmp_path: Path) -> None:
    model = make_model(dtype=dtype)
    model.save_pretrained(tmp_path)
    assert_same_bits(model, HookedMoE.from_pretrained(tmp_path, dtype=dtype))
    theirs = OlmoeForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype  # transformers takes it from config.json


@pytest.mark.usefixtures("small_shards")
def test_a_large_model_is_saved_in_shards_with_an_index(tmp_path: Path) -> None:
    theirs = tiny_olmoe()
    model = HookedMoE.from_pretrained(save(theirs, tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "ours")
    shards = sorted(tmp_path.glob("ours/*.safetensors"))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(shards) > 5
    assert [shard.name for shard in shards] == sorted(set(index["weight_map"].values()))
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 60_000 for shard in shards)
    assert_same_bits(model, HookedMoE.from_pretrained(tmp_path / "ours"))
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), again.parameters(), strict=True))


def test_the_tokenizer_is_saved_for_both_libraries(make_model: Callable[..., HookedMoE], tmp_path: Path) -> None:
    model = make_model(bos_token_id=2, eos_token_id=1, pad_token_id=0)
    model.tokenizer = word_tokenizer()
    model.save_pretrained(tmp_path)
    text = "the router the expert"
    loaded, theirs = HookedMoE.from_pretrained(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    assert loaded is not None
    assert loaded.encode(text) == theirs(text)["input_ids"] == [3, 5, 3, 4]
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (2, 1, 0)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)
    assert theirs.model_max_length == model.cfg.n_ctx


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": None}, "qk_norm=None would be read back as 'full'"),
        ({"d_head": 16}, "d_head=16 would be read back as 8"),
        ({"d_model": 30}, "cannot be saved as 'olmoe'.*hidden_size"),
        ({"model_type": "mamba"}, "'mamba' is not supported"),
    ],
)
def test_a_model_that_the_format_cannot_express_is_not_saved(
    changes: dict[str, Any], words: str, make_model: Callable[..., HookedMoE], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        make_model(**changes).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("olmoe", {"output_bias": True}, "output_bias=True would be read back as False"),
        ("olmoe", {"dense_layers": (0,), "d_mlp": 40}, r"dense_layers=\(0,\) would be read back as \(\)"),
        ("qwen2_moe", {"d_shared": None, "shared_gate": False}, "shared_expert_intermediate_size is missing"),
        ("qwen2_moe", {"shared_gate": False}, "shared_gate=False would be read back as True"),
        ("qwen2_moe", {"routed_scaling_factor": 2.0}, "routed_scaling_factor=2.0 would be read back as 1.0"),
        ("deepseek_v2", {"d_shared": 50}, "d_shared=50 would be read back as 48"),
        ("deepseek_v2", {"dense_layers": (1,)}, r"dense_layers=\(1,\) would be read back as \(0,\)"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        ("deepseek_v2", {"rotary_interleaved": False}, "rotary_interleaved=False would be read back as True"),
        ("qwen3_moe", {"d_shared": 24}, "d_shared=24 would be read back as None"),
        ("qwen3_moe", {"clip_qkv": 1.0}, "clip_qkv=1.0 would be read back as None"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False would be read back as True"),
        ("mixtral", {"qkv_bias": True}, "qkv_bias=True would be read back as False"),
        ("mixtral", {"windowed_layers": (1,), "sliding_window": 4}, r"windowed_layers=\(1,\) would be read back as \(0, 1, 2\)"),
        ("olmoe", {"windowed_layers": (1,), "sliding_window": 4}, "sliding_window=4 would be read back as None"),
        ("deepseek_v3", {"router_score": "softmax"}, "router_score='softmax' would be read back as 'sigmoid'"),
        ("deepseek_v3", {"dense_layers": (1,)}, r"dense_layers=\(1,\) would be read back as \(0,\)"),
        ("glm4_moe", {"output_bias": True}, "output_bias=True would be read back as False"),
        ("glm4_moe_lite", {"expert_bias": True}, "expert_bias=True would be read back as False"),
        ("gpt_oss", {"clamped_swiglu": None}, "clamped_swiglu=None would be read back as"),
        ("gpt_oss", {"output_bias": False}, "output_bias=False would be read back as True"),
        ("gpt_oss", {"attention_sink": False}, "attention_sink=False would be read back as True"),
        ("mixtral", {"experts_by_layer": (10, 9, 10)}, r"one number of experts for all layers, and this model has \(10, 9, 10\)"),
    ],
)
def test_what_a_family_does_not_have_is_not_saved(family: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    cfg = pair_of(f"{family}-plain").ours.cfg.replace(**changes)
    with pytest.raises(CheckpointError, match=words):
        HookedMoE(cfg).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_without_values_is_not_saved(make_model: Callable[..., HookedMoE], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta device"):
        make_model().to("meta").save_pretrained(tmp_path)


def test_a_file_is_not_overwritten_by_a_directory(model: HookedMoE, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="it is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="cannot save a model in"):
        model.save_pretrained(tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "mine"


# Saves that do not run to their end


def files_in(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def test_a_save_that_fails_leaves_nothing_behind(model: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match=r"cannot save a model in .* no space left"):
        model.save_pretrained(tmp_path)
    assert files_in(tmp_path) == set()


@pytest.mark.usefixtures("small_shards")
def test_saving_over_another_model_leaves_nothing_of_it(
    make_model: Callable[..., HookedMoE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").touch()
    for limit, count in ((10_000, 4), (20_000, 3), (10**9, 1)):
        monkeypatch.setattr(saving, "MAX_SHARD_BYTES", limit)
        model = make_model(n_layers=count)
        model.save_pretrained(tmp_path)
        assert_same_bits(model, HookedMoE.from_pretrained(tmp_path))
    assert files_in(tmp_path) == {"config.json", "model.safetensors", "notes.txt"}
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


@pytest.mark.usefixtures("small_shards")
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("step", range(8))
def test_a_save_that_is_killed_leaves_the_old_model_or_the_new_or_none(
    step: int, make_model: Callable[..., HookedMoE], tmp_path: Path
) -> None:
    """Killed at the n-th file that is written or renamed: what is there under final names is whole, and of one model."""
    old, new = make_model(), make_model(tie_word_embeddings=True)
    old.save_pretrained(tmp_path)
    child = os.fork()
    if child == 0:
        remaining = [step]

        def dying(action: Callable[..., Any]) -> Callable[..., Any]:
            def act(*args: Any, **kwargs: Any) -> Any:
                if not remaining[0]:
                    os._exit(9)
                remaining[0] -= 1
                return action(*args, **kwargs)

            return act

        saving.save_file, os.replace = dying(saving.save_file), dying(os.replace)
        new.save_pretrained(tmp_path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    if (tmp_path / "config.json").exists():  # else it is no model, and `from_pretrained` says so
        loaded = HookedMoE.from_pretrained(tmp_path)
        assert_same_bits(loaded, new if loaded.cfg.tie_word_embeddings else old)
    new.save_pretrained(tmp_path)  # and the next save goes through
    assert_same_bits(new, HookedMoE.from_pretrained(tmp_path))
    assert not [name for name in files_in(tmp_path) if name.endswith(".tmp")]
