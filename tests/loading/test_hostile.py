"""Checkpoints that state sizes they do not have, and values that no model can have: refused before anything is made of them."""

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
from hooked_moe.transformer import Transformer
from tests.fuzz.checkpoints import small_checkpoints
from weights_conversion import CheckpointError

OLMOE, QWEN, DEEPSEEK = range(3)


@pytest.fixture(scope="module")
def checkpoints() -> list[dict[str, bytes]]:
    return small_checkpoints()


@pytest.fixture
def write(checkpoints: list[dict[str, bytes]], tmp_path: Path) -> Callable[..., Path]:
    """A small checkpoint, the Qwen in shards, with values of its config.json changed."""

    def written(which: int = OLMOE, **changes: Any) -> Path:
        for name, data in checkpoints[which].items():
            (tmp_path / name).write_bytes(data)
        config = json.loads((tmp_path / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return written


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be laid out."""
    monkeypatch.setattr(Transformer, "__init__", lambda *args, **options: pytest.fail("a model of these sizes was begun"))


def refusal(directory: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        HookedMoE.from_pretrained(directory)
    message = str(caught.value)
    for word in (str(directory), *words):
        assert word in message, message
    assert len(message) < 3000
    assert message.replace("\n", "").isprintable()
    return message


HUGE = [10**6, 10**8, 2**31, 2**62, 2**63, 10**18, 10**400]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("size", HUGE, ids=lambda size: f"{size:.0e}" if size < 10**300 else "400 digits")
@pytest.mark.parametrize(
    ("which", "key"),
    [
        *((OLMOE, key) for key in ("num_hidden_layers", "num_experts", "hidden_size", "vocab_size", "intermediate_size")),
        *((OLMOE, key) for key in ("num_attention_heads", "num_key_value_heads", "num_experts_per_tok")),
        *((QWEN, key) for key in ("shared_expert_intermediate_size", "moe_intermediate_size", "intermediate_size", "head_dim")),
        *(
            (DEEPSEEK, key)
            for key in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "n_shared_experts", "first_k_dense_replace")
        ),
    ],
)
def test_a_size_that_the_weights_do_not_have_is_refused_before_there_is_a_model(
    which: int, key: str, size: int, write: Callable[..., Path]
) -> None:
    refusal(write(which, **{key: size}), "config.json")


@pytest.mark.usefixtures("no_model")
def test_as_many_layers_as_a_header_names_but_does_not_hold_are_refused(write: Callable[..., Path]) -> None:
    """Tensors without values take 60 bytes of a header each."""
    directory = write(num_hidden_layers=1000)
    tensors = load_file(directory / "model.safetensors") | {f"model.layers.{i}.x": torch.empty(0) for i in range(2, 1000)}
    save_file(tensors, directory / "model.safetensors")
    refusal(directory, "routers in 1000 layers, and these are missing", "model.layers.2.mlp.gate.weight", "and 988 more")


@pytest.mark.usefixtures("no_model")
def test_routers_of_another_size_are_listed(write: Callable[..., Path]) -> None:
    message = refusal(write(num_experts=5), "model.layers.0.mlp.gate.weight: [4, 16], expected [5, 16] (expert d_model)")
    assert "model.layers.1.mlp.gate.weight" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, not nan"),
        ({"rms_norm_eps": -1e-5}, "eps must be a number from 0"),
        ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta must be a finite number, not inf"),
        ({"rope_theta": 0, "rope_parameters": None}, "rotary_base must be a number from 2"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "rope_theta must be a finite number"),
        ({"clip_qkv": float("nan")}, "clip_qkv must be a finite number, not nan"),
        ({"initializer_range": 1e300}, "initializer_range must be a number from 0"),
        ({"layer_types": 5}, "layer_types must be a list, not 5"),
        ({"rope_parameters": {"rope_type": [], "type": {}}}, "contradict each other"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type=['yarn'] is not supported"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"vocab_size": "300"}, "vocab_size must be a whole number"),
        ({"vocab_size": 300.0}, "vocab_size must be a whole number"),
        ({"hidden_act": "\x1b[2Jgelu" + "x" * 100_000}, r"hidden_act='\x1b[2Jgelu"),
        ({"model_type": "\x1b]0;title\x07"}, r"model_type '\x1b]0;title\x07' is not supported"),
        ({"tie_word_embeddings": "x" * 100_000}, "tie_word_embeddings must be true or false"),
    ],
    ids=range(16),
)
@pytest.mark.usefixtures("no_model")
def test_a_value_that_no_model_can_have_is_named_and_shown_without_harm(
    change: dict[str, Any], words: str, write: Callable[..., Path]
) -> None:
    refusal(write(**change), "config.json", words)


@pytest.mark.usefixtures("no_model")
def test_a_list_of_another_length_is_cut_short(write: Callable[..., Path]) -> None:
    directory = write(QWEN, layer_types=["full_attention"] * 2000)
    assert len(refusal(directory, "layer_types must be a list of 2 kinds, one a layer, not [")) < 600


def test_long_layers_of_a_config_are_cut_short() -> None:
    with pytest.raises(ValueError, match="dense_layers must be ascending layers from 0 to 5") as caught:
        HookedMoE.from_pretrained("tiny-olmoe").cfg.replace(dense_layers=(1,) * 4000, d_mlp=8)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("config.json", '{"model_type": "olmoe", "model_type": "mixtral"}', "the key 'model_type' stands twice"),
        ("config.json", '{"num_experts": ' + "9" * 5000 + "}", "thousands of digits"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands twice"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "\\u001b[2J.safetensors"}}', r"'\x1b[2J.safetensors'"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "\\ud800.safetensors"}}', "'\\ud800.safetensors'"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "' + "x" * 300 + '.safetensors"}}', "not followed"),
    ],
    ids=range(7),
)
def test_json_that_is_none_is_refused_with_the_cause(name: str, text: str, words: str, write: Callable[..., Path]) -> None:
    directory = write(QWEN)
    (directory / name).write_text(text)
    refusal(directory, name, words)


def edit_header(file: Path, edit: Callable[[dict[str, Any]], str]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = edit(json.loads(data[8 : 8 + length])).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"


def twice(header: dict[str, Any]) -> str:
    """A second entry of the same name, for another tensor's values: a reader may take either."""
    return json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header["model.layers.0.input_layernorm.weight"])}' + "}"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (twice, "header"),
        (lambda header: json.dumps(header | {NORM: list(header[NORM].values())}), "header"),
        (lambda header: json.dumps(header | {NORM: header[NORM] | {"data_offsets": [0, 2**40]}}), "is not a readable"),
        (lambda header: json.dumps(header | {NORM: header["model.layers.0.input_layernorm.weight"]}), "is not a readable"),
        (lambda header: json.dumps(header | {NORM: header[NORM] | {"shape": [2**62, 4]}}), "is not a readable"),
        (lambda header: "[" * 50_000, "is not a readable"),
    ],
    ids=["twice", "a list", "beyond the file", "overlapping", "too large", "nested"],
)
def test_a_header_that_lies_is_refused(edit: Callable[[dict[str, Any]], str], words: str, write: Callable[..., Path]) -> None:
    directory = write()
    edit_header(directory / "model.safetensors", edit)
    refusal(directory, "model.safetensors", words)


def test_names_of_tensors_are_shown_without_harm(write: Callable[..., Path]) -> None:
    directory = write()
    tensors: dict[str, Tensor] = load_file(directory / "model.safetensors")
    save_file(tensors | {"\x1b[2Jx": torch.ones(1), "y" * 5000: torch.ones(1)}, directory / "model.safetensors")
    refusal(directory, "2 not part of this model", r"\x1b[2Jx", "yyy...")


def test_a_config_that_tells_the_truth_is_loaded(write: Callable[..., Path]) -> None:
    for which in (OLMOE, QWEN, DEEPSEEK):
        assert HookedMoE.from_pretrained(write(which)).cfg.n_layers == 2
        for file in write(which).iterdir():
            file.unlink()
