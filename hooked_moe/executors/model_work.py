"""Work on a model: in this process with the one at hand, elsewhere with the same one, loaded there as it was loaded here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, runtime_checkable

from hooked_moe.executors.work import Loader, Task, Unit, UnitIn
from hooked_moe.loading.pretrained import from_pretrained
from hooked_moe.transformer import Transformer


@runtime_checkable
class ModelTask(Protocol[UnitIn]):
    """A `Task` on a model."""

    def do(self, resource: Transformer, unit: UnitIn) -> None:
        """Do a unit with the model."""


@dataclass(frozen=True)
class ModelWork(Generic[Unit]):
    """A task and its model."""

    model: Transformer
    task: ModelTask[Unit]
    side_by_side: int = 1
    check: Callable[[Transformer], None] | None = None
    """Called with the model that another process has loaded; raises `ValueError` if it is not this one. It can be pickled."""

    @property
    def on_gpu(self) -> bool:
        return self.model.cfg.device.type == "cuda"

    def do(self, unit: Unit) -> None:
        self.task.do(self.model, unit)

    def elsewhere(self) -> tuple[Loader, Task[Unit]]:
        if self.model.loaded_from is None:
            raise ValueError(
                "this model was made in memory, and workers in other processes have to load it: write it with "
                "model.save_pretrained(directory), and take HookedMoE.from_pretrained(directory) in its place"
            )
        if self.model.has_hooks:
            raise ValueError("this model has hooks, which act in this process alone: call model.reset_hooks() first")
        return LoadModel(self.model.loaded_from, self.check), self.task


@dataclass(frozen=True)
class LoadModel:
    """Loads the model that another process has."""

    arguments: dict[str, Any]
    """Those of `from_pretrained`."""
    check: Callable[[Transformer], None] | None

    def __call__(self, device: str) -> Transformer:
        model = from_pretrained(Transformer, **self.arguments | {"device": device})
        if self.check is not None:
            self.check(model)
        return model
