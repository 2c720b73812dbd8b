"""Reading checkpoints from a directory: parity with transformers, memory, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import OPTIONS, logits_of, random_tokens, save, tiny_olmoe
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_moe import HookedMoE
from weights_conversion import CheckpointError

LAYOUTS = {
    "per-expert": {},
    "per-expert-sharded": {"sharded": True},
    "fused": {"fused": True},
    "fused-sharded": {"fused": True, "sharded": True},
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tiny_olmoe(), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(tiny_olmoe(), tmp_path / "model", sharded=True)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` deletes one."""
    file = directory / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_index(directory: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def refusal(directory: Path, *words: str) -> str:
    """The message of the `CheckpointError` that loading raises; it names the directory and holds these words."""
    with pytest.raises(CheckpointError) as caught:
        HookedMoE.from_pretrained(directory)
    message = str(caught.value)
    for word in (str(directory), *words):
        assert word in message, message
    return message


# Parity


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_equal_those_of_transformers(options: str, layout: str, tmp_path: Path) -> None:
    theirs = tiny_olmoe(**OPTIONS[options])
    ours = HookedMoE.from_pretrained(save(theirs, tmp_path, **LAYOUTS[layout]))
    tokens = random_tokens()
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(theirs, tokens), atol=5e-5, rtol=0)


def test_configs_of_the_hub_say_the_same_in_their_own_words(tmp_path: Path) -> None:
    directory = save(tiny_olmoe(rope_parameters={"rope_type": "default", "rope_theta": 50.0}), tmp_path)
    newer = HookedMoE.from_pretrained(directory).cfg
    edit_config(directory, rope_parameters=..., rope_theta=50, rope_scaling=None, dtype=..., torch_dtype="float32")
    assert HookedMoE.from_pretrained(directory).cfg == newer
    assert newer.rotary_base == 50.0


def test_options_that_a_config_leaves_out_have_the_defaults_of_transformers(directory: Path) -> None:
    before = HookedMoE.from_pretrained(directory).cfg
    optional = ("num_key_value_heads", "rope_parameters", "clip_qkv", "attention_bias", "norm_topk_prob", "rms_norm_eps")
    edit_config(directory, **dict.fromkeys((*optional, "tie_word_embeddings", "hidden_act"), ...))
    assert HookedMoE.from_pretrained(directory).cfg == before


def test_special_tokens_and_name_reach_the_config(directory: Path) -> None:
    edit_config(directory, bos_token_id=5, eos_token_id=[7, 8], pad_token_id=None)
    cfg = HookedMoE.from_pretrained(directory).cfg
    assert (cfg.bos_token_id, cfg.eos_token_id, cfg.pad_token_id) == (5, 7, None)
    assert (cfg.model_name, cfg.revision) == ("model", None)


def test_a_checkpoint_without_tokenizer_gives_a_model_without_one(directory: Path) -> None:
    assert HookedMoE.from_pretrained(directory).tokenizer is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted_to_the_asked_dtype(dtype: torch.dtype, directory: Path) -> None:
    model = HookedMoE.from_pretrained(directory, dtype=dtype)
    stored = load_file(directory / "model.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.cfg.dtype == dtype
    assert torch.equal(model.blocks[2].mlp.experts.W_in[7, 0], stored["model.layers.2.mlp.experts.7.gate_proj.weight"].to(dtype))
    assert torch.equal(model.blocks[2].mlp.experts.W_in[7, 1], stored["model.layers.2.mlp.experts.7.up_proj.weight"].to(dtype))


def test_a_loaded_model_can_be_trained(directory: Path) -> None:
    model = HookedMoE.from_pretrained(directory)
    model(random_tokens(), return_type="loss").backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tied_embeddings_are_one_parameter_and_a_repeated_copy_must_agree(tmp_path: Path) -> None:
    directory = save(tiny_olmoe(tie_word_embeddings=True), tmp_path)
    model = HookedMoE.from_pretrained(directory)
    assert model.unembed.W_U is model.embed.W_E

    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    HookedMoE.from_pretrained(directory)
    edit_tensors(directory, lambda t: t["lm_head.weight"][0, 0].add_(1))
    refusal(directory, "lm_head.weight", "tie_word_embeddings")


def test_shards_may_be_symbolic_links_as_in_the_cache_of_the_hub(sharded: Path, tmp_path: Path) -> None:
    blobs = sharded.rename(tmp_path / "blobs")
    sharded.mkdir()
    for blob in blobs.iterdir():
        (sharded / blob.name).symlink_to(blob)
    HookedMoE.from_pretrained(sharded)


PEAK_MEMORY = """
import sys, torch
from hooked_moe import HookedMoE
import hooked_moe.loading
def memory(which):
    return 1024 * int(open("/proc/self/status").read().split(which + ":")[1].split()[0])
HookedMoE.from_pretrained(sys.argv[1])  # what is imported or allocated once, whatever the size of the model
open("/proc/self/clear_refs", "w").write("5")  # start the high-water mark anew
before = memory("VmRSS")
model = HookedMoE.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
parameters = list(model.parameters())
print(memory("VmHWM") - before, sum(p.nbytes for p in parameters))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of peak memory")
def test_memory_peaks_at_the_model_and_one_tensor(make_model: Callable[..., HookedMoE], tmp_path: Path) -> None:
    """Pages of a mapped file count too: a loader that maps the file, or keeps its tensors, peaks at twice the model."""
    make_model().save_pretrained(tmp_path / "small")
    large = make_model(d_model=512, d_head=128, d_expert=512, num_experts=16, dtype=torch.bfloat16)
    large.save_pretrained(tmp_path / "large")
    peak, size = map(
        int,
        subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY, tmp_path / "small", tmp_path / "large"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
        ).stdout.split(),
    )
    assert size > 70e6
    assert peak < size + 15e6


# Configs that are refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ["'llama'", "supported are: olmoe"]),
        ({"model_type": ...}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"sliding_window": 128}, ["sliding_window=128"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_type='yarn'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["type='linear'"]),
        ({"rope_theta": 77.0}, ["rope_theta=77.0", "rope_parameters.rope_theta=10000.0", "contradict"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"head_dim": 32}, ["head_dim=32", "16"]),
        ({"num_attention_heads": 3}, ["hidden_size (64)", "num_attention_heads (3)"]),
        ({"num_key_value_heads": 3}, ["n_key_value_heads (3)"]),
        ({"num_experts_per_tok": 11}, ["experts_per_token (11)"]),
        ({"num_hidden_layers": ...}, ["num_hidden_layers is missing"]),
        ({"vocab_size": "97"}, ["vocab_size", "'97'"]),
        ({"clip_qkv": -1.0}, ["clip_qkv"]),
        ({"norm_topk_prob": "yes"}, ["norm_topk_prob", "'yes'"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported_is_refused_by_name(change: dict[str, Any], words: list[str], directory: Path) -> None:
    edit_config(directory, **change)
    refusal(directory, "config.json", *words)


@pytest.mark.parametrize(
    "harmless", [{"sliding_window": 0}, {"sliding_window": 128, "use_sliding_window": False}, {"head_dim": 16}]
)
def test_an_option_that_changes_nothing_is_accepted(harmless: dict[str, Any], directory: Path) -> None:
    edit_config(directory, **harmless)
    HookedMoE.from_pretrained(directory)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_config_that_is_no_json_object_is_named(text: str, directory: Path) -> None:
    (directory / "config.json").write_text(text)
    refusal(directory, "config.json", "JSON")


# Tensors that do not fit


def test_all_missing_extra_and_misshaped_tensors_are_listed(directory: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(32, 64)

    edit_tensors(directory, damage)
    refusal(
        directory,
        "2 missing",
        "model.norm.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "1 not part of this model",
        "model.layers.0.self_attn.q_proj.bias",
        "1 of another shape",
        "model.layers.2.self_attn.k_proj.weight: [32, 64], expected [64, 64]",
    )


def test_long_lists_are_cut_with_a_count(directory: Path) -> None:
    edit_config(directory, num_hidden_layers=4)
    message = refusal(directory, "39 missing", "... and 29 more", "model.layers.3.input_layernorm.weight")
    assert message.count("model.layers.3") == 10


def test_a_config_whose_numbers_disagree_with_the_tensors_is_refused(directory: Path) -> None:
    edit_config(directory, intermediate_size=20)
    refusal(directory, "90 of another shape", "[24, 64], expected [20, 64] (d_expert d_model)")


def test_an_expert_stored_both_fused_and_alone_is_refused(tmp_path: Path) -> None:
    directory = save(tiny_olmoe(), tmp_path, fused=True)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.zeros(24, 64)}))
    refusal(directory, "1 not part of this model", name)


def test_tensors_that_are_not_floating_point_are_refused(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    refusal(directory, "model.norm.weight: I8", "BF16")


# Files that are not what they should be


@pytest.mark.parametrize("kept", [0, 4, 100, 5_000, -1])
def test_a_truncated_file_is_named(kept: int, sharded: Path) -> None:
    file = shards_of(sharded)[1]
    file.write_bytes(file.read_bytes()[:kept])
    refusal(sharded, file.name, "truncated")


def test_a_file_that_is_no_safetensors_is_named_and_never_unpickled(directory: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(64)}, directory / "model.safetensors")
    refusal(directory, "model.safetensors is not a readable safetensors file")


def test_a_git_lfs_pointer_is_recognised(directory: Path) -> None:
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refusal(directory, "git lfs pull")


def test_pickled_weights_are_not_opened(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refusal(directory, "pytorch_model.bin", "convert them to safetensors")


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refusal(directory, "no weights", "model.safetensors.index.json")


def test_missing_shards_are_named(sharded: Path) -> None:
    gone = [file.name for file in shards_of(sharded)[2:4]]
    for name in gone:
        (sharded / name).unlink()
    refusal(sharded, "index.json names shards that are not there", *gone)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refusal(sharded, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/{}/outside.safetensors", "sub/x.safetensors", "a\\b.safetensors", "x.bin"]
)
def test_an_index_is_not_followed_out_of_its_directory(shard: str, sharded: Path, tmp_path: Path) -> None:
    shard = shard.replace("{}", str(tmp_path).strip("/"))
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "outside.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    refusal(sharded, repr(shard), "not followed")


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(sharded: Path) -> None:
    shards = {}

    def swap(weight_map: dict[str, str]) -> None:
        shards["right"] = weight_map["model.norm.weight"]
        shards["wrong"] = next(shard for shard in weight_map.values() if shard != shards["right"])
        weight_map["model.norm.weight"] = shards["wrong"]

    edit_index(sharded, swap)
    refusal(sharded, f"model.norm.weight is in {shards['right']}; the index says {shards['wrong']}")


def test_a_tensor_that_the_index_invents_or_forgets_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"invented": weight_map.pop("model.norm.weight")}))
    refusal(sharded, "invented is not in", "model.norm.weight is in", "nothing of it")


def test_a_broken_tokenizer_is_named(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable"):
        HookedMoE.from_pretrained(directory)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [torch.int8, "float32", torch.float8_e4m3fn])
def test_a_dtype_that_no_model_can_have_is_refused(dtype: Any, directory: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*torch\.bfloat16"):
        HookedMoE.from_pretrained(directory, dtype=dtype)
