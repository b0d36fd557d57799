"""The problems and the tokenizer that a config asks for."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from kdrl_jax.data import (
    SentencePieceTokenizer,
    Tokenizer,
    encode_prompts,
    load_problems,
    load_tokenizer,
)
from kdrl_jax.tasks.registry import TASKS
from kdrl_jax.training.evaluation import EncodedProblem
from kdrl_jax.training.metrics import Display
from kdrl_jax.training.roles import model_folder
from kdrl_jax.types import Problem, UserError


def load_run_tokenizer(config: ConfigDict) -> Tokenizer:
    """`tokenizer`'s folder, else the student's, else one made from the task's alphabet."""
    folder = config.tokenizer or config.student.path
    if folder:
        return load_tokenizer(model_folder(folder))
    return SentencePieceTokenizer.train(TASKS[config.data.task].alphabet)


def load_run_data(
    config: ConfigDict, tokenizer: Tokenizer, display: Display
) -> tuple[list[EncodedProblem], list[EncodedProblem]]:
    """Tokenised training problems and held-out problems; the latter empty if eval.every is 0.

    Raises:
      UserError: unreadable rows, nothing left after the filters, too few problems for a step.
    """
    data = config.data
    if data.task:
        task = TASKS[data.task]
        training = task.problems(data.size, data.seed, split="train")
        held_out = task.problems(config.eval.problems, data.seed, split="test")
    else:
        training = load_problems(Path(data.path), data.fields)
        wanted = data.eval_path and config.eval.every
        held_out = load_problems(Path(data.eval_path), data.fields) if wanted else []
    encoded = _encode(training, config, tokenizer, display, "training problems", data.path)
    if len(encoded) < config.rollout.prompts_per_step:
        raise UserError(
            f"rollout.prompts_per_step: {config.rollout.prompts_per_step} exceeds the "
            f"{len(encoded)} problems of {data.path or data.task}; lower it"
        )
    if not config.eval.every:
        return encoded, []
    held_out = held_out[: config.eval.problems]
    test = _encode(held_out, config, tokenizer, display, "held-out problems", data.eval_path)
    return encoded, test


def _encode(
    problems: list[Problem],
    config: ConfigDict,
    tokenizer: Tokenizer,
    display: Display,
    what: str,
    path: str,
) -> list[EncodedProblem]:
    style, limit = config.data.prompt_style, config.data.max_prompt_tokens
    kept, report = encode_prompts(problems, tokenizer, style, limit)
    display.say(f"{what}: {report}")
    if not kept:
        source = path or config.data.task
        raise UserError(f"{source}: no {what} left after filtering ({report})")
    return kept
