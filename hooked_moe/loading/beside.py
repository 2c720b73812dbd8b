"""What lies beside the weights of a checkpoint: the tokenizer, its templates and special tokens, and how its authors generate.

Little of it is used here. All of it is carried along, so that a model that is loaded, changed and saved is in other hands what it
was: a chat model with its template and its end tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hooked_moe.checks import quoted
from hooked_moe.config import HookedMoEConfig
from hooked_moe.loading.chat_files import chat_template_of
from hooked_moe.loading.checkpoint import present, read_json
from hooked_moe.tokenizer import Tokenizer, TokenizerFiles
from hooked_moe.warn_user import warn_user
from weights_conversion import CheckpointError, HFConfig

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATES = "additional_chat_templates"
KEPT_AS_THEY_ARE = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
OF_A_MODEL = (
    *(TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, *KEPT_AS_THEY_ARE),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
)
"""The files beside weights and config.json that say what a model is, to us or to transformers: those of one model must not stay
beside another."""
VOCABULARY = ("added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt")
"""What tokenizer.json says, in the forms of slow tokenizers: neither read nor written here, and wrong beside another one."""


def read_tokenizer(directory: Path, cfg: HookedMoEConfig) -> Tokenizer | None:
    """The tokenizer in tokenizer.json, and what lies beside it.

    tokenizer_config.json may say whether BOS goes before a text (DeepSeek-V2, Mixtral). Special tokens of config.json that the
    vocabulary does not have, such as a padding id of -1, are not used.
    """
    if not present(directory / TOKENIZER):
        return None
    config = read_json(directory / TOKENIZER_CONFIG) if present(directory / TOKENIZER_CONFIG) else {}
    stated = HFConfig(config, str(directory / TOKENIZER_CONFIG)).boolean_or_none("add_bos_token")
    adds_bos = stated if cfg.bos_token_id is not None else None
    pad = cfg.pad_token_id
    if pad is not None and not 0 <= pad < cfg.d_vocab:
        pad = None
        if cfg.pad_token_id != -1:  # as some write that there is none
            warn_user(
                f"{directory / 'config.json'}: pad_token_id={cfg.pad_token_id} is not in the vocabulary, 0 to {cfg.d_vocab - 1}. "
                "Padding is masked, and is filled with another token"
            )
    end = next((end for end in cfg.end_tokens if 0 <= end < cfg.d_vocab), None)
    files = TokenizerFiles(config, _others(directory), directory)
    tokenizer = Tokenizer.from_file(directory / TOKENIZER, cfg.bos_token_id, end, pad, adds_bos, files)
    tokenizer.chat_template = chat_template_of(files)
    return tokenizer


def _others(directory: Path) -> dict[str, str]:
    """The text of the files that are carried along as they are, by their names from the directory."""
    names = [name for name in KEPT_AS_THEY_ARE if present(directory / name)]
    names += [f"{TEMPLATES}/{file.name}" for file in sorted((directory / TEMPLATES).glob("*.jinja"))]
    return {name: _text_of(directory / name) for name in names}


def _text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")  # not read_text, which would change line ends
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not readable text in UTF-8: {error}") from error


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json; empty where there is none. Raises `CheckpointError` for end tokens that are no token ids."""
    file = directory / GENERATION_CONFIG
    if not present(file):
        return {}
    values = read_json(file)
    HFConfig(values, str(file)).end_tokens("eos_token_id")
    return values


def refuse_adapter(names: set[str], where: object) -> None:
    """Raise `CheckpointError` where a directory or repository holds a PEFT adapter: transformers would run the model with it."""
    if "adapter_config.json" not in names:
        return
    stated = read_json(where / "adapter_config.json").get("base_model_name_or_path") if isinstance(where, Path) else None
    base = f"its base, {quoted(stated)}," if stated else "its base"
    raise CheckpointError(
        f"{where} holds an adapter (adapter_config.json), which is no model: load {base} with adapter={str(where)!r}, which "
        "merges the adapter into it, or save the merged model (peft: model.merge_and_unload().save_pretrained(...)). If a whole "
        "model lies beside it that is meant without the adapter, move the adapter's files away"
    )


def names_in(directory: Path) -> set[str]:
    return set(os.listdir(directory))
