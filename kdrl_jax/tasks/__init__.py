"""Tasks: where problems come from, how a worked solution reads, and who judges an answer.

A task is a `Task`. Built in are `TASKS`; `reasoning_gym/NAME` needs the extra `reasoning`; one's
own is named `module:ATTRIBUTE`.
"""

from kdrl_jax.tasks.registry import (
    TASKS,
    Task,
    get_task,
    task_args,
    task_problems,
    task_verifier,
)
from kdrl_jax.tasks.splits import split_of
from kdrl_jax.types import Problem

__all__ = [
    "TASKS",
    "Problem",
    "Task",
    "get_task",
    "split_of",
    "task_args",
    "task_problems",
    "task_verifier",
]
