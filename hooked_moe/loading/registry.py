"""What a name means: a short name, a shipped model, a directory, or a hub id, in this order."""

from __future__ import annotations

import importlib.resources
import os
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from hooked_moe.checks import as_unicode, expanded_path, unknown_name
from hooked_moe.loading.beside import names_in, refuse_adapter
from hooked_moe.loading.checkpoint import present

SHIPPED = ("tiny-olmoe", "tiny-qwen-moe", "tiny-deepseek-moe", "tiny-mixtral", "tiny-olmoe-facts")
"""Models that come with the package, under `hooked_moe/pretrained/<name>/`."""


@dataclass(frozen=True)
class PretrainedName:
    """A short name of a model on the hub."""

    name: str
    hub_id: str
    aliases: tuple[str, ...] = ()


PRETRAINED: tuple[PretrainedName, ...] = (
    PretrainedName("olmoe", "allenai/OLMoE-1B-7B-0924", aliases=("olmoe-0924", "olmoe-1b-7b")),
    PretrainedName("olmoe-instruct", "allenai/OLMoE-1B-7B-0924-Instruct", aliases=("olmoe-0924-instruct",)),
    PretrainedName("olmoe-0125", "allenai/OLMoE-1B-7B-0125"),
    PretrainedName("olmoe-0125-instruct", "allenai/OLMoE-1B-7B-0125-Instruct"),
    PretrainedName("qwen1.5-moe", "Qwen/Qwen1.5-MoE-A2.7B", aliases=("qwen1.5-moe-a2.7b", "qwen-moe")),
    PretrainedName("qwen1.5-moe-chat", "Qwen/Qwen1.5-MoE-A2.7B-Chat", aliases=("qwen1.5-moe-a2.7b-chat",)),
    PretrainedName("qwen2-57b-a14b", "Qwen/Qwen2-57B-A14B"),
    PretrainedName("qwen2-57b-a14b-instruct", "Qwen/Qwen2-57B-A14B-Instruct"),
    PretrainedName("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite"),
    PretrainedName("deepseek-v2-lite-chat", "deepseek-ai/DeepSeek-V2-Lite-Chat"),
    PretrainedName("deepseek-coder-v2-lite", "deepseek-ai/DeepSeek-Coder-V2-Lite-Base"),
    PretrainedName("deepseek-coder-v2-lite-instruct", "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct"),
    PretrainedName("deepseek-v2", "deepseek-ai/DeepSeek-V2"),
    PretrainedName("deepseek-v2-chat", "deepseek-ai/DeepSeek-V2-Chat"),
    PretrainedName("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B-Base", aliases=("qwen3-30b-a3b-base", "qwen3-moe")),
    PretrainedName("qwen3-30b-a3b-instruct", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
    PretrainedName("qwen3-30b-a3b-thinking", "Qwen/Qwen3-30B-A3B-Thinking-2507"),
    PretrainedName("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", aliases=("mixtral",)),
    PretrainedName("mixtral-8x7b-instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1", aliases=("mixtral-instruct",)),
    PretrainedName("mixtral-8x22b", "mistralai/Mixtral-8x22B-v0.1"),
    PretrainedName("moonlight-16b-a3b", "moonshotai/Moonlight-16B-A3B", aliases=("moonlight",)),
    PretrainedName("moonlight-16b-a3b-instruct", "moonshotai/Moonlight-16B-A3B-Instruct", aliases=("moonlight-instruct",)),
    PretrainedName("kimi-k2", "moonshotai/Kimi-K2-Base", aliases=("kimi-k2-base",)),
    PretrainedName("kimi-k2-instruct", "moonshotai/Kimi-K2-Instruct"),
    PretrainedName("deepseek-v3", "deepseek-ai/DeepSeek-V3"),
    PretrainedName("deepseek-v3-base", "deepseek-ai/DeepSeek-V3-Base"),
    PretrainedName("deepseek-r1", "deepseek-ai/DeepSeek-R1"),
    PretrainedName("glm-4.5-air", "zai-org/GLM-4.5-Air"),
    PretrainedName("glm-4.5-air-base", "zai-org/GLM-4.5-Air-Base"),
    PretrainedName("glm-4.5", "zai-org/GLM-4.5"),
    PretrainedName("glm-4.6", "zai-org/GLM-4.6"),
    PretrainedName("glm-4.7", "zai-org/GLM-4.7"),
    PretrainedName("glm-4.7-flash", "zai-org/GLM-4.7-Flash"),
    PretrainedName("gpt-oss-20b", "openai/gpt-oss-20b", aliases=("gpt-oss",)),
    PretrainedName("gpt-oss-120b", "openai/gpt-oss-120b"),
)

_HUB_IDS = {name: entry.hub_id for entry in PRETRAINED for name in (entry.name, *entry.aliases)}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ACCEPTED = (
    f"Accepted are short names ({', '.join(entry.name for entry in PRETRAINED)}), shipped models ({', '.join(SHIPPED)}), "
    "hub ids as 'org/name', and directories in HuggingFace layout."
)


@dataclass(frozen=True)
class Location:
    """Where a model is: a directory here, or a repository on the hub."""

    model_name: str
    directory: Path | None = None
    hub_id: str | None = None


def locate(name: str | PathLike[str]) -> Location:
    """Find what a name stands for. A path object is always a path; a string is tried as a name first.

    Raises `UnknownNameError` for a name that is nothing known, and `FileNotFoundError` or `NotADirectoryError` for a path that
    is no checkpoint.
    """
    text = os.fspath(name)
    if not text:
        raise unknown_name("model", text, (), _ACCEPTED)
    if isinstance(name, str):
        if text.lower() in _HUB_IDS:
            hub_id = _HUB_IDS[text.lower()]
            return Location(model_name=hub_id, hub_id=hub_id)
        if text in SHIPPED:
            return Location(model_name=text, directory=_shipped(text))
    path = expanded_path(text)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which is not there: make the link again, or give a path"
        )
    if path.exists():
        return Location(model_name=as_unicode(path.resolve().name), directory=_checked(path))
    if isinstance(name, str) and _HUB_ID.fullmatch(text):
        return Location(model_name=text, hub_id=text)
    if not isinstance(name, str) or "/" in text or os.sep in text:
        raise FileNotFoundError(f"there is no directory {text!r} here (the working directory is {Path.cwd()}). {_ACCEPTED}")
    raise unknown_name("model", text, (*_HUB_IDS, *SHIPPED), _ACCEPTED)


def _checked(path: Path) -> Path:
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; give the directory that holds config.json and the safetensors files")
    refuse_adapter(names_in(path), path)
    if not present(path / "config.json"):
        raise FileNotFoundError(f"{path} has no config.json, so it is not a model directory in HuggingFace layout")
    return path


def _shipped(name: str) -> Path:
    directory = Path(str(importlib.resources.files("hooked_moe"))) / "pretrained" / name
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"this installation of hooked_moe lacks the model {name!r} (no {directory / 'config.json'}): "
            "reinstall the package, or train the model with experiments/train_tiny.py"
        )
    return directory
