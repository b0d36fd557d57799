"""Built-in tasks by name: where problems come from and how a worked solution reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kdrl_jax.tasks import arithmetic
from kdrl_jax.types import Problem


@dataclasses.dataclass(frozen=True)
class Task:
    """A source of problems.

    problems: `(count, seed, split='train' | 'test') -> list[Problem]`, splits disjoint.
    solution: the worked response to a problem, without the end token.
    alphabet: the characters that problems and solutions are written with, apart from the pieces
      `<think>`, `</think>`, `\\boxed{` and `}`, which the embedded tokenizer always has.
    """

    problems: Callable[..., list[Problem]]
    solution: Callable[[Problem], str]
    alphabet: str


TASKS = {
    "arithmetic": Task(arithmetic.problems, arithmetic.solution, "0123456789+-=, "),
}
