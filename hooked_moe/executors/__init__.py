"""Where units of work are done: in threads of this process, or in processes of a Ray cluster.

A unit has a name, leaves files behind, and leaves the same files when it is done again; so it may be done anywhere, and a unit
that was lost with its worker is done again. `work` says what an executor is given and what it promises.
"""

from hooked_moe.executors.arrival import await_arrival
from hooked_moe.executors.model_work import ModelTask, ModelWork
from hooked_moe.executors.ray_executor import RayExecutor
from hooked_moe.executors.threads import Threads, in_parallel
from hooked_moe.executors.work import Executor, PlainWork, Task, Work

__all__ = [
    "Executor",
    "ModelTask",
    "ModelWork",
    "PlainWork",
    "RayExecutor",
    "Task",
    "Threads",
    "Work",
    "await_arrival",
    "in_parallel",
]
