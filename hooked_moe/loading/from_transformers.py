"""`from_hf`: the weights of a transformers model that is in memory, shared where both lay them out alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import tokenizers
import torch
from torch import Tensor, nn

from hooked_moe.chat import ChatTemplate
from hooked_moe.config import HookedMoEConfig
from hooked_moe.loading.beside import read_tokenizer
from hooked_moe.loading.checkpoint import DTYPES
from hooked_moe.loading.pretrained import CopyPlan, find, plan_copies, read_config
from hooked_moe.tokenizer import Tokenizer, TokenizerFiles
from hooked_moe.transformer import Transformer
from weights_conversion import CheckpointError, HFConfig, abbreviated, conversion_for
from weights_conversion.weight_map import Slot

Model = TypeVar("Model", bound=Transformer)


@dataclass(frozen=True)
class _Weights:
    """The parameters of a model, as a checkpoint has tensors."""

    directory: str
    """What holds them, for errors."""
    tensors: Mapping[str, Tensor]


def from_hf(model_class: type[Model], hf_model: Any, tokenizer: Any = None) -> Model:
    """A model with the weights of a `...ForCausalLM` of transformers, in its dtype and on its device.

    Memory is shared wherever a parameter of ours is one of transformers' tensors as it lies in memory: in transformers 5 that is
    every one, fused experts among them; where experts are modules of their own (transformers 4), theirs are copied. Training one
    model changes both then. `tokenizer` is a fast one of transformers, a `Tokenizer`, or a `tokenizers.Tokenizer`.

        HookedMoE.from_hf(transformers.OlmoeForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory))

    Raises `CheckpointError` for an architecture or option that is not supported, and `ValueError` for weights that are not plain
    floating-point tensors on one device.
    """
    source = f"this {type(hf_model).__name__}"
    hf_config: Any = getattr(hf_model, "config", None)
    if not isinstance(hf_model, nn.Module) or not hasattr(hf_config, "to_dict"):
        raise TypeError(
            f"from_hf takes a model of transformers, not {type(hf_model).__name__}: for a name or directory, call from_pretrained"
        )
    if hasattr(hf_model, "peft_config") and any(".lora_" in name for name, _ in hf_model.named_parameters()):
        raise ValueError(f"{source} has adapters beside its weights: merge them, with merge_and_unload(), and give the result")
    values = hf_config.to_dict()
    conversion = conversion_for(str(values.get("model_type")), source)
    cfg = conversion.from_hf(HFConfig(values, f"{source}'s config"))
    parameters = dict(hf_model.named_parameters(remove_duplicate=False))
    dtype, device = _placement(_Weights(source, parameters))
    saved = hf_model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in hf_model.named_buffers() if name in saved}
    weights = _Weights(source, parameters | buffers)  # a selection bias is a buffer there, of its own dtype
    cfg = cfg.replace(model_name=str(getattr(hf_config, "name_or_path", "") or cfg.model_type), dtype=dtype)
    model = model_class(cfg.replace(device=torch.device("meta")), as_tokenizer(tokenizer, cfg))
    plan = plan_copies(model, conversion, weights)
    _share(model, plan, weights, device)
    generation: Any = getattr(hf_model, "generation_config", None)
    model.generation_config = {} if generation is None else generation.to_diff_dict()
    return model.train(hf_model.training)


def from_hf_named(
    model_class: type[Model],
    hf_model: Any,
    name: str | PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Model:
    """`from_hf` with the tokenizer and the name of a model by name or directory, whose weights are not read.

    Raises `CheckpointError` if it is of another family.
    """
    directory, location, _ = find(name, revision, cache_dir, local_files_only, weights=False)
    conversion, cfg = read_config(directory / "config.json")
    model = from_hf(model_class, hf_model)
    if model.cfg.model_type != conversion.model_type:
        raise CheckpointError(f"{name} is of the family {conversion.model_type!r}, and hf_model of {model.cfg.model_type!r}")
    model.tokenizer = read_tokenizer(directory, cfg)
    model.cfg = model.cfg.replace(model_name=location.model_name)
    return model


def _placement(weights: _Weights) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of all weights, which must be one each."""
    found = {(tensor.dtype, tensor.device) for tensor in weights.tensors.values()}
    dtype, device = next(iter(found), (torch.float32, torch.device("cpu")))
    if len(found) > 1 or device.type == "meta" or dtype not in DTYPES.values():
        kinds = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in found))
        raise ValueError(
            f"{weights.directory} has weights in {kinds}: they must be all of one floating-point dtype and on one device, with "
            "their values in memory. Convert with hf_model.to(dtype) or .to(device), or load without device_map and quantisation"
        )
    return dtype, device


@torch.no_grad()
def _share(model: Transformer, plan: CopyPlan, weights: _Weights, device: torch.device) -> None:
    """Give every parameter the memory of its tensor, or else a copy."""
    slots: dict[str, list[Slot]] = {}
    for slot in plan.copied.values():
        slots.setdefault(slot.parameter, []).append(slot)
    for name, like in list(model.named_parameters()):
        sources = [weights.tensors[slot.hf_name] for slot in slots[name]]
        value = _same_memory(sources[0].detach(), like, slots[name][0]) if len(sources) == 1 else None
        if value is None:
            value = torch.empty(like.shape, dtype=like.dtype, device=device)
            for slot, source in zip(slots[name], sources, strict=True):
                part = slot.of(value)
                part.copy_(source.reshape(part.shape))
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=sources[0].requires_grad))
    if model.cfg.tie_word_embeddings:
        model.unembed.W_U = model.embed.W_E
    model.cfg = model.cfg.replace(device=device)
    untied = [name for name, slot in plan.repeated.items() if not torch.equal(weights.tensors[name], slot.of(model.embed.W_E))]
    if untied:
        raise CheckpointError(
            f"{weights.directory}: its config ties the embeddings (tie_word_embeddings), but they differ:{abbreviated(untied)}"
        )


def _same_memory(tensor: Tensor, like: Tensor, slot: Slot) -> Tensor | None:
    """The tensor in the shape of the parameter, if that is all it takes."""
    if slot.index or not tensor.is_contiguous():
        return None
    value = tensor.view(like.shape)
    back = slot.of(value)
    return value if back.shape == tensor.shape and back.stride() == tensor.stride() else None


def as_tokenizer(tokenizer: Any, cfg: HookedMoEConfig) -> Tokenizer | None:
    """A tokenizer of transformers or `tokenizers` as one of ours, which shares nothing with it.

    Raises `TypeError` for what is neither: slow tokenizers have no `tokenizers` backend.
    """
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TypeError(
            f"tokenizer must be a fast tokenizer of transformers, a Tokenizer or a tokenizers.Tokenizer, not "
            f"{type(tokenizer).__name__}"
        )
    own = tokenizers.Tokenizer.from_str(backend.to_str())
    own.no_padding()
    own.no_truncation()
    end = next(iter(cfg.end_tokens), getattr(tokenizer, "eos_token_id", None))
    pad = getattr(tokenizer, "pad_token_id", None) if cfg.pad_token_id is None else cfg.pad_token_id
    template, special = getattr(tokenizer, "chat_template", None), getattr(tokenizer, "special_tokens_map", {})
    if template is None:
        return Tokenizer(own, cfg.bos_token_id, end, pad)
    templates = ChatTemplate.of(template, special, "this tokenizer")
    stated = template if isinstance(template, str) else [{"name": n, "template": t} for n, t in templates.sources.items()]
    files = TokenizerFiles({"chat_template": stated} | dict(templates.special_tokens))
    made = Tokenizer(own, cfg.bos_token_id, end, pad, files=files)
    made.chat_template = templates
    return made
