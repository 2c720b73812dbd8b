"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) in PEFT's files, added to the weights that they were trained on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_moe.checks import expanded_path, printable, quoted
from hooked_moe.loading.checkpoint import opened, read_json
from hooked_moe.transformer import Transformer
from weights_conversion import CheckpointError, Conversion, abbreviated

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?")

HARMLESS = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
        "peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "lora_dropout",
        "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
        "modules_to_save", "init_lora_weights", "eva_config", "megatron_core", "runtime_config", "qalora_group_size",
        "ensure_weight_tying", "bias",
    )
)  # fmt: skip
"""What an adapter_config.json may say without a change in what the saved matrices mean; or what is read here."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin (`init_lora_weights`) that take from the base what they put into the adapter."""


@dataclass(frozen=True)
class Pair:
    """The two factors of one weight's change.

    For a matrix [out, in], A is [r, in] and B [out, r]; for an embedding [in, out] too. For all experts, [expert, out, in],
    the rows of A are (expert, r) and the columns of B (r, expert), as PEFT has them.
    """

    module: str
    """In the checkpoint's names: "model.layers.0.self_attn.q_proj"."""
    a: Tensor
    b: Tensor
    of_embedding: bool

    def rank(self, weight: Tensor) -> int:
        return len(self.a) // (len(weight) if weight.dim() == 3 else 1)

    def fits(self, weight: Tensor) -> bool:
        """Whether the change of a weight of this shape has these factors."""
        d_out, d_in = weight.shape[-2:][::-1] if self.of_embedding else weight.shape[-2:]
        experts = len(weight) if weight.dim() == 3 else 1
        columns = self.a.shape[0]
        return self.a.shape[1:] == (d_in,) and self.b.shape == (d_out, columns) and columns > 0 and columns % experts == 0

    def change(self, weight: Tensor) -> Tensor:
        """B A, in float32 or wider, in the shape of the weight."""
        a, b = (x.to(weight.device, torch.promote_types(x.dtype, torch.float32)) for x in (self.a, self.b))
        if weight.dim() == 3:
            return torch.einsum("ore,eri->eoi", b.unflatten(1, (-1, len(weight))), a.unflatten(0, (len(weight), -1)))
        return (b @ a).T.contiguous() if self.of_embedding else b @ a


@torch.no_grad()
def merge_adapter(model: Transformer, conversion: Conversion, adapter: str | PathLike[str]) -> None:
    """Add the adapter in a directory to a model's weights, for good; computed in float32 and rounded once.

    An expert's projections may be modules of their own, or all experts one parameter, as PEFT's `target_parameters` have them.
    Modules that were trained whole (`modules_to_save`) replace the model's. Raises `FileNotFoundError` where there is no adapter
    and `CheckpointError` for one that is not plain LoRA, or of another model.
    """
    directory = expanded_path(adapter)
    config = read_adapter_config(directory)
    pairs, whole = _read_tensors(directory / WEIGHTS_FILE)
    places = _places(model, conversion)
    targets = _targets(pairs, places)
    _check_fit(directory, model, pairs, targets, whole, places)
    for name, value in whole.items():
        places[name].copy_(value)
    for pair, name in zip(pairs, targets, strict=True):
        place = places[name]
        wide = place.to(torch.promote_types(place.dtype, torch.float32))
        place.copy_(wide + pair.change(place).mul_(scale_of(name, pair.rank(place), config)))


def _places(model: Transformer, conversion: Conversion) -> dict[str, Tensor]:
    """The model's weights by every name that a checkpoint may have for them, in the checkpoint's shapes: views."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {}
    for weight in (*conversion.weights, *conversion.alternatives):
        for slot in weight.slots(model.cfg) if weight.when(model.cfg) else ():
            if slot.parameter in parameters:
                places[slot.hf_name] = slot.of(parameters[slot.parameter])
    return places


def _targets(pairs: Sequence[Pair], places: Mapping[str, Tensor]) -> list[str]:
    """The name of the weight that each pair changes; empty where none fits."""
    by_module: dict[str, list[str]] = {}
    for name in places:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    own = (by_module.get(re.sub(r"(\.base_layer)+$", "", pair.module), []) for pair in pairs)
    return [next((name for name in names if pair.fits(places[name])), "") for pair, names in zip(pairs, own, strict=True)]


def _check_fit(
    directory: Path,
    model: Transformer,
    pairs: Sequence[Pair],
    targets: Sequence[str],
    whole: Mapping[str, Tensor],
    places: Mapping[str, Tensor],
) -> None:
    strange = [
        f"{pair.module}: A {list(pair.a.shape)}, B {list(pair.b.shape)}"
        for pair, name in zip(pairs, targets, strict=True)
        if not name
    ]
    strange += [f"{name}: {list(x.shape)}" for name, x in whole.items() if name not in places or places[name].shape != x.shape]
    if strange:
        raise CheckpointError(
            f"{directory} does not fit {model.cfg.model_name}: it has tensors for which the model has no weight of that name, or "
            f"one of another shape:{abbreviated(strange)}"
        )
    tied = [name for name in (*whole, *targets) if places[name].data_ptr() == model.embed.W_E.data_ptr()]
    if model.cfg.tie_word_embeddings and tied:
        raise CheckpointError(
            f"{directory} changes {tied[0]}, which this model ties: embedding and unembedding would both change"
        )


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """An adapter_config.json. Raises `FileNotFoundError` where there is none, `CheckpointError` for what is not plain LoRA."""
    if not (directory / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"adapter={str(directory)!r} has no {CONFIG_FILE}: give the directory of a PEFT adapter, which has {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        )
    if not (directory / WEIGHTS_FILE).is_file():
        pickle = (directory / "adapter_model.bin").is_file()
        why = (
            ", only a pickle, which can run code and is never opened: save the adapter with safe_serialization" if pickle else ""
        )
        raise FileNotFoundError(f"{directory} has no {WEIGHTS_FILE}{why}")
    config = read_json(directory / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory}: peft_type={quoted(config.get('peft_type'))} is not supported: LORA is")
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_THE_BASE):
        raise CheckpointError(
            f"{directory}: init_lora_weights={quoted(begun)} trains against a base that it changes first: have PEFT convert the "
            "adapter to plain LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{directory}: bias={quoted(config['bias'])} is not supported: only LoRA's factors are read, bias='none'"
        )
    other = {key: value for key, value in config.items() if key not in HARMLESS and value not in (None, False, [], {})}
    if other:
        stated = ", ".join(f"{printable(key)}={quoted(value)}" for key, value in other.items())
        raise CheckpointError(f"{directory} is not plain LoRA, which is what can be merged here: it has {stated}")
    return config


def scale_of(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) in rank-stabilised LoRA (arXiv 2312.03732).

    A weight may have an alpha of its own.
    """
    patterns = config.get("alpha_pattern") or {}
    own = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name.removesuffix(".weight"))), None)
    alpha = config.get("lora_alpha", 8) if own is None else patterns[own]
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _read_tensors(file: Path) -> tuple[list[Pair], dict[str, Tensor]]:
    """The pairs of factors, and the tensors that are neither, by the checkpoint's names."""
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    whole = {}
    with opened(file) as tensors:
        for key in tensors.keys():  # noqa: SIM118 - of safetensors
            name = key.removeprefix(_PREFIX)
            if match := _PAIR.fullmatch(name):
                factors.setdefault((match["module"], match["embedding"] or ""), {})[match["factor"]] = tensors.get_tensor(key)
            else:
                whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensors.get_tensor(key)
    single = [module for (module, _), both in factors.items() if both.keys() != {"A", "B"}]
    if single or not (factors or whole):
        found = f"only one factor of:{abbreviated(single)}" if single else "no tensors"
        raise CheckpointError(f"{file} has {found}")
    return [Pair(module, both["A"], both["B"], bool(kind)) for (module, kind), both in factors.items()], whole
