"""Checkpoints as the hub has them: fp8 and mxfp4 blocks, several shards with an index, layers for multi-token prediction.

transformers reads none of these as they are (its fp8 loader refuses blocks that are cut off, its mxfp4 wants a GPU): the oracle
is its model with weights that are widened here, one value at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_moe import HookedMoE
from hooked_moe.counterfactuals import expert_effects
from hooked_moe.loading import CheckpointError, checkpoint, quantised
from tests.support.hf_models import FAMILIES, logits_of, random_tokens

Tensors = dict[str, Tensor]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no tensor is read at once."""
    monkeypatch.setattr(checkpoint, "PIECE", 1 << 13)


def write(directory: Path, config: dict[str, object], tensors: Tensors, shards: int = 3) -> Path:
    """A directory in the hub's layout; values and their scales may be in different shards."""
    directory.mkdir()
    weight_map = {}
    for number in range(shards):
        shard = {name: tensor for index, (name, tensor) in enumerate(sorted(tensors.items())) if index % shards == number}
        file = f"model-{number + 1:05}-of-{shards:06}.safetensors"
        save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# fp8


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales of a matrix, block by block."""
    rows, columns = (math.ceil(size / 128) for size in weight.shape)
    values, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            scales[row, column] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
    return values, scales


def from_fp8(values: Tensor, scales: Tensor) -> Tensor:
    wide = values.float()
    for row in range(wide.shape[0]):
        for column in range(0, wide.shape[1], 128):
            wide[row, column : column + 128] *= scales[row // 128, column // 128]
    return wide


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HookedMoE]:
    """A checkpoint like DeepSeek-V3's: blocks that are cut off on either side, and a layer for multi-token prediction. With it,
    transformers' model of the widened weights."""
    family = FAMILIES["deepseek_v3"]
    sizes = {"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 260, "num_experts": 6, "num_hidden_layers": 2}
    ranks = {"kv_lora_rank": 132, "q_lora_rank": 130, "n_group": 2, "topk_group": 1}
    theirs = family.tiny(**sizes, **ranks)
    state, stored = dict(theirs.state_dict()), {}
    per_expert = dict(state)
    for name, tensor in state.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + f"{expert}."
                per_expert |= {prefix + "gate_proj.weight": gate, prefix + "up_proj.weight": up}
            del per_expert[name]
        elif name.endswith("mlp.experts.down_proj"):
            per_expert |= {name.removesuffix("down_proj") + f"{e}.down_proj.weight": down for e, down in enumerate(tensor)}
            del per_expert[name]
    for name, tensor in per_expert.items():
        if name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")):
            stored[name], stored[name + "_scale_inv"] = in_fp8(tensor)
        elif name.endswith("e_score_correction_bias"):
            stored[name] = tensor.clone()
        else:
            stored[name] = tensor.bfloat16()
    widened = {
        name: from_fp8(tensor, stored[name + "_scale_inv"]) if name + "_scale_inv" in stored else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
    whole = dict(state)
    for name in state:
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            both = [torch.cat([widened[f"{prefix}{e}.{x}_proj.weight"] for x in ("gate", "up")]) for e in range(6)]
            whole[name] = torch.stack(both)
        elif name.endswith("mlp.experts.down_proj"):
            whole[name] = torch.stack([widened[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] for e in range(6)])
        else:
            whole[name] = widened[name]
    theirs.load_state_dict(whole)
    layer = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in stored.items() if ".layers.1." in name}
    layer |= dict(
        zip(
            ("model.layers.2.eh_proj.weight", "model.layers.2.eh_proj.weight_scale_inv"),
            in_fp8(torch.randn(160, 320)),
            strict=True,
        )
    )
    extras = {"enorm.weight": (160,), "hnorm.weight": (160,), "shared_head.norm.weight": (160,), "embed_tokens.weight": (97, 160)}
    layer |= {f"model.layers.2.{name}": torch.randn(shape).bfloat16() for name, shape in extras.items()}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    config = json.loads(theirs.config.to_json_string(use_diff=False))
    config |= {"quantization_config": FP8, "num_nextn_predict_layers": 1, "model_type": "kimi_k2"}
    directory = write(tmp_path_factory.mktemp("hub") / "fp8", config, stored | layer | frequencies)
    return directory, theirs


def test_an_fp8_checkpoint_is_the_model_of_its_widened_weights(deepseek: tuple[Path, HookedMoE]) -> None:
    directory, theirs = deepseek
    ours, tokens = HookedMoE.from_pretrained(directory), random_tokens()
    assert ours.cfg.model_type == "deepseek_v3"
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(theirs, tokens), atol=5e-5, rtol=0)
    gate_up = theirs.model.layers[1].mlp.experts.gate_up_proj.detach()
    assert torch.equal(ours.blocks[1].mlp.experts.W_in.flatten(1, 2), gate_up)
    assert torch.equal(ours.blocks[1].attn.W_DKV, theirs.model.layers[1].self_attn.kv_a_proj_with_mqa.weight)


def test_in_half_precision_the_selection_bias_is_not_rounded(deepseek: tuple[Path, HookedMoE]) -> None:
    directory, theirs = deepseek
    router = HookedMoE.from_pretrained(directory, dtype=torch.bfloat16).blocks[1].mlp.router
    assert torch.equal(router.b_selection, theirs.model.layers[1].mlp.gate.e_score_correction_bias)
    assert (router.W.dtype, router.b_selection.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("checkpoint_of", ["deepseek", "gpt_oss"])
def test_quantised_checkpoints_are_streamed_and_measured_alike(checkpoint_of: str, request: pytest.FixtureRequest) -> None:
    directory, _ = request.getfixturevalue(checkpoint_of)
    whole, streamed = HookedMoE.from_pretrained(directory), HookedMoE.from_pretrained(directory, stream=True)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(streamed(tokens), whole(tokens))
    one, other = (expert_effects(model, tokens, positions=[0, 5, 8]) for model in (whole, streamed))
    assert torch.equal(one.delta_loss.nan_to_num(), other.delta_loss.nan_to_num())


@pytest.mark.parametrize("checkpoint_of", ["deepseek", "gpt_oss"])
def test_what_was_widened_is_saved_wide_and_comes_back_to_the_bit(
    checkpoint_of: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    directory, theirs = request.getfixturevalue(checkpoint_of)
    ours = HookedMoE.from_pretrained(directory)
    ours.save_pretrained(tmp_path)
    again = HookedMoE.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    loaded = type(theirs).from_pretrained(tmp_path, attn_implementation="eager")
    tokens = random_tokens()
    torch.testing.assert_close(logits_of(loaded.eval(), tokens), logits_of(ours, tokens), atol=5e-5, rtol=0)


def test_a_layer_too_many_is_refused_if_it_is_not_for_multi_token_prediction(
    deepseek: tuple[Path, HookedMoE], tmp_path: Path
) -> None:
    copied = copy_of(deepseek[0], tmp_path / "more", lambda tensors: drop(tensors, "model.layers.2.eh_proj"))
    with pytest.raises(CheckpointError, match=r"not part of this model[\s\S]*model\.layers\.2"):
        HookedMoE.from_pretrained(copied)


def drop(tensors: Tensors, prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def copy_of(directory: Path, to: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    """The checkpoint with other tensors."""
    tensors: Tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return write(to, json.loads((directory / "config.json").read_text()), edit(tensors))


SCALE = "model.layers.1.self_attn.o_proj.weight_scale_inv"
BLOCKS, SCALES = "model.layers.0.mlp.experts.down_proj_blocks", "model.layers.0.mlp.experts.down_proj_scales"


@pytest.mark.parametrize(
    ("checkpoint_of", "edit", "words"),
    [
        ("deepseek", lambda t: drop(t, SCALE), r"o_proj\.weight: F8_E4M3"),
        ("deepseek", lambda t: t | {SCALE: torch.ones(3, 1)}, r"o_proj\.weight: F8_E4M3"),
        ("deepseek", lambda t: t | {SCALE: t[SCALE].bfloat16()}, r"o_proj\.weight: F8_E4M3"),
        ("gpt_oss", lambda t: drop(t, SCALES), r"down_proj_blocks: U8"),
        ("gpt_oss", lambda t: t | {SCALES: t[SCALES][:, :5].clone()}, r"down_proj_blocks: U8"),
    ],
)
def test_blocks_without_the_scales_that_go_with_them_are_refused(
    checkpoint_of: str, edit: Callable[[Tensors], Tensors], words: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    directory, _ = request.getfixturevalue(checkpoint_of)
    with pytest.raises(CheckpointError, match=words):
        HookedMoE.from_pretrained(copy_of(directory, tmp_path / "edited", edit))


# mxfp4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def in_mxfp4(*shape: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random blocks and scales of a tensor [expert, row, column]."""
    experts, rows, columns = shape
    blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator).to(torch.uint8)
    return blocks, torch.randint(120, 126, (experts, rows, columns // 32), generator=generator).to(torch.uint8)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """One value at a time: bit 3 is the sign, bits 0 to 2 the place in the table; the low half of a byte comes first."""
    rows = []
    for row, exponents in zip(blocks.flatten(0, -3).tolist(), scales.flatten(0, -2).tolist(), strict=True):
        nibbles = [
            (half, exponent)
            for block, exponent in zip(row, exponents, strict=True)
            for byte in block
            for half in (byte % 16, byte // 16)
        ]
        rows.append([(-1 if nibble & 8 else 1) * E2M1[nibble & 7] * 2.0 ** (exponent - 127) for nibble, exponent in nibbles])
    return torch.tensor(rows).view(*blocks.shape[:-2], -1)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HookedMoE]:
    """A checkpoint like gpt-oss's, and transformers' model of the widened weights."""
    theirs = FAMILIES["gpt_oss"].tiny(hidden_size=96, intermediate_size=64, num_experts=4, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(3)
    stored: Tensors = {}
    for name, parameter in theirs.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            outputs_first = parameter.mT.shape
            blocks, scales = in_mxfp4(*outputs_first, generator=generator)
            stored |= {name + "_blocks": blocks, name + "_scales": scales}
            parameter.data = from_mxfp4(blocks, scales).mT.contiguous()
        else:
            stored[name] = parameter.detach().bfloat16()
            parameter.data = stored[name].float()
    config = json.loads(theirs.config.to_json_string(use_diff=False)) | {"quantization_config": MXFP4}
    return write(tmp_path_factory.mktemp("hub") / "mxfp4", config, stored), theirs


def test_an_mxfp4_checkpoint_is_the_model_of_its_widened_weights(gpt_oss: tuple[Path, HookedMoE]) -> None:
    directory, theirs = gpt_oss
    ours, tokens = HookedMoE.from_pretrained(directory), random_tokens()
    experts, expected = ours.blocks[1].mlp.experts, theirs.model.layers[1].mlp.experts
    assert torch.equal(experts.W_in[:, 0], expected.gate_up_proj.mT[:, ::2])
    assert torch.equal(experts.W_in[:, 1], expected.gate_up_proj.mT[:, 1::2])
    assert torch.equal(experts.W_out, expected.down_proj.mT)
    assert torch.equal(
        HookedMoE.from_pretrained(directory, dtype=torch.bfloat16).blocks[1].mlp.experts.W_out.float(), experts.W_out
    )
    difference = logits_of(ours, tokens) - logits_of(theirs, tokens)
    assert difference.abs().max() < 5e-5


def high_nibble_first(values: Tensor, scales: Tensor) -> Tensor:
    return widen_mxfp4((values >> 4) | (values << 4), scales)


def another_bias(values: Tensor, scales: Tensor) -> Tensor:
    return widen_mxfp4(values, scales - 1)


def unscaled(values: Tensor, scales: Tensor) -> Tensor:
    return widen_fp8(values, torch.full_like(scales, scales.mean()))


widen_fp8, widen_mxfp4 = quantised.widen_fp8, quantised.widen_mxfp4


@pytest.mark.parametrize(
    ("checkpoint_of", "name", "wrong"),
    [
        ("gpt_oss", "widen_mxfp4", high_nibble_first),
        ("gpt_oss", "widen_mxfp4", another_bias),
        ("deepseek", "widen_fp8", unscaled),
    ],
)
def test_another_reading_of_the_blocks_would_be_noticed(
    checkpoint_of: str,
    name: str,
    wrong: Callable[[Tensor, Tensor], Tensor],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory, theirs = request.getfixturevalue(checkpoint_of)
    monkeypatch.setattr(quantised, name, wrong)
    tokens = random_tokens()
    assert (logits_of(HookedMoE.from_pretrained(directory), tokens) - logits_of(theirs, tokens)).abs().max() > 5e-3


def test_blocks_that_transformers_saved_wide_are_the_plain_tensors(gpt_oss: tuple[Path, HookedMoE], tmp_path: Path) -> None:
    """transformers 5 keeps the name of the blocks, and cannot load what it saved."""
    directory, _ = gpt_oss

    def widened(tensors: Tensors) -> Tensors:
        names = [name for name in tensors if name.endswith("_blocks")]
        wide = {
            name: from_mxfp4(tensors[name], tensors[name.removesuffix("blocks") + "scales"]).mT.contiguous() for name in names
        }
        return {name: tensor for name, tensor in tensors.items() if not name.endswith("_scales")} | wide

    resaved = HookedMoE.from_pretrained(copy_of(directory, tmp_path / "wide", widened))
    ours = HookedMoE.from_pretrained(directory)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), resaved.parameters(), strict=True))
