"""Tasks by name: built in, from reasoning-gym, or the user's own `module:ATTRIBUTE`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable
from typing import Any

from kdrl_jax.config import load_attribute
from kdrl_jax.rewards.pool import Extractor, Verifier
from kdrl_jax.rewards.text_answer import same_text
from kdrl_jax.tasks import arithmetic, knights_knaves, reasoning_gym
from kdrl_jax.types import Problem, UserError


@dataclasses.dataclass(frozen=True)
class Task:
    r"""A source of problems.

    problems: `(count, seed, *, split='train' | 'test', …) -> list[Problem]`, a function of its
      arguments alone; `count` problems, the splits disjoint whatever the seeds (see `split_of`).
    solution: the worked response to a problem, without the end token, for supervised warm-up;
      None: there is none.
    alphabet: the characters that problems and solutions are written with, apart from the pieces
      `<think>`, `</think>`, `\boxed{` and `}`, which the embedded tokenizer always has; None: the
      task needs a real model's tokenizer.
    verify: `(answer, gold, meta) -> bool` judges the response's answer against the problem's
      answer and meta; None: mathematical equivalence.
    answer: `(completion) -> str | None` finds the answer in a completion where reward.answer is
      "task"; with reward.require_format it is given what follows `</think>`. None: there is none.
    """

    problems: Callable[..., list[Problem]]
    solution: Callable[[Problem], str] | None = None
    alphabet: str | None = None
    verify: Verifier | None = None
    answer: Extractor | None = None


TASKS = {
    "arithmetic": Task(arithmetic.problems, arithmetic.solution, "0123456789+-=, "),
    "knights_knaves": Task(knights_knaves.problems, verify=knights_knaves.same_roles),
    "knights_knaves_symbolic": Task(
        knights_knaves.symbolic_problems,
        knights_knaves.symbolic_solution,
        knights_knaves.ALPHABET,
        knights_knaves.same_letters,
    ),
}

_GIVEN = ("count", "seed", "split")  # from data.size, data.seed and the use


def get_task(name: str) -> Task:
    """The task of this name.

    Args:
      name: a key of TASKS; 'reasoning_gym/NAME'; or 'module:ATTRIBUTE', a `Task` in a module that
        Python finds, also from the working directory.

    Raises:
      UserError: no such task (with the nearest), or one that cannot be used (with the reason).
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith(reasoning_gym.PREFIX):
        problems = reasoning_gym.problems_of(name.removeprefix(reasoning_gym.PREFIX))
        return Task(problems, verify=same_text)
    if ":" in name:
        return _own_task(name)
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
    raise UserError(
        f"data.task: no task {name!r}; the nearest is {near!r}; also reasoning_gym/NAME and "
        "module:ATTRIBUTE"
    )


def task_args(text: str, task: Task | None = None) -> dict[str, Any]:
    """The keyword arguments for a task's `problems` in `data.task_args`.

    Args:
      text: a JSON object, or "" for none.
      task: whose arguments they must be; None: not checked.

    Raises:
      UserError: not a JSON object, or arguments that the task does not have.
    """
    try:
        args = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(
            f"data.task_args: {text!r} is not JSON ({error}); write '{{\"name\": value}}'"
        ) from error
    if not isinstance(args, dict):
        raise UserError(f"data.task_args: {text!r} must be a JSON object: '{{\"name\": value}}'")
    if task is not None:
        parameters = inspect.signature(task.problems).parameters.values()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in _GIVEN]
        wrong = [n for n in args if n in _GIVEN or (n not in known and not open_ended)]
        has = f"has {', '.join(known)}" if known else "takes none of that name"
        if wrong:
            raise UserError(*(f"data.task_args: no argument {n!r}; the task {has}" for n in wrong))
    return args


def task_problems(
    name: str, count: int, seed: int, *, split: str = "train", args: str = ""
) -> list[Problem]:
    """`count` problems of a task; `args` is `data.task_args`.

    Raises:
      UserError: see `get_task` and `task_args`; an argument the task refuses; fewer problems than
        `count`; something else than problems.
    """
    task = get_task(name)
    keywords = task_args(args, task)
    try:
        problems = task.problems(count, seed, split=split, **keywords)
    except (TypeError, ValueError) as error:
        if not keywords and ":" in name:
            raise  # the user's own code: the traceback says more
        raise UserError(f"data.task_args: {name} refuses {args or '{}'}: {error}") from error
    if not isinstance(problems, list) or len(problems) != count:
        raise UserError(f"data.task: {name}: problems() must return a list of {count} problems")
    for p in problems:
        if not isinstance(p, Problem) or not isinstance(p.problem, str):
            raise UserError(f"data.task: {name}: {p!r} is no Problem with a text")
        if not isinstance(p.answer, str):
            raise UserError(f"data.task: {name}: the answer {p.answer!r} must be a string")
    return problems


def task_verifier(name: str) -> Verifier | str | None:
    """What `Grader(verify=…)` takes for a task; None: mathematical equivalence.

    Our own verifiers run in this process. That of a 'module:ATTRIBUTE' may hang or crash, so it is
    given by name and runs in worker processes.
    """
    if not name or (verify := get_task(name).verify) is None:
        return None
    return f"{name}.verify" if ":" in name else verify


def task_form(name: str) -> Extractor | str:
    """Returns what `Grader(form=…)` takes where a task says what the answer of a completion is.

    That of a 'module:ATTRIBUTE' runs in worker processes, as its verifier does.

    Raises:
      UserError: no such task, none at all, or one that does not say.
    """
    if not name:
        raise UserError(
            "reward.answer: 'task' needs data.task, whose function says what the answer is; name "
            "a task, or use 'boxed', 'last_number' or 'text'"
        )
    if (answer := get_task(name).answer) is None:
        raise UserError(
            f"reward.answer: 'task', but {name!r} has no function `answer`; give it one, or use "
            "'boxed', 'last_number' or 'text'"
        )
    return f"{name}.answer" if ":" in name else answer


def _own_task(name: str) -> Task:
    task = load_attribute("data.task", name, lambda x: isinstance(x, Task), "tasks")
    if not isinstance(task, Task):
        raise UserError(
            f"data.task: {name!r} is a {type(task).__name__}; make it a kdrl_jax.tasks.Task"
        )
    return task
