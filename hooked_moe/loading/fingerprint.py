"""What exactly was measured: the model, its checksum and the versions of the software, for a manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from typing import Any

import torch

from hooked_moe.config import HookedMoEConfig
from hooked_moe.loading.streaming import read_in_order
from hooked_moe.transformer import Transformer
from hooked_moe.version import __version__

_PACKAGES = ("torch", "numpy", "scipy", "pyarrow", "tokenizers", "safetensors")


def weights_sha256(model: Transformer) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bytes, in the order of their names."""
    digest = hashlib.sha256()

    def add(name: str) -> None:
        parameter = model.get_parameter(name)
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    names = sorted(name for name, _ in model.named_parameters())
    by_layer = {layer: list(own) for layer, own in groupby(names, key=_layer_of)}  # layers 0, 1, 10, 11, ..., 2, 20, ...
    outside = by_layer.pop(None)  # whose names come after those of blocks
    for layer in read_in_order(model, [layer for layer in by_layer if layer is not None]):
        for name in by_layer[layer]:
            add(name)
    for name in outside:
        add(name)
    return digest.hexdigest()


def _layer_of(parameter: str) -> int | None:
    """The layer of a parameter; None for those outside of blocks."""
    return int(parameter.split(".")[1]) if parameter.startswith("blocks.") else None


def model_fingerprint(model: Transformer) -> dict[str, Any]:
    """The model of a measurement: where it comes from, its weights and its configuration."""
    return {
        "name": model.cfg.model_name,
        "revision": model.cfg.revision,
        "weights_sha256": weights_sha256(model),
        "config": config_values(model.cfg),
    }


@dataclass(frozen=True)
class SameModel:
    """Raises `ValueError` unless a model that a worker has loaded is the one of a plan, under the same versions of the software.

    Weights in memory are compared by their checksum. Those of a streamed model are not read for this: name and revision stand
    for them.
    """

    plan: dict[str, Any]

    @classmethod
    def of(cls, model: Transformer) -> SameModel:
        """The same for this model, without a plan."""
        weights = "" if model.streams else weights_sha256(model)
        named = {"name": model.cfg.model_name, "revision": model.cfg.revision, "weights_sha256": weights}
        return cls({"model": named, "versions": versions()})

    def __call__(self, model: Transformer) -> None:
        here, expected = versions(), self.plan["versions"]
        other = [f"{name} {here[name]}, not {expected[name]}" for name in expected if here.get(name) != expected[name]]
        if other:
            raise ValueError(f"{platform.node()} has {', '.join(other)}: install there what is installed here")
        planned = self.plan["model"]
        same = (model.cfg.model_name, model.cfg.revision) == (planned["name"], planned["revision"])
        if not same or not (model.streams or weights_sha256(model) == planned["weights_sha256"]):
            raise ValueError(
                f"{platform.node()} has loaded other weights by the name {model.cfg.model_name!r} than those to be measured: was "
                "the model changed after it was loaded? Write it with model.save_pretrained(directory) where all workers can "
                "read it, and load it from there"
            )


def computed_on(device: torch.device) -> str:
    """What last bits depend on besides the software: the GPU, or what the CPU can do and how many threads this thread has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


def versions() -> dict[str, str]:
    """The versions of this package, of Python and of the packages that compute the numbers."""
    installed = {package: metadata.version(package) for package in _PACKAGES}
    return {"hooked_moe": __version__, "python": platform.python_version(), **installed}


def config_values(cfg: HookedMoEConfig) -> dict[str, Any]:
    """The configuration as JSON values."""
    values = dataclasses.asdict(cfg)
    return {name: str(value) if isinstance(value, (torch.dtype, torch.device)) else value for name, value in values.items()}
