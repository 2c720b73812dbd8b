"""Work that pauses after every layer, so that several texts can go through the layers side by side.

Where weights are streamed, that is what lets all texts share one reading of each block.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterable
from typing import Any, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch

from hooked_moe.components.precision import without_autocast

P = ParamSpec("P")
Done = TypeVar("Done")
DoneOut = TypeVar("DoneOut", covariant=True)
Steps = Generator[None, None, Done]
"""A task that yields after every layer, and returns its result."""


def advance_one_layer(task: Steps[Any]) -> bool:
    """Run a task to its next pause; False if it ended instead."""
    try:
        next(task)
    except StopIteration:
        return False
    return True


def run_to_end(task: Steps[Done]) -> Done:
    """Run a task without regard to its pauses."""
    while True:
        try:
            next(task)
        except StopIteration as stop:
            return stop.value


def side_by_side(tasks: Iterable[Steps[Done]]) -> Steps[list[Done]]:
    """Run several tasks through the layers together: each waits until all have done a layer. What each of them returns."""
    results: dict[int, Done] = {}

    def keep(number: int, task: Steps[Done]) -> Steps[None]:
        results[number] = yield from task

    active = [keep(number, task) for number, task in enumerate(tasks)]
    while active:
        active = [task for task in active if advance_one_layer(task)]
        if active:
            yield
    return [results[number] for number in range(len(results))]


def one_by_one(tasks: Iterable[Steps[Done]]) -> Steps[list[Done]]:
    """Run several tasks one after another. What each of them returns."""
    results = []
    for task in tasks:
        results.append((yield from task))
    return results


def in_turn(tasks: Iterable[Steps[Done]], streamed: bool) -> Steps[list[Done]]:
    """Run tasks one after another; side by side where weights are `streamed`, so that each block is read once for all."""
    return side_by_side(tasks) if streamed else one_by_one(tasks)


def with_gradients(task: Steps[Done]) -> Steps[Done]:
    """The same task, able to take gradients where others that run beside it are in inference mode."""
    while True:
        with torch.inference_mode(False):
            try:
                next(task)
            except StopIteration as stop:
                return stop.value
        yield


def counted(task: Steps[Done], update: Callable[[int], object], n_layers: int) -> Steps[Done]:
    """The same task; `update` is told of every layer that it has done, of `n_layers` by its end."""
    done = 0
    while True:
        try:
            next(task)
        except StopIteration as stop:
            update(n_layers - done)
            return stop.value
        if done < n_layers:
            update(1)
            done += 1
        yield


@without_autocast()
def run_without_grad(task: Steps[Done]) -> Done:
    """Run a measurement to its end, without gradients. Inference mode takes a sixth less time than `no_grad` for small models."""
    with torch.inference_mode():
        return run_to_end(task)


@runtime_checkable
class Pausable(Protocol[P, DoneOut]):
    """A function that runs to its end when it is called; its `steps` are the same as a task that pauses."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> DoneOut: ...

    def steps(self, *args: P.args, **kwargs: P.kwargs) -> Steps[DoneOut]: ...


def pausable(task: Callable[P, Steps[Done]]) -> Pausable[P, Done]:
    """Make an ordinary function, which runs to its end, of one that makes a task. `function.steps(...)` is the task itself."""

    @functools.wraps(task)
    def function(*args: P.args, **kwargs: P.kwargs) -> Done:
        return run_without_grad(task(*args, **kwargs))

    signature = inspect.signature(task)
    returned = str(signature.return_annotation).removeprefix("Steps[").removesuffix("]")
    function.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
    function.steps = task  # type: ignore[attr-defined]
    return cast("Pausable[P, Done]", function)
