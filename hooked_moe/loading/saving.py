"""`save_pretrained`: a model as a directory in HuggingFace layout."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hooked_moe.checks import expanded_path
from hooked_moe.config import HookedMoEConfig
from hooked_moe.loading.beside import GENERATION_CONFIG, OF_A_MODEL, TEMPLATES, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from hooked_moe.loading.checkpoint import INDEX_FILE, SINGLE_FILE
from hooked_moe.tokenizer import Tokenizer
from hooked_moe.transformer import Transformer
from weights_conversion import conversion_for
from weights_conversion.weight_map import Slot, slots_by_parameter

MAX_SHARD_BYTES = 5_000_000_000
"""Larger checkpoints are split into several files and an index, as transformers does."""
_TEMPORARY = ".tmp"


def save_pretrained(model: Transformer, path: str | PathLike[str]) -> None:
    """Write config.json, the weights as safetensors in the model's dtype, and the tokenizer if there is one.

    What lay beside the weights that were loaded is carried along: generation_config.json, and with the tokenizer its chat
    templates and all that tokenizer_config.json says. Of another model that was in the directory, nothing of the kind stays.
    transformers loads the directory, and `from_pretrained` restores the same bits. Every file is written under a temporary name
    and renamed when all are complete, config.json last: a save that is cut short leaves no half-written file under its final
    name. A model that was in the directory is replaced, and stays until then. Raises `CheckpointError` for a model that its
    family's format cannot express, and `OSError` where the directory cannot be written.
    """
    cfg = model.cfg
    if cfg.device.type == "meta":
        raise ValueError("this model is on the meta device: it has no weights to save")
    model.require_weights("saving")
    conversion = conversion_for(cfg.model_type, "this model")
    config = conversion.to_hf(cfg)
    parameters = dict(model.named_parameters())  # only the first of tied weights
    slots = slots_by_parameter(conversion.weights, cfg, parameters)
    assert slots.keys() == parameters.keys(), f"no checkpoint tensor for {parameters.keys() - slots.keys()}"
    tensors = {slot.hf_name: (slot, parameters[name].detach()) for name in parameters for slot in slots[name]}

    directory = expanded_path(path)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"cannot save a model as {directory}: it is a file; give a directory")
    with _files_of(directory) as files:
        _write_weights(files, tensors)
        if model.tokenizer is not None:
            _write_tokenizer(files, model.tokenizer, cfg)
        if model.generation_config:
            files.write_json(GENERATION_CONFIG, model.generation_config)
        files.write_json("config.json", config)


class _Files:
    """The files of one save, under temporary names until `publish`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[str] = []
        self.kept: tuple[str, ...] = ()
        """Files of this model that are there already."""

    def temporary(self, name: str) -> Path:
        self.names.append(name)
        temporary = self.directory / (name + _TEMPORARY)
        temporary.parent.mkdir(exist_ok=True)
        return temporary

    def write_json(self, name: str, values: object) -> None:
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.temporary(name).write_bytes(text.encode("utf-8"))

    def publish(self) -> None:
        """Put the new files in place of whatever model was here.

        Its config.json goes first and the new one comes last: a directory cut short between the two is no model at all, rather
        than a mixture of both.
        """
        (self.directory / "config.json").unlink(missing_ok=True)
        others = [file.name for file in self.directory.iterdir() if _is_weight_file(file.name)]
        templates = [f"{TEMPLATES}/{file.name}" for file in (self.directory / TEMPLATES).glob("*.jinja")]
        for name in {*others, *templates, *OF_A_MODEL, *VOCABULARY}.difference(self.names, self.kept):
            (self.directory / name).unlink(missing_ok=True)
        for name in self.names:
            temporary = self.directory / (name + _TEMPORARY)
            shutil.copymode(self.directory / ("config.json" + _TEMPORARY), temporary)  # safetensors makes its files private
            os.replace(temporary, self.directory / name)

    def discard(self) -> None:
        for name in self.names:
            (self.directory / (name + _TEMPORARY)).unlink(missing_ok=True)


@contextmanager
def _files_of(directory: Path) -> Iterator[_Files]:
    files = _Files(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield files
        files.publish()
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot save a model in {directory}: {error}") from error
    finally:
        files.discard()


def _is_weight_file(name: str) -> bool:
    return name == INDEX_FILE or re.fullmatch(r"model(-[\w-]+)?\.safetensors", name) is not None


Placed = dict[str, tuple[Slot, Tensor]]
"""The tensors of a checkpoint by their names: each a slot of a parameter."""


def _write_weights(files: _Files, tensors: Placed) -> None:
    shards = _shards(tensors)
    if len(shards) == 1:
        _save(shards[0], files.temporary(SINGLE_FILE))
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _save(shard, files.temporary(name))
        weight_map |= dict.fromkeys(shard, name)
    total = sum(slot.of(parameter).nbytes for slot, parameter in tensors.values())
    files.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save(tensors: Placed, file: Path) -> None:
    """Write one file. What is not in the checkpoint's order is copied here, so that only one file's tensors are at a time."""
    save_file({name: slot.as_stored(parameter) for name, (slot, parameter) in tensors.items()}, file, metadata={"format": "pt"})


def _shards(tensors: Placed) -> list[Placed]:
    """The tensors in their order, divided where the next one would not fit into the shard."""
    shards: list[Placed] = [{}]
    size = 0
    for name, (slot, parameter) in tensors.items():
        nbytes = slot.of(parameter).nbytes
        if shards[-1] and size + nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = slot, parameter
        size += nbytes
    return shards


def _write_tokenizer(files: _Files, tokenizer: Tokenizer, cfg: HookedMoEConfig) -> None:
    tokenizer.backend.save(str(files.temporary(TOKENIZER)))
    config = dict(tokenizer.files.config) or _tokenizer_config(tokenizer, cfg)
    files.write_json(TOKENIZER_CONFIG, config if tokenizer.adds_bos is None else config | {"add_bos_token": tokenizer.adds_bos})
    for name, text in tokenizer.files.others.items():
        files.write_text(name, text)
    if tokenizer.files.directory is not None and tokenizer.files.directory.resolve() == files.directory.resolve():
        files.kept = VOCABULARY


def _tokenizer_config(tokenizer: Tokenizer, cfg: HookedMoEConfig) -> dict[str, object]:
    """tokenizer_config.json for a tokenizer that did not come with one. Special tokens outside its vocabulary are left out."""
    special = {"bos_token": cfg.bos_token_id, "eos_token": next(iter(cfg.end_tokens), None), "pad_token": cfg.pad_token_id}
    tokens = {key: tokenizer.backend.id_to_token(id) if id is not None and id >= 0 else None for key, id in special.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.n_ctx,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
