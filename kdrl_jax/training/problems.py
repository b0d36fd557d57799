"""The problems and the tokenizer that a config asks for."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.config import digest
from kdrl_jax.data import (
    SentencePieceTokenizer,
    Tokenizer,
    apply_filters,
    encode_prompt,
    encode_prompts,
    hold_out,
    load_tokenizer,
    parse_filters,
    read_problems,
    shown_prompt,
)
from kdrl_jax.objectives import METHODS
from kdrl_jax.rewards import Grader, RewardFunctions
from kdrl_jax.tasks.registry import get_task, task_form, task_problems, task_verifier
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import EncodedProblem
from kdrl_jax.training.roles import model_folder
from kdrl_jax.types import Problem, UserError

GRADING = ("workers", "timeout_s", "require_format", "answer")
"""Keys of `reward` that a `Grader` is made of."""


class RunData(NamedTuple):
    """What a run trains on and is measured on, tokenised."""

    training: list[EncodedProblem]
    held_out: list[EncodedProblem]
    """Empty if eval.every is 0."""
    report: dict[str, Any]
    """What was read, filtered and left out: JSON-able, for the run's folder."""


def load_run_tokenizer(config: ConfigDict) -> Tokenizer:
    """`tokenizer`'s folder, else the student's, else one made from the task's alphabet."""
    folder = config.tokenizer or config.student.path
    if folder:
        return load_tokenizer(model_folder(folder))
    alphabet = get_task(config.data.task).alphabet
    assert alphabet is not None  # see validation
    return SentencePieceTokenizer.train(alphabet)


def make_grader(config: ConfigDict, task: str) -> Grader:
    """Returns a grader with the config's `reward` settings.

    Args:
      task: whose verifier judges; "": answers are mathematics.

    Raises:
      UserError: see `task_form`.
    """
    c = config.reward
    return Grader(
        c.workers,
        c.timeout_s,
        c.require_format,
        verify=task_verifier(task),
        form=task_form(config.data.task) if c.answer == "task" else c.answer,
    )


def make_reward_functions(config: ConfigDict) -> RewardFunctions:
    """The functions of `reward.functions`, with the config's settings."""
    c = config.reward
    settings = {"workers": c.workers, "timeout_s": c.timeout_s}
    return RewardFunctions(c.functions, c.verdict_weight, **settings)


def answers_needed(config: ConfigDict) -> bool:
    """Returns whether training reads right and wrong: in a reward, a mask or a choice of groups."""
    method = METHODS[config.objective]
    rewarded = method.policy and config.reward.verdict_weight > 0
    masked = method.kd and config.kd_mask != "none"
    adaptive = method.kd and config.beta.schedule == "adaptive"  # β falls where rewards stall
    return bool(rewarded or masked or adaptive or method.supervised or config.rollout.refill)


def read_run_data(config: ConfigDict, tokenizer: Tokenizer, display: Display) -> RunData:
    """Training problems, filtered and tokenised, and held-out problems.

    Raises:
      UserError: unreadable rows, nothing left after the filters, too few problems for a step.
    """
    data, source = config.data, config.data.path or config.data.task
    report: dict[str, Any] = {}
    wanted = config.eval.problems if config.eval.every else 0
    with processes.together():
        parse_filters(data.filters)  # before anything is read or downloaded
        if data.task:
            draw = functools.partial(task_problems, data.task, seed=data.seed, args=data.task_args)
            training = draw(data.size, split="train")
            held_out = draw(wanted, split="test") if wanted else []
        else:
            needed = answers_needed(config)
            training = _read(data.path, data, display, report, "training", answers=needed)
            if without := sum(not problem.answer for problem in training):
                display.say(
                    f"{data.path}: {without} of {len(training)} problems have no answer; "
                    f"objective={config.objective!r} needs none here, and reward/… counts their "
                    "responses as wrong"
                )
            held_out = []
            if data.eval_fraction:
                training, held_out = _hold_out(training, config, display, report)
                if wanted and any(not problem.answer for problem in held_out):
                    raise UserError(
                        f"data.eval_fraction: {data.eval_fraction}, but held-out problems of "
                        f"{data.path} have no answer to evaluate by; fill it in, give a file with "
                        "answers by data.eval_path, or set eval.every=0"
                    )
            elif wanted:
                held_out = _read(data.eval_path, data, display, report, "held-out")
        if data.filters:
            length = functools.partial(_prompt_length, tokenizer=tokenizer, style=data.prompt_style)
            training, filtered = apply_filters(training, data.filters, length)
            display.say(str(filtered))
            report["filters"] = filtered.to_dict()
            for line in filtered.warnings():
                display.alert(f"warning: {source}: {line}")
    if processes.count() > 1:  # which from here on share the work
        sets = {"set of training problems": training, "set of held-out problems": held_out}
        processes.agree(
            source,
            {k: digest([(x.id, x.problem, x.answer) for x in found]) for k, found in sets.items()},
        )
    encoded = _encode(training, config, tokenizer, display, report, "training", source)
    display.say(shown_prompt(*encoded[0], tokenizer))
    if len(encoded) < config.rollout.prompts_per_step:
        raise UserError(
            f"rollout.prompts_per_step: {config.rollout.prompts_per_step} exceeds the "
            f"{len(encoded)} problems of {source}; lower it"
        )
    if not wanted:
        return RunData(encoded, [], report)
    source = data.eval_path or source
    test = _encode(held_out[:wanted], config, tokenizer, display, report, "held-out", source)
    return RunData(encoded, test, report)


def _read(
    path: str,
    data: ConfigDict,
    display: Display,
    report: dict[str, Any],
    what: str,
    answers: bool = True,
) -> list[Problem]:
    reading: dict[str, Any] = {"on_bad": data.on_bad, "answers": answers}
    with display.doing(f"reading {path}", row=False):  # the hub's libraries have bars
        problems, found = read_problems(path, data.fields, **reading)
    if found.bad or found.notes or found.unpinned:
        display.say(str(found))
    report[what] = found.to_dict()
    return problems


def _hold_out(
    problems: list[Problem], config: ConfigDict, display: Display, report: dict[str, Any]
) -> tuple[list[Problem], list[Problem]]:
    """`hold_out` by the config, said and reported."""
    data = config.data
    choice = (data.eval_fraction, config.eval.problems, data.seed)
    training, held_out = hold_out(problems, *choice)
    again = len(problems) - len(training) - len(held_out)
    repeated = f", and {again} more with the same texts left out" if again else ""
    display.say(
        f"{data.path}: {len(held_out)} of {len(problems)} problems held out for evaluation "
        f"(data.eval_fraction={data.eval_fraction}){repeated}"
    )
    report["held-out"] = {
        **{"path": data.path, "fraction": data.eval_fraction, "seed": data.seed},
        **{"kept": len(held_out), "repeated": again},
    }
    return training, held_out


def _prompt_length(problem: Problem, tokenizer: Tokenizer, style: str) -> int:
    return len(encode_prompt(problem, tokenizer, style))


def _encode(
    problems: list[Problem],
    config: ConfigDict,
    tokenizer: Tokenizer,
    display: Display,
    report: dict[str, Any],
    what: str,
    source: str,
) -> list[EncodedProblem]:
    style, limit = config.data.prompt_style, config.data.max_prompt_tokens
    kept, found = encode_prompts(problems, tokenizer, style, limit)
    display.say(f"{what} problems: {found}")
    report[f"{what} prompts"] = dataclasses.asdict(found)
    if not kept:
        raise UserError(f"{source}: no {what} problems left after filtering ({found})")
    return kept
