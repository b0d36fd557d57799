"""Held-out accuracy of a policy, with the rollout engine it trains with."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from kdrl_jax.data import Tokenizer, pad_prompts
from kdrl_jax.rewards import Grader
from kdrl_jax.rollout import RolloutEngine, request_keys, sampling_params
from kdrl_jax.types import FINISH_LENGTH, Params, Problem, Rollouts, Verdict

EncodedProblem = tuple[Problem, list[int]]


def completion_texts(rollouts: Rollouts, tokenizer: Tokenizer) -> list[str]:
    """The P·G completions as text, without the end token. Waits for the rollouts."""
    tokens, lengths, finish = jax.device_get(
        (rollouts.tokens, rollouts.lengths, rollouts.finish_reason)
    )
    flat = tokens.reshape(-1, tokens.shape[-1])
    keep = (lengths - (finish != FINISH_LENGTH)).reshape(-1)
    return [tokenizer.decode(row[:n].tolist()) for row, n in zip(flat, keep, strict=True)]


def evaluate(
    engine: RolloutEngine,
    params: Params,
    problems: Sequence[EncodedProblem],
    tokenizer: Tokenizer,
    grader: Grader,
    *,
    samples: int,
    batch: int,
    temperature: float,
    max_new_tokens: int,
    buckets: Sequence[int],
    seed: int,
) -> tuple[dict[str, float], list[Verdict]]:
    """`eval/…` metrics: the mean reward over problems and samples, lengths, truncation.

    The last batch is filled up with repeats, which count for nothing; the keys do not depend on
    the training step, so two evaluations differ by the policy alone.
    """
    batch = min(batch, len(problems))
    verdicts: list[Verdict] = []
    lengths: list[float] = []
    truncated: list[bool] = []
    sampling = sampling_params(
        (batch, samples),
        tokenizer.stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    for start in range(0, len(problems), batch):
        real = list(problems[start : start + batch])
        filled = [real[i % len(real)] for i in range(batch)]
        keys = request_keys(seed, 0, start + np.arange(batch), samples)
        prompts = pad_prompts([ids for _, ids in filled], buckets, tokenizer.pad_id)
        rollouts = engine.generate(params, prompts, keys, sampling)
        texts = completion_texts(rollouts, tokenizer)[: len(real) * samples]
        answers = [problem.answer for problem, _ in real for _ in range(samples)]
        verdicts += grader.grade(texts, answers)
        lengths += np.asarray(rollouts.lengths)[: len(real)].reshape(-1).tolist()
        finish = np.asarray(rollouts.finish_reason)[: len(real)].reshape(-1)
        truncated += (finish == FINISH_LENGTH).tolist()
    return {
        "eval/accuracy": float(np.mean([v.reward for v in verdicts])),
        "eval/length": float(np.mean(lengths)),
        "eval/truncated_frac": float(np.mean(truncated)),
    }, verdicts
