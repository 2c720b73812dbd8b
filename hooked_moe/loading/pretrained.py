"""`from_pretrained`: find a checkpoint, check it against its config, and copy it tensor by tensor into a new model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hooked_moe.checks import expanded_path
from hooked_moe.components.block import Block
from hooked_moe.config import HookedMoEConfig
from hooked_moe.loading.adapter import merge_adapter, read_adapter_config
from hooked_moe.loading.beside import names_in, read_generation_config, read_tokenizer, refuse_adapter
from hooked_moe.loading.checkpoint import Checkpoint, all_finite, read_json
from hooked_moe.loading.hub import download
from hooked_moe.loading.placement import as_device, as_dtype
from hooked_moe.loading.registry import SHIPPED, Location, locate
from hooked_moe.loading.sizes import check_sizes
from hooked_moe.loading.streaming import StreamedBlocks
from hooked_moe.transformer import Transformer
from weights_conversion import CheckpointError, Conversion, HFConfig, abbreviated, conversion_for
from weights_conversion.weight_map import Slot, left_out, slots_by_parameter

Model = TypeVar("Model", bound=Transformer)


def from_pretrained(
    model_class: type[Model],
    name: str | PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    store: torch.dtype | str | None = None,
    adapter: str | PathLike[str] | None = None,
) -> Model:
    """A trained model by short name, name of a shipped model, local directory, or hub id: the first that `name` is.

    `HookedMoE.from_pretrained(name)` is this with the class that it is called on.

    Weights are converted to `dtype` and put on `device` (None: the CPU) one tensor at a time: memory peaks at the model plus one
    tensor. `revision` (branch, tag or commit), `cache_dir` and `local_files_only` are for the hub; `model.cfg.revision` is the
    commit that was loaded. What was downloaded once is found by the same name with `local_files_only` or HF_HUB_OFFLINE=1;
    without them the hub is asked what the branch is now, and it is an error if it does not answer. With `stream`, the weights of
    one block at a time are in memory, read when the block is run, the next ones ahead: for models larger than memory, to be run
    and measured, not trained or edited. With `store="bfloat16"`, the weights of routed experts are kept in that dtype and widened
    to `dtype` one expert at a time: half the memory, and the same products where the checkpoint has no more bits than that; for
    models to be run and measured, too. `adapter` is the directory of a PEFT LoRA adapter, which is merged into the weights. Only
    safetensors and json files and chat templates are downloaded or read; nothing downloaded is ever executed, except that a chat
    template makes text in a sandbox, when it is asked to.

    Raises `UnknownNameError`, `FileNotFoundError` or `NotADirectoryError` for names and paths that lead to no model, `HubError`
    where the hub does not give it, and `CheckpointError` for an architecture or option that is not supported and for weights
    that are missing, superfluous, mis-shaped, or unreadable.
    """
    dtype, target = as_dtype(dtype), as_device(device)
    stored = None if store is None or as_dtype(store) == dtype else as_dtype(store)
    if adapter is not None:
        if stream:
            raise ValueError(
                "adapter= is merged into weights in memory, and stream=True keeps none there: load one without the other"
            )
        read_adapter_config(expanded_path(adapter))  # before anything is downloaded
    directory, location, commit = find(name, revision, cache_dir, local_files_only)
    conversion, cfg = read_config(directory / "config.json")
    cfg = cfg.replace(model_name=location.model_name, revision=commit, dtype=dtype, store=stored)
    model = build_model(model_class, cfg, directory, Checkpoint(directory), target, stream)
    if stored is not None:
        model.requires_grad_(False)
    if adapter is not None:
        merge_adapter(model, conversion, adapter)
        model.cfg = model.cfg.replace(model_name=f"{model.cfg.model_name}+{Path(adapter).resolve().name}")
    model.loaded_from = {
        "name": name if commit is not None or name in SHIPPED else directory.resolve(),
        "dtype": dtype,
        "device": target,
        "revision": commit,
        "cache_dir": None if cache_dir is None else Path(cache_dir).resolve(),
        "local_files_only": local_files_only,
        "stream": stream,
        "store": stored,
        "adapter": None if adapter is None else expanded_path(adapter).resolve(),
    }
    return model.eval()


def build_model(
    model_class: type[Model],
    cfg: HookedMoEConfig,
    directory: Path,
    checkpoint: Checkpoint,
    device: torch.device,
    stream: bool,
) -> Model:
    """A model of this configuration with the weights of a checkpoint, or with a promise of them (`stream`), and what else lies in
    the directory."""
    conversion = conversion_for(cfg.model_type, str(checkpoint.directory))
    check_sizes(cfg, conversion, checkpoint)
    model = model_class(cfg.replace(device=torch.device("meta")), read_tokenizer(directory, cfg))
    model.generation_config = read_generation_config(directory)
    checkpoint.warn_of_what_was_left()
    plan = plan_copies(model, conversion, checkpoint)
    if stream:
        blocks = list(model.blocks)
        model.blocks = cast(Sequence[Block], nn.ModuleList())  # set aside while the rest is loaded
        rest = {name: slot for name, slot in plan.copied.items() if not slot.parameter.startswith("blocks.")}
        allocate(model, device)
        copy_weights(model, checkpoint, CopyPlan(rest, plan.repeated))
        model.requires_grad_(False)
        model.blocks = cast(Sequence[Block], StreamedBlocks(blocks, checkpoint, plan.copied, device))
    else:
        allocate(model, device)
        copy_weights(model, checkpoint, plan)
    return model.eval()


def find(
    name: str | PathLike[str],
    revision: str | None,
    cache_dir: str | PathLike[str] | None,
    local_files_only: bool,
    weights: bool = True,
) -> tuple[Path, Location, str | None]:
    """The directory of a model here, with weights or without them, what its name means, and its commit on the hub."""
    location = locate(name)
    if location.hub_id is not None:
        directory, commit = download(
            location.hub_id, revision, cache_dir, local_files_only, check_config=read_config, weights=weights
        )
        refuse_adapter(names_in(directory), directory)
        return directory, location, commit
    assert location.directory is not None
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for models on the hub; {name!r} is the directory {location.directory}")
    return location.directory, location, None


def read_config(file: Path) -> tuple[Conversion, HookedMoEConfig]:
    """The family and the config of a config.json. Raises `CheckpointError`."""
    values = read_json(file)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{file} has no model_type, so the architecture is unknown")
    conversion = conversion_for(model_type, str(file))
    return conversion, conversion.from_hf(HFConfig(values, str(file)))


@dataclass(frozen=True)
class CopyPlan:
    """Which checkpoint tensor goes where. `repeated` are further copies of tied weights, which a checkpoint may hold."""

    copied: dict[str, Slot]
    repeated: dict[str, Slot]
    left_out: set[str] = field(default_factory=set)
    """Tensors that go nowhere: see `weights_conversion.weight_map.left_out`."""


@runtime_checkable
class NamedTensors(Protocol):
    """A checkpoint, or what has tensors by the same names."""

    @property
    def directory(self) -> Any:
        """Where they are, for errors."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Each with a shape."""


def holds(checkpoint: NamedTensors, slots: Iterable[Slot]) -> bool:
    """Whether all of these tensors are there."""
    return all(slot.hf_name in checkpoint.tensors for slot in slots)


def plan_copies(model: Transformer, conversion: Conversion, checkpoint: NamedTensors) -> CopyPlan:
    """Match a checkpoint with a model, by names and shapes alone; a `CheckpointError` lists all that does not fit."""
    own = dict(model.named_parameters())
    every = dict(model.named_parameters(remove_duplicate=False))
    slots = slots_by_parameter(conversion.weights, model.cfg, every)
    for parameter, others in slots_by_parameter(conversion.alternatives, model.cfg, every).items():
        if holds(checkpoint, others):
            slots[parameter] = others
    assert slots.keys() == every.keys(), f"no checkpoint tensor for {every.keys() - slots.keys()}"
    for other in every.keys() - own.keys():  # tied weights are stored under either name
        first = next(name for name, parameter in own.items() if parameter is every[other])
        if not holds(checkpoint, slots[first]) and holds(checkpoint, slots[other]):
            slots[first], slots[other] = slots[other], slots[first]
    copied = {slot.hf_name: slot for parameter in own for slot in slots[parameter]}
    repeated = {slot.hf_name: slot for parameter in every.keys() - own.keys() for slot in slots[parameter]}
    repeated = {name: slot for name, slot in repeated.items() if name in checkpoint.tensors}

    stored = checkpoint.tensors
    ignored = left_out(stored.keys(), model.cfg) - copied.keys()
    missing = [name for name in copied if name not in stored]
    extra = [name for name in stored if name not in copied and name not in repeated and name not in ignored]
    misshaped = [
        f"{name}: {list(stored[name].shape)}, expected {list(expected)} ({slot.axes})"
        for name, slot in (copied | repeated).items()
        if name in stored and stored[name].shape != (expected := slot.shape(every[slot.parameter]))
    ]
    problems = [
        f"{len(names)} {kind}:{abbreviated(names)}"
        for kind, names in (("missing", missing), ("not part of this model", extra), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the tensors in {checkpoint.directory} are not those that its config.json describes "
            f"({model.cfg.model_type}, {model.cfg.n_layers} layers). Check that both are of one model and complete. "
            "Tensors\n" + "\n".join(problems) + _likely_reason(missing, extra)
        )
    return CopyPlan(copied, repeated, ignored)


def _likely_reason(missing: list[str], extra: list[str]) -> str:
    """What such names usually mean, and what to do then; empty where they say nothing."""
    if any(".lora_" in name or name.startswith("base_model.") for name in extra):
        return "\nThese are an adapter's: merge it into its base model and save that (peft: model.merge_and_unload())"
    if missing == ["lm_head.weight"]:
        return "\nIf the unembedding is the embedding, say so in config.json: tie_word_embeddings true"
    if extra and not missing:
        return "\nIf they belong to something else (a value head, say), write the file again without them"
    return ""


@torch.inference_mode(False)  # what is loaded in that mode may be trained outside of it
def allocate(model: Transformer, device: torch.device) -> None:
    """Give a model on the meta device memory of its own, which is not yet filled."""
    # `model.to_empty` would do, but for the half second and 40 MB of its detour through torch's symbolic shapes.
    model._apply(lambda parameter: torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
    if model.cfg.tie_word_embeddings:
        model.unembed.W_U = model.embed.W_E  # moving a module unties it


@torch.no_grad()
def copy_weights(model: Transformer, checkpoint: Checkpoint, plan: CopyPlan) -> None:
    """Fill the parameters. Raises `CheckpointError` if a repeated copy of a tied weight differs from the first."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    targets = {name: slot.of(parameters[slot.parameter].detach()) for name, slot in plan.copied.items()}
    broken: dict[str, None] = {}
    total = sum(target.nbytes for target in targets.values())
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, delay=2.0, disable=None) as progress:
        for name, values in checkpoint.read_into(targets):
            if not all_finite(values):
                broken[name] = None
            progress.update(values.numel() * targets[name].itemsize)
    checkpoint.warn_of_non_finite(list(broken))
    for name, slot in plan.repeated.items():
        part = slot.of(parameters[slot.parameter])
        value = torch.empty_like(part)
        for _ in checkpoint.read_into({name: value}):
            pass
        if not torch.equal(part, value):
            raise CheckpointError(
                f"{checkpoint.directory}: config.json ties the embeddings (tie_word_embeddings), but {name} differs from them; "
                "set tie_word_embeddings to false if they are separate"
            )
