"""Tasks of reasoning-gym (extra `reasoning`): its questions and answers, our graders.

Its own scorers are never called: some execute what a model wrote, others give partial credit. So
only data sets that leave scoring to the library's default are tasks here, because that one
compares with a single answer; which ones these are is read from the installed version.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from kdrl_jax.tasks.splits import collect
from kdrl_jax.types import Problem, UserError

PREFIX = "reasoning_gym/"
CHUNK = 500  # problems of one seed of reasoning-gym


def problems_of(name: str) -> Callable[..., list[Problem]]:
    """The `problems` of the task `reasoning_gym/NAME`.

    Raises:
      UserError: reasoning-gym is not installed, has no such data set, or only one whose answers
        its own scorer alone can judge.
    """
    usable = names()
    if name not in _library().factory.DATASETS:
        near = difflib.get_close_matches(name, usable, n=1, cutoff=0.0)[0]
        raise UserError(
            f"data.task: no data set {PREFIX + name!r}; the nearest that can be used is "
            f"{PREFIX + near!r}"
        )
    if name not in usable:
        raise UserError(
            f"data.task: {PREFIX + name!r} has no single right answer to compare with, only a "
            f"scorer of its own; use one of {', '.join(usable)}"
        )

    def problems(count: int, seed: int, *, split: str = "train", **args: Any) -> list[Problem]:
        """`args`: of the data set's configuration in reasoning-gym."""
        entries = _entries(name, f"{name} {split} {seed}", args)

        def draw() -> tuple[str, Problem]:
            question, answer = next(entries)
            return question, Problem("", question, answer)

        with contextlib.redirect_stdout(io.StringIO()):  # some data sets print
            return collect(PREFIX + name, count, seed, split, draw)

    return problems


def names() -> list[str]:
    """The data sets of the installed version whose answer is one text."""
    default = _library().dataset.ProceduralDataset.score_answer
    found = _library().factory.DATASETS.items()
    return sorted(name for name, (kind, _) in found if kind.score_answer is default)


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # in packages it needs
            import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"data.task: {PREFIX}… needs reasoning-gym ({error}); pip install reasoning-gym"
        ) from error
    return reasoning_gym


def _entries(name: str, key: str, args: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Questions and answers without end.

    The data set seeds its entry i with seed + i, so that neighbouring seeds share entries; seeds
    from a hash lie far apart.
    """
    _, settings = _library().factory.DATASETS[name]
    known = [field for field in settings.__dataclass_fields__ if field not in ("size", "seed")]
    if wrong := [argument for argument in args if argument not in known]:
        has = f"{PREFIX}{name} has {', '.join(known)}"
        raise UserError(*(f"data.task_args: no argument {argument!r}; {has}" for argument in wrong))
    for number in itertools.count():
        digest = hashlib.sha256(f"{key} {number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big") >> 1
        try:
            dataset = _library().create_dataset(name, size=CHUNK, seed=seed, **args)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"data.task_args: {PREFIX}{name} refuses {args}: {error}") from error
        for entry in map(dataset.__getitem__, range(CHUNK)):
            if not isinstance(entry["answer"], str) or not entry["answer"].strip():
                raise UserError(
                    f"data.task: {PREFIX}{name}: {entry['question'][:60]!r} has no answer to "
                    f"compare with, but {entry['answer']!r}"
                )
            yield entry["question"], entry["answer"]
