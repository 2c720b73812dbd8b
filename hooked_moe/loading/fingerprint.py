"""What exactly was measured: the model, its checksum and the versions of the software, for a manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from hooked_moe.config import HookedMoEConfig
from hooked_moe.transformer import Transformer
from hooked_moe.version import __version__

_PACKAGES = ("torch", "numpy", "scipy", "pyarrow", "tokenizers", "safetensors")


def weights_sha256(model: Transformer) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bytes, layer by layer; those outside of blocks come last."""
    checksum = WeightsChecksum(model)
    for layer in range(model.cfg.n_layers):
        checksum.add_layer(layer)
    return checksum.finish()


class WeightsChecksum:
    """The same in pieces, for whoever takes the layers in turn for something else too: all layers in order, then the rest."""

    def __init__(self, model: Transformer) -> None:
        self.model, self._digest = model, hashlib.sha256()
        self._names = sorted(name for name, _ in model.named_parameters())

    def add_layer(self, layer: int) -> None:
        self.model.blocks[layer]  # of a streamed model, this reads its weights
        self._add(name for name in self._names if name.startswith(f"blocks.{layer}."))

    def finish(self) -> str:
        self._add(name for name in self._names if not name.startswith("blocks."))
        return self._digest.hexdigest()

    def _add(self, names: Iterable[str]) -> None:
        for name in names:
            parameter = self.model.get_parameter(name)
            self._digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            self._digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def model_fingerprint(model: Transformer, sha256: str | None = None) -> dict[str, Any]:
    """The model of a measurement: where it comes from, its weights (their `sha256`, if it is known) and its configuration."""
    return {
        "name": model.cfg.model_name,
        "revision": model.cfg.revision,
        "weights_sha256": weights_sha256(model) if sha256 is None else sha256,
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
