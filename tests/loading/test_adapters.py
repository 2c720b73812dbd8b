"""LoRA adapters: merged as PEFT merges them, and what is not plain LoRA is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_moe import HookedMoE
from tests.support.hf_models import FAMILIES, logits_of, random_tokens, save, tiny
from weights_conversion import CheckpointError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:transformers", "ignore::RuntimeWarning:peft"),
]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = {"deepseek_v2": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}


def train(model: torch.nn.Module) -> None:
    """Random factors: PEFT begins with B = 0."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted(case: str, directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, Path, torch.nn.Module]:
    """The directories of a base and of an adapter for it, and the base with the adapter merged by PEFT."""
    base = save(tiny(case), directory / "base")
    model = peft.get_peft_model(tiny(case).to(dtype), peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | options)))
    train(model)
    model.save_pretrained(directory / "adapter")
    return base, directory / "adapter", model.merge_and_unload()


def assert_merged(base: Path, adapter: Path, merged: torch.nn.Module) -> None:
    ours, expected = HookedMoE.from_pretrained(base, adapter=adapter), HookedMoE.from_hf(merged)
    plain, changed = HookedMoE.from_pretrained(base), 0
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), atol=1e-6, rtol=1e-5, msg=name)
        changed += not torch.equal(parameter, plain.get_parameter(name))
    assert changed
    tokens = random_tokens()
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(merged, tokens), atol=3e-5, rtol=1e-4)
    assert ours.cfg.model_name == "base+adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_weight_is_merged_as_peft_does(family: str, tmp_path: Path) -> None:
    modules = [*ATTENTION.get(family, ["q_proj", "k_proj", "v_proj", "o_proj"]), "lm_head", "embed_tokens"]
    if family == "qwen2_moe":
        modules += ["shared_expert.gate_proj", "shared_expert.down_proj"]
    if family == "deepseek_v2":
        modules += ["shared_experts.up_proj", "layers.0.mlp.gate_proj"]
    parameters = [] if family == "gpt_oss" else [*EXPERTS, "mlp.gate.weight"]
    assert_merged(*adapted(f"{family}-plain", tmp_path, target_modules=modules, target_parameters=parameters))


def test_experts_whose_input_comes_first_are_refused_rather_than_merged_askew(tmp_path: Path) -> None:
    base, adapter, _ = adapted("gpt_oss-plain", tmp_path, target_modules=["q_proj"], target_parameters=EXPERTS)
    with pytest.raises(
        CheckpointError, match="it has tensors for which the model has no weight of that name, or one of another shape"
    ):
        HookedMoE.from_pretrained(base, adapter=adapter)


OPTIONS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "ranks and alphas of their own": {
        "target_modules": ["q_proj", "k_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"layers.*.q_proj": 20, "experts.gate_up_proj": 1},
    },
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole modules alone": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "input_layernorm"]},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_that_leave_it_lora_are_read(options: dict[str, Any], tmp_path: Path) -> None:
    assert_merged(*adapted("olmoe-grouped-query", tmp_path, **options))


def test_experts_that_are_modules_of_their_own_are_merged_one_by_one(tmp_path: Path) -> None:
    """As transformers 4 has them; the factors are those of a linear layer each."""
    base = save(tiny("mixtral-plain"), tmp_path / "base")
    factors, expected = {}, HookedMoE.from_pretrained(base)
    generator = torch.Generator().manual_seed(4)
    places = {"w1": lambda e: e.W_in[3, 0], "w3": lambda e: e.W_in[3, 1], "w2": lambda e: e.W_out[3]}
    for name, place in places.items():
        weight = place(expected.blocks[1].mlp.experts)
        b, a = (torch.randn(shape, generator=generator) for shape in ((len(weight), 2), (2, weight.shape[1])))
        key = f"base_model.model.model.layers.1.block_sparse_moe.experts.3.{name}.lora_"
        factors |= {f"{key}A.weight": a, f"{key}B.weight": b}
        with torch.no_grad():
            weight += 2.5 * b @ a
    write_adapter(tmp_path / "adapter", factors, r=2, lora_alpha=5)
    ours = HookedMoE.from_pretrained(base, adapter=tmp_path / "adapter")
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), msg=name)


def write_adapter(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"} | config)
    )
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    base, adapter, _ = adapted("olmoe-plain", tmp_path, target_modules=["q_proj"])
    half = HookedMoE.from_pretrained(base, adapter=adapter, dtype="bfloat16")
    wide = HookedMoE.from_pretrained(base, adapter=adapter).blocks[0].attn.W_Q
    start = HookedMoE.from_pretrained(base, dtype="bfloat16").blocks[0].attn.W_Q
    exact = wide - HookedMoE.from_pretrained(base).blocks[0].attn.W_Q + start.float()
    torch.testing.assert_close(half.blocks[0].attn.W_Q, exact.bfloat16(), atol=0, rtol=2**-7)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, adapter, _ = adapted("olmoe-plain", tmp_path_factory.mktemp("plain"), target_modules=["q_proj"])
    return base, adapter


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"is not plain LoRA.*use_dora=True"),
        ({"peft_type": "IA3"}, r"peft_type='IA3' is not supported: LORA is"),
        ({"bias": "all"}, r"bias='all' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4'.*convert the adapter to plain LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\]"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication"),
        ({"some_new_variant": {"x": 1}}, r"some_new_variant=\{'x': 1\}"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    config: dict[str, Any], message: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = plain
    values = json.loads((adapter / "adapter_config.json").read_text())
    write_adapter(tmp_path, load_file(adapter / "adapter_model.safetensors"), **(values | config))
    with pytest.raises(ValueError, match=message):
        HookedMoE.from_pretrained(base, adapter=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(iter(t))), r"(?s)has only one factor of:.*self_attn.q_proj"),
        (lambda t: t.clear(), r"has no tensors"),
        (
            lambda t: t.update({"base_model.model.lm_heads.weight": torch.zeros(2)}),
            r"(?s)does not fit base.*lm_heads.weight: \[2\]",
        ),
        (
            lambda t: t.update({k: v[..., :5].clone() for k, v in t.items() if "lora_A" in k}),
            r"(?s)does not fit.*A \[4, 5\], B \[64, 4\]",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)}),
            r"magnitude",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    change: Callable[[dict[str, Tensor]], Any], message: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = plain
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    write_adapter(tmp_path, tensors, r=4, lora_alpha=6)
    with pytest.raises(ValueError, match=message):
        HookedMoE.from_pretrained(base, adapter=tmp_path)


def test_embeddings_that_are_tied_are_left_alone(tmp_path: Path) -> None:
    base, adapter, _ = adapted("olmoe-tied", tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"changes model.embed_tokens.weight, which this model ties"):
        HookedMoE.from_pretrained(base, adapter=adapter)


def test_an_adapter_is_not_a_model(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    with pytest.raises(CheckpointError, match=r"holds an adapter .*: load its base.* with adapter='.*adapter', which merges"):
        HookedMoE.from_pretrained(adapter)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json: give the directory of a PEFT adapter"):
        HookedMoE.from_pretrained(base, adapter=base)
    write_adapter(tmp_path, {"x": torch.zeros(1)})
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors, only a pickle, which can run code"):
        HookedMoE.from_pretrained(base, adapter=tmp_path)
    with pytest.raises(ValueError, match=r"stream=True keeps none there"):
        HookedMoE.from_pretrained(base, adapter=adapter, stream=True)
    model = peft.get_peft_model(tiny("olmoe-plain"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"this PeftModel.* merge them, with merge_and_unload"):
        HookedMoE.from_hf(model)
