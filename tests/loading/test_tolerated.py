"""Checkpoints that others load: read where the model is certainly right, with a note, and refused with a cause and a way out
otherwise."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_moe import HookedMoE, load_corpus
from tests.support.hf_models import FAMILIES, pair_of, save, tiny_olmoe
from weights_conversion import CheckpointError

INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tiny_olmoe(), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(tiny_olmoe(), tmp_path / "model", sharded=True)


def edit_tensors(file: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def same_weights(first: HookedMoE, second: HookedMoE) -> bool:
    other = dict(second.named_parameters())
    return all(torch.equal(parameter, other[name]) for name, parameter in first.named_parameters())


# Tensors that are computed


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.{}.self_attn.rotary_emb.inv_freq"],
        ["model.rotary_emb.inv_freq"],
        ["model.layers.{}.self_attn.rotary_emb.cos_cached", "model.layers.{}.self_attn.rotary_emb.sin_cached"],
    ],
    ids=lambda names: names[0].rsplit(".", 1)[-1],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])  # int64 is no dtype of weights
@pytest.mark.parametrize("stream", [False, True])
def test_rotary_buffers_are_not_read(names: list[str], dtype: torch.dtype, stream: bool, directory: Path) -> None:
    expected = HookedMoE.from_pretrained(directory)
    written = {name.format(layer): torch.ones(4, dtype=dtype) for name in names for layer in range(3)}
    edit_tensors(directory / "model.safetensors", lambda tensors: tensors.update(written))
    with pytest.warns(UserWarning, match=rf"{len(written)} of its tensors were not read, for they follow from the config"):
        model = HookedMoE.from_pretrained(directory, stream=stream)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens), expected(tokens))


def test_a_rotary_buffer_in_a_shard_needs_no_place_in_the_index(sharded: Path) -> None:
    expected = HookedMoE.from_pretrained(sharded)
    first = min(sharded.glob("model-*.safetensors"))
    edit_tensors(first, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same_weights(HookedMoE.from_pretrained(sharded), expected)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.weight", "rotary_emb.inv_freq.extra", "score.weight"])
def test_other_tensors_that_the_model_does_not_have_are_refused(name: str, directory: Path) -> None:
    edit_tensors(directory / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"1 not part of this model:\n  .*\nIf they belong to something else"):
        HookedMoE.from_pretrained(directory)


# Tied weights


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_are_stored_under_either_name(family: str, stream: bool, kept: str, tmp_path: Path) -> None:
    directory = save(pair_of(f"{family}-plain").hf, tmp_path / "model")
    edit_config(directory, tie_word_embeddings=True)
    stored = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]

    def keep_one(tensors: dict[str, Tensor]) -> None:
        tensors.pop("lm_head.weight", None)
        tensors[kept] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(directory / "model.safetensors", keep_one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to note: the two are one tensor, and it is there
        model = HookedMoE.from_pretrained(directory, stream=stream)
    assert torch.equal(model.embed.W_E, stored)
    assert model.unembed.W_U is model.embed.W_E


def test_an_unembedding_that_is_missing_is_refused_with_what_may_be_meant(directory: Path) -> None:
    edit_tensors(directory / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"If the unembedding is the embedding, say so in config.json: tie_word_embeddings"):
        HookedMoE.from_pretrained(directory)


# Copies that the index supersedes


@pytest.mark.parametrize("overlay", ["model-overlay.safetensors", "a-first.safetensors"])
def test_the_index_says_which_of_two_copies_is_meant(overlay: str, sharded: Path) -> None:
    new = torch.full((64, 64), 0.25)
    save_file({NAME: new}, sharded / overlay, metadata={"format": "pt"})
    index = json.loads((sharded / INDEX).read_text())
    old = index["weight_map"][NAME]
    index["weight_map"][NAME] = overlay
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.warns(UserWarning, match=rf"not read, for the index takes them from elsewhere.*\n.*{NAME} in {old}"):
        model = HookedMoE.from_pretrained(sharded)
    assert bool((model.blocks[1].attn.W_O == 0.25).all())


def test_a_tensor_that_the_index_does_not_know_is_refused_with_a_way_out(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    shard = index["weight_map"].pop(NAME)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"write in its weight_map which shard has what:\n  {NAME} is in {shard}"):
        HookedMoE.from_pretrained(sharded)


# Links and adapters


LINKED = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
LINKED += ["special_tokens_map.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_that_leads_nowhere_is_named(name: str, tmp_path: Path) -> None:
    """None is taken for a file that is not there: a model without its tokenizer, say."""
    tiny = Path(__file__).parents[2] / "hooked_moe" / "pretrained" / "tiny-olmoe"
    directory = Path(shutil.copytree(tiny, tmp_path / "snapshot"))
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*0123, which is not there: .* Download the model again"):
        HookedMoE.from_pretrained(directory)


def test_links_of_shards_of_directories_and_of_corpora_are_named_too(sharded: Path, tmp_path: Path) -> None:
    shard = min(sharded.glob("model-*.safetensors"))
    shard.unlink()
    shard.symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(CheckpointError, match=r"is a link to .*0123, which is not there"):
        HookedMoE.from_pretrained(sharded)
    (tmp_path / "latest").symlink_to(tmp_path / "removed")
    with pytest.raises(FileNotFoundError, match=r"latest is a link to .*removed, which is not there"):
        HookedMoE.from_pretrained(str(tmp_path / "latest"))
    (tmp_path / "texts.txt").symlink_to(tmp_path / "removed.txt")
    with pytest.raises(FileNotFoundError, match=r"texts.txt is a link to .*removed.txt, which is not there"):
        load_corpus(str(tmp_path / "texts.txt"))


def test_links_that_lead_somewhere_are_followed(directory: Path, tmp_path: Path) -> None:
    expected = HookedMoE.from_pretrained(directory)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert same_weights(HookedMoE.from_pretrained(directory), expected)


def test_an_adapter_is_no_model_and_is_not_passed_over_beside_one(directory: Path, tmp_path: Path) -> None:
    alone = tmp_path / "adapter"
    alone.mkdir()
    for place in (alone, directory):
        (place / "adapter_config.json").write_text("{}")
        save_file({"base_model.model.lora_A.weight": torch.ones(2)}, place / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"holds an adapter .*: load its base with adapter="):
            HookedMoE.from_pretrained(place)


def test_weights_of_an_adapter_among_others_are_named(directory: Path) -> None:
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)}
    edit_tensors(directory / "model.safetensors", lambda tensors: tensors.update(lora))
    with pytest.raises(CheckpointError, match="These are an adapter's: merge it"):
        HookedMoE.from_pretrained(directory)


def test_weights_under_another_name_are_named(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"it has model.fp16.safetensors, which neither names"):
        HookedMoE.from_pretrained(directory)
