"""Reading checkpoints from a directory: parity with transformers, memory, and every way a checkpoint can be wrong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_moe import HookedMoE, HookedMoEConfig
from hooked_moe.loading import from_pretrained
from hooked_moe.loading.published import published_values
from tests.support.hf_models import CASES, FAMILIES, Options, logits_of, pair_of, random_tokens, save, tiny_olmoe
from weights_conversion import CONVERSIONS, CheckpointError, HFConfig
from weights_conversion.weight_map import slots_by_parameter

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
@pytest.mark.parametrize("case", [case for case, (_, option) in CASES.items() if option in ("plain", "all-at-once")])
def test_logits_equal_those_of_transformers(case: str, layout: str, tmp_path: Path) -> None:
    theirs, how = pair_of(case).hf, LAYOUTS[layout]
    ours = HookedMoE.from_pretrained(save(theirs, tmp_path, **how))
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == how.get("sharded", False)
    fused = how.get("fused", False) or case.startswith("gpt_oss")  # which has no other layout
    assert any(".gate_up_proj" in name for file in files for name in load_file(file)) == fused
    tokens = random_tokens()
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(theirs, tokens), atol=5e-5, rtol=0)


def test_special_tokens_and_name_reach_the_config(directory: Path) -> None:
    edit_config(directory, bos_token_id=5, eos_token_id=[7, 8], pad_token_id=None)
    cfg = HookedMoE.from_pretrained(directory).cfg
    assert (cfg.bos_token_id, cfg.eos_token_id, cfg.pad_token_id) == (5, (7, 8), None)
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


class OwnModel(HookedMoE):
    """A user's model: one more method, and a forward of its own."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return super().forward(*inputs, **options) + 1

    def clean_logits(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_subclass_loads_as_that_subclass(stream: bool, directory: Path) -> None:
    model = OwnModel.from_pretrained(directory, stream=stream)
    assert type(model) is OwnModel
    assert type(from_pretrained(OwnModel, directory, stream=stream)) is OwnModel
    assert type(HookedMoE.from_pretrained(directory, stream=stream)) is HookedMoE
    with torch.no_grad():
        expected = HookedMoE.from_pretrained(directory)(random_tokens())
        assert torch.equal(model.clean_logits(random_tokens()), expected)
        assert torch.equal(model(random_tokens()), expected + 1)


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
open("/proc/self/clear_refs", "w").write("5")  # reset the high-water mark
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
            cwd=Path(__file__).parents[2],
        ).stdout.split(),
    )
    assert size > 70e6
    assert peak < size + 15e6


# Configs


def read(values: Options) -> HookedMoEConfig:
    return CONVERSIONS[values["model_type"]].from_hf(HFConfig(values, "config.json"))


def without_special_tokens(cfg: HookedMoEConfig) -> HookedMoEConfig:
    return cfg.replace(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def as_transformers_reads(values: Options) -> HookedMoEConfig:
    """transformers' own config object of a config.json, in our terms. Its default special tokens are those of one model."""
    family = CONVERSIONS[values["model_type"]].model_type
    config = FAMILIES[family].config(**copy.deepcopy(values)).to_dict()
    return without_special_tokens(read(config | {"model_type": family}))


def config_file(family: str, directory: Path, **options: Any) -> Options:
    """config.json of a tiny model as transformers 5 writes it."""
    FAMILIES[family].tiny_config(**options).save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def in_words_of_the_hub(values: Options) -> Options:
    """The same config.json as older versions of transformers wrote it."""
    hub = dict(values)
    rotary = hub.pop("rope_parameters")
    hub["rope_theta"] = rotary["rope_theta"]
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "rope_type")}
    hub["rope_scaling"] = {"type": rotary["rope_type"], **scaling} if scaling else None
    if hub["model_type"] == "gpt_oss" and not scaling:
        hub["rope_scaling"] = {"rope_type": "default"}  # null stands for its own
    if hub["model_type"] == "glm4_moe":
        hub["partial_rotary_factor"] = hub["rope_scaling"].pop("partial_rotary_factor")
        hub["rope_scaling"] = None
    hub["torch_dtype"] = hub.pop("dtype", "float32")
    if hub["model_type"] == "qwen3_moe":
        hub["num_experts"] = hub.pop("num_local_experts")
    return hub


@pytest.mark.parametrize("case", CASES)
def test_configs_of_the_hub_say_the_same_in_their_own_words(case: str, tmp_path: Path) -> None:
    family, option = CASES[case]
    newer = config_file(family, tmp_path, **FAMILIES[family].options[option])
    older = in_words_of_the_hub(newer)
    assert read(older) == read(newer)
    assert as_transformers_reads(older) == without_special_tokens(read(newer))


LATENT = {
    "n_routed_experts",
    "moe_intermediate_size",
    "intermediate_size",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
}
SIZES = {
    "olmoe": {"num_experts", "intermediate_size"},
    "qwen2_moe": {"num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"},
    "deepseek_v2": LATENT,
    "qwen3_moe": {"num_local_experts", "moe_intermediate_size"},
    "mixtral": {"num_local_experts", "intermediate_size"},
    "deepseek_v3": LATENT | {"n_group", "topk_group", "first_k_dense_replace"},  # whose defaults fit no tiny model
    "glm4_moe": {"n_routed_experts", "moe_intermediate_size", "intermediate_size"},
    "glm4_moe_lite": LATENT,
    "gpt_oss": {"num_local_experts", "intermediate_size"},
}
HEADS = {"deepseek_v3": 128, "glm4_moe_lite": 20}
"""For as many queries the default number of keys makes sense; 16 elsewhere."""


@pytest.mark.parametrize("family", FAMILIES)
def test_options_that_a_config_leaves_out_have_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    """Sizes have none here: a config has to state them."""
    heads = HEADS.get(family, 16)
    values = config_file(family, tmp_path, num_attention_heads=heads, num_key_value_heads=heads)
    required = set()
    for key in values.keys() - {"model_type"}:
        fewer = {other: value for other, value in values.items() if other != key}
        try:
            cfg = read(fewer)
        except CheckpointError:
            required.add(key)
        else:
            assert without_special_tokens(cfg) == as_transformers_reads(fewer), key
    assert (
        required
        == {"hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok"} | SIZES[family]
    )


@dataclass(frozen=True)
class Published:
    """A published model: its config.json, and what its safetensors hold."""

    config: Options
    parameters: int
    tensors: int | None = None
    """Where they were counted on the hub."""


PUBLISHED = {
    name: Published(published_values(name), *counted)
    for name, counted in {
        "deepseek-ai/DeepSeek-V3": (671_026_419_200,),
        "moonshotai/Moonlight-16B-A3B": (15_960_110_208,),
        "moonshotai/Kimi-K2-Instruct": (1_026_408_232_448,),
        "zai-org/GLM-4.5-Air": (106_852_251_264,),
        "zai-org/GLM-4.7-Flash": (29_943_393_920,),
        "openai/gpt-oss-20b": (20_914_757_184,),
        "openai/gpt-oss-120b": (116_829_156_672,),
        "allenai/OLMoE-1B-7B-0924": (6_919_161_856, 3_219),
        "Qwen/Qwen1.5-MoE-A2.7B": (14_315_784_192, 4_659),
        "deepseek-ai/DeepSeek-V2-Lite": (15_706_484_224, 5_291),
        "Qwen/Qwen3-30B-A3B-Base": (30_532_122_624, 18_867),
        "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, 995),
    }.items()
}


LARGEST = ("deepseek-ai/DeepSeek-V3", "moonshotai/Kimi-K2-Instruct")
"""So many experts that their hook points alone take seconds."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGEST)) for name in PUBLISHED])
def test_published_configs_describe_the_models_that_were_published(name: str) -> None:
    published = PUBLISHED[name]
    cfg = read(published.config)
    assert without_special_tokens(cfg) == as_transformers_reads(published.config)
    parameters = dict(HookedMoE(cfg.replace(device=torch.device("meta"))).named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == published.parameters
    slots = slots_by_parameter(CONVERSIONS[cfg.model_type].weights, cfg, parameters)
    assert slots.keys() == parameters.keys()
    assert published.tensors is None or sum(map(len, slots.values())) == published.tensors


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("deepseek-ai/DeepSeek-V3", 0.1352338),
        ("moonshotai/Kimi-K2-Instruct", 0.1308608),
        ("moonshotai/Moonlight-16B-A3B", 0.0721688),
        ("zai-org/GLM-4.7-Flash", 256**-0.5),
    ],
)
def test_scores_of_published_models_are_scaled(name: str, scale: float) -> None:
    assert read(PUBLISHED[name].config).attention_scale == pytest.approx(scale, abs=1e-7)


def test_gpt_oss_scales_rotations_and_sees_128_tokens_in_every_other_layer() -> None:
    cfg = read(PUBLISHED["openai/gpt-oss-20b"].config)
    assert cfg.rotary_scaling is not None
    assert cfg.rotary_scaling.rotation_scale == pytest.approx(1.3465736, abs=1e-7)
    assert [cfg.window_of(layer) for layer in range(4)] == [128, None, 128, None]


def test_deepseek_v2_lite_scales_scores_but_not_rotations() -> None:
    cfg = read(PUBLISHED["deepseek-ai/DeepSeek-V2-Lite"].config)
    assert cfg.attention_scale == pytest.approx(0.1147213868, abs=1e-10)
    assert cfg.rotary_scaling is not None
    assert cfg.rotary_scaling.rotation_scale == 1


# Configs that are refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ["'llama'", "supported are: olmoe"]),
        ({"model_type": ...}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"sliding_window": 128}, ["sliding_window=128"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
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


WINDOW, YARN = {"sliding_window": 128}, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
BOTH = {"mscale": 0.7, "mscale_all_dim": 0.7}


@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "longrope"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_positions_of_another_kind_are_refused(family: str, kind: str, dialect: str, tmp_path: Path) -> None:
    values = config_file(family, tmp_path) | {"rope_parameters": None, dialect: {"rope_type": kind, "factor": 2.0}}
    with pytest.raises(CheckpointError, match=rf"config\.json: {dialect}: rope_type='{kind}' is not supported"):
        read(values)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("olmoe", WINDOW, "sliding_window=128"),
        ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be a list of 3 kinds"),
        ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types must be a list of 3 kinds"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, "contradicts use_sliding_window=False"),
        ("qwen3_moe", {"layer_types": ["linear_attention"] * 3}, "'linear_attention' in layer_types is not supported"),
        ("deepseek_v2", WINDOW, "sliding_window=128"),
        ("deepseek_v3", WINDOW, "sliding_window=128"),
        ("glm4_moe", WINDOW, "sliding_window=128"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek_v3", {"index_topk": 2048}, "index_topk=2048 is not supported: learned sparse attention"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("deepseek_v3", {"n_group": 10, "topk_group": 5}, "group_score='top2' needs two experts in every group"),
        ("glm4_moe", {"rope_scaling": YARN | BOTH}, "mscale_all_dim is not supported in this family"),
        ("glm4_moe", {"partial_rotary_factor": 0.2}, "d_rotary must be even.*not 3"),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "first_k_dense_replace=2 is not supported: .* makes layers .0. dense"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must be a list of 3 kinds"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' in layer_types is not supported"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "limit and alpha must be positive"),
        ("glm4_moe", {"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method='compressed-tensors' is not"),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"blocks of fp8 are \[128, 128\]",
        ),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size=None"),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}},
            "fmt='e5m2'",
        ),
        ("deepseek_v3", {"quantization_config": {"bits": 4}}, "quant_method is missing"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, not 0"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "every layer is dense"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers must be a list of whole numbers, not 'all'"),
        ("qwen3_moe", {"num_key_value_heads": 3}, r"n_key_value_heads \(3\)"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=True"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group is missing"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("deepseek_v2", {"first_k_dense_replace": 3}, "every layer is dense"),
        ("deepseek_v2", {"rope_scaling": YARN | {"mscale": 0.7}}, "mscale=0.7 with mscale_all_dim=None"),
        ("deepseek_v2", {"rope_scaling": YARN | {"mscale_all_dim": 0.7}}, "mscale=None with mscale_all_dim=0.7"),
        ("deepseek_v2", {"rope_scaling": YARN | {"mscale": 0.0, "mscale_all_dim": 0.7}}, "mscale=0.0 with mscale_all_dim=0.7"),
        ("deepseek_v2", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0}}, "mscale=0.7 with mscale_all_dim=0.0"),
        ("deepseek_v2", {"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor=1.0"),
        ("deepseek_v2", {"rope_scaling": YARN | {"factor": 0.5}}, "factor and original_ctx must be at least 1"),
        ("deepseek_v2", {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_fast >= beta_slow"),
        ("deepseek_v2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings is missing"),
        ("deepseek_v2", {"rope_scaling": YARN | {"rope_type": "linear"}}, "rope_type=linear and type=yarn contradict"),
        ("deepseek_v2", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "contradict each other"),
        ("qwen3_moe", {"rope_scaling": YARN | BOTH}, "mscale_all_dim is not supported in this family"),
        ("mixtral", {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
    ids=str,
)
def test_what_a_family_does_not_have_here_is_refused_by_name(family: str, changes: Options, words: str, tmp_path: Path) -> None:
    values = config_file(family, tmp_path) | {"rope_parameters": None} | changes
    with pytest.raises(CheckpointError, match=rf"config\.json.*{words}"):
        read(values)


@pytest.mark.parametrize(
    ("family", "harmless"),
    [
        ("olmoe", {"sliding_window": 0}),
        ("olmoe", WINDOW | {"use_sliding_window": False}),
        ("olmoe", {"head_dim": 16}),
        ("qwen2_moe", WINDOW),
        ("qwen3_moe", WINDOW),
        ("qwen2_moe", {"layer_types": ["full_attention"] * 3}),
        ("qwen2_moe", WINDOW | {"layer_types": ["full_attention"] * 3, "use_sliding_window": True}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}),
        ("mixtral", {"sliding_window": 0}),
        ("mixtral", {"quantization_config": {}}),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}}),
        ("deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}),
        ("glm4_moe_lite", {"first_k_dense_replace": 1, "mlp_layer_types": None}),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}),
        ("deepseek_v2", {"topk_method": None, "n_group": 5, "topk_group": 1}),
        ("deepseek_v2", {"scoring_func": "softmax", "moe_layer_freq": 1, "num_key_value_heads": 4}),
        ("mixtral", {"router_jitter_noise": 0.1}),
    ],
    ids=str,
)
def test_an_option_that_changes_nothing_is_accepted(family: str, harmless: Options, tmp_path: Path) -> None:
    values = config_file(family, tmp_path)
    assert read(values | harmless) == read(values)


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
    def damage(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.") and not name.endswith("gate.weight")]:
            del tensors[name]

    edit_tensors(directory, damage)
    message = refusal(directory, "38 missing", "... and 28 more", "model.layers.2.input_layernorm.weight")
    assert message.count("model.layers.2") == 10


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
    refusal(sharded, "index.json names shards that do not exist", *gone)


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
@pytest.mark.parametrize("dtype", [torch.int8, "int8", "bf16", torch.float8_e4m3fn])
def test_a_dtype_that_no_model_can_have_is_refused(dtype: Any, directory: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*bfloat16"):
        HookedMoE.from_pretrained(directory, dtype=dtype)
