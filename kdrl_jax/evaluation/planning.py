"""What will be asked and how: everything that can be checked before a model is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from kdrl_jax.config import digest
from kdrl_jax.data import Tokenizer, encode_prompts
from kdrl_jax.evaluation.benchmarks import Benchmark, Loaded, refused_golds
from kdrl_jax.rewards import Grader
from kdrl_jax.training.evaluation import eval_tokens
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.training.validation import differences
from kdrl_jax.types import Problem, UserError

T = TypeVar("T")


class Refusals(list[str]):
    """What is wrong with a command, gathered so that one look mends it all."""

    def attempt(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        """The result of a call, or None if it refused."""
        try:
            return call(*args, **kwargs)
        except UserError as error:
            self += error.problems
            return None

    def raise_any(self) -> None:
        """Raise a UserError unless all went well."""
        if self:
            raise UserError(*dict.fromkeys(self))


class Question(NamedTuple):
    """A problem as it is asked."""

    number: int
    """Its place in the benchmark: what its samples are drawn from, with the seed."""
    problem: Problem
    prompt: list[int]


class Plan(NamedTuple):
    """How one benchmark is evaluated."""

    benchmark: Benchmark
    questions: list[Question]
    samples: int
    batch: int
    """Problems asked at once."""
    settings: dict[str, Any]
    """Everything that shapes a response or its verdict, JSON-able."""
    by: str
    """Column whose values the accuracy is also given by; "": none."""
    kept_out: int
    """Rows that are not asked: without a gold answer, or with one that is not correct itself."""
    listed: list[str]
    """The first of them, with what is wrong."""

    def file(self, output: Path) -> Path:
        """Where the responses go."""
        return output / f"{self.benchmark.name}.jsonl"


def make_plan(
    loaded: Loaded,
    config: ConfigDict,
    tokenizer: Tokenizer,
    grader: Grader,
    *,
    window: int,
    weights: str,
    samples: int | None,
    limit: int | None,
) -> Plan:
    """Put a benchmark's problems into prompts and fix how they are sampled.

    Args:
      window: tokens that the model can attend to.
      weights: names them, see `PolicyFolder.digest`.
      samples: of each problem; None: the benchmark's default.
      limit: the first so many problems; None: all.

    Raises:
      UserError: a prompt leaves too little of the window for a response, or no gold answer can be
        graded.
    """
    benchmark, length = loaded.benchmark, eval_tokens(config)
    style, problems = config.data.prompt_style, loaded.problems[:limit]
    lost = refused_golds(problems, grader)
    encoded, _ = encode_prompts(problems, tokenizer, style, sys.maxsize)
    numbered = [Question(i, problem, ids) for i, (problem, ids) in enumerate(encoded)]
    questions = [question for question in numbered if question.number not in lost]
    if not questions:
        raise UserError(f"{benchmark.name}: {lost[0]}, like all others; mend the answers")
    longest = max(questions, key=lambda q: len(q.prompt))
    if len(longest.prompt) + length > window:
        key = "eval" if config.eval.max_new_tokens else "rollout"
        raise UserError(
            f"{key}.max_new_tokens: {length} and the {len(longest.prompt)} tokens of the prompt "
            f"{longest.problem.id} ({benchmark.name}) exceed the model's window of {window}; "
            "lower it"
        )
    k, by = samples or benchmark.samples, config.eval.by or benchmark.by
    asked = [[q.problem.problem, q.problem.answer, q.prompt] for q in questions]
    return Plan(
        benchmark,
        questions,
        samples=k,
        batch=max(1, config.eval.batch * config.eval.samples // k),
        settings={
            "weights": weights,
            "number_of_problems": len(questions),
            "problems": digest(asked),
            "samples": k,
            "temperature": config.eval.temperature,
            "top_p": config.eval.top_p,
            "max_new_tokens": length,
            "prompt_style": style,
            "answer": config.reward.answer,
            "require_format": config.eval.require_format,
            "by": by,
            "timeout_s": config.reward.timeout_s,
            "dtype": config.student.dtype,
            "seed": config.seed,
        },
        by=by,
        kept_out=loaded.bad + len(lost),
        listed=[*loaded.listed, *lost.values()],
    )


def check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to continue responses that other settings made.

    Args:
      file: of the responses; the settings are beside it.

    Raises:
      UserError: one line per setting that differs.
    """
    path = _settings_of(file)
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if problems := differences(path, before, settings, "--output"):
        raise UserError(*problems)


def write_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings beside the file of the responses that they make."""
    write_atomic(_settings_of(file), json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _settings_of(file: Path) -> Path:
    return file.with_suffix(".settings.json")


def prompt_buckets(buckets: Sequence[int], longest: int) -> list[int]:
    """`buckets`, then doubled until the longest prompt fits: no problem is dropped."""
    found = list(buckets)
    while found[-1] < longest:
        found.append(2 * found[-1])
    return found
