"""A Ray cluster that is none: actors are objects of this process, which do what they are asked when they are waited for."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class Died(BaseException):
    """Raised by a unit that takes its worker with it."""


class RayActorError(Exception):
    """A worker has died, as Ray says it."""


class RayTaskError(Exception):
    """A worker's own error, as Ray brings it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


class _Actor:
    def __init__(self, made: Any) -> None:
        self.made, self.is_dead = made, False

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *inputs: _Reference(self, method, inputs))


class _Reference:
    """What an actor has been asked to do."""

    def __init__(self, actor: _Actor, method: str, inputs: tuple[Any, ...]) -> None:
        self.actor, self.method, self.inputs = actor, method, inputs

    def get(self) -> Any:
        if self.actor.is_dead:
            raise RayActorError("the actor is dead")
        try:
            return getattr(self.actor.made, self.method)(*self.inputs)
        except Died:
            self.actor.is_dead = True
            raise RayActorError("the actor died\nof something") from None
        except Exception as error:
            raise RayTaskError(error) from error


def fake_ray(seed: int, cpus: int = 4) -> SimpleNamespace:
    """What of the package `ray` is used here; who is done first is left to chance."""
    chance = random.Random(seed)

    def remote(kind: Callable[[], Any]) -> SimpleNamespace:
        made = SimpleNamespace(remote=lambda: _Actor(kind()))
        return SimpleNamespace(options=lambda **_: made)

    return SimpleNamespace(
        exceptions=SimpleNamespace(RayActorError=RayActorError, RayTaskError=RayTaskError),
        remote=remote,
        put=lambda value: value,
        wait=lambda references, num_returns, timeout: ([chance.choice(references)], []),
        get=lambda reference: reference.get(),
        kill=lambda actor: setattr(actor, "is_dead", True),
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": float(cpus)}}, {"Alive": False, "Resources": {"CPU": 64.0}}],
        is_initialized=lambda: True,
    )
