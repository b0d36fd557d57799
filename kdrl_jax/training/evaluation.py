"""Held-out accuracy of a policy, with the rollout engine it trains with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.data import Tokenizer, pad_prompts
from kdrl_jax.rewards import Grader
from kdrl_jax.rollout import Engine, request_keys, sampling_params
from kdrl_jax.rollout.repetition import repeats
from kdrl_jax.types import (
    FINISH_LENGTH,
    OUTCOMES,
    Params,
    Problem,
    Rollouts,
    SamplingParams,
    Verdict,
)

EncodedProblem = tuple[Problem, list[int]]

NOT_GRADED = Verdict(0.0, "unparsable")
"""Of a request that goes on in the next step, which nobody asks for."""


class Responses(NamedTuple):
    """What a policy said to P problems, G times each: flat lists of P·G, problem by problem."""

    texts: list[str]
    lengths: list[int]
    """Tokens, the end token included."""
    cut: list[bool]
    """Whether the limit ended it."""
    repeats: list[bool]
    """Whether it was cut and had begun to repeat itself."""


def group_of(problem: Problem, by: str) -> str:
    """Returns the value of a problem's column `by`, of a list its length; "" where it has none."""
    value = problem.meta.get(by)
    if isinstance(value, list):
        value = len(value)
    return "" if value is None else str(value)


def completion_texts(rollouts: Rollouts, tokenizer: Tokenizer) -> list[str]:
    """The P·G completions as text, without the end token. Waits for the rollouts."""
    tokens, lengths, finish = jax.device_get(
        (rollouts.tokens, rollouts.lengths, rollouts.finish_reason)
    )
    flat = tokens.reshape(-1, tokens.shape[-1])
    keep = (lengths - (finish != FINISH_LENGTH)).reshape(-1)
    return [tokenizer.decode(row[:n].tolist()) for row, n in zip(flat, keep, strict=True)]


def eval_tokens(config: ConfigDict) -> int:
    """Returns how many tokens a response of an evaluation may have."""
    return config.eval.max_new_tokens or config.rollout.max_new_tokens


def eval_settings(config: ConfigDict) -> dict[str, Any]:
    """Returns the keyword arguments of `evaluate` that a config has."""
    keys = ("samples", "batch", "temperature", "top_p", "require_format", "by")
    found = {key: config.eval[key] for key in keys}
    return {**found, "max_new_tokens": eval_tokens(config), "seed": config.seed}


def eval_slots(slots: int, longest: int, rollout_tokens: int, budget: int, parts: int) -> int:
    """Returns how many responses of `budget` tokens have room where `slots` rollouts have it.

    Args:
      slots: requests that are decoded at once, 1 or more.
      longest: tokens of the longest prompt.
      rollout_tokens: of a rollout.
      parts: that the mesh splits a batch into, a divisor of the result: see `batch_parts`.
    """
    if budget <= rollout_tokens:
        return slots
    room = slots * (longest + rollout_tokens) // (longest + budget)
    return max(room // parts, 1) * parts


def grade_all(
    grader: Grader,
    texts: Sequence[str],
    problems: Sequence[Problem],
    *,
    require_format: bool | None = None,
) -> list[Verdict]:
    """Verdicts on G responses to each of P problems, `texts` being P·G, problem by problem.

    Of several processes each verifies its share; all of them must call.

    Args:
      require_format: default: the grader's.
    """
    each = [problem for problem in problems for _ in range(len(texts) // len(problems))]
    own = [number for number in range(len(texts)) if processes.mine(number)]
    asked = [each[number] for number in own]
    found = grader.grade(
        [texts[number] for number in own],
        [p.answer for p in asked],
        [p.meta for p in asked],
        require_format=require_format,
    )
    return share_verdicts(dict(zip(own, found, strict=True)), len(texts))


def share_verdicts(found: Mapping[int, Verdict], total: int) -> list[Verdict]:
    """The verdicts on all requests, of which each process has those that are its own."""
    outcomes = np.full(total, -1, np.int32)
    rewards = np.zeros(total, np.float32)
    for number, verdict in found.items():
        outcomes[number] = OUTCOMES.index(verdict.outcome)
        rewards[number] = verdict.reward
    outcomes = processes.gather(outcomes).max(axis=0)
    rewards = processes.gather(rewards).sum(axis=0)
    return [
        Verdict(float(reward), OUTCOMES[outcome]) if outcome >= 0 else NOT_GRADED
        for reward, outcome in zip(rewards, outcomes, strict=True)
    ]


def respond(
    engine: Engine,
    params: Params,
    prompts: Sequence[list[int]],
    numbers: Sequence[int],
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    *,
    seed: int,
    progress: Callable[[int, int], Any] = lambda finished, tokens: None,
) -> Responses:
    """Answer one batch of prompts; waits for the devices.

    Args:
      prompts: at most P, where `sampling` is for [P, G] requests. Fewer are filled up with
        repeats, which are not returned, so that the last batch needs no program of its own.
      numbers: of the problems. What is drawn depends on (seed, number, sample), not on the training
        step, and on the batch by rounding alone: two evaluations differ by the policy.
      progress: see `Engine.generate`; it counts the repeats as well.
    """
    batch, samples = sampling.max_new_tokens.shape
    filled = [i % len(prompts) for i in range(batch)]
    rollouts = engine.generate(
        params,
        pad_prompts([prompts[i] for i in filled], engine.prompt_buckets, tokenizer.pad_id),
        request_keys(seed, 0, [numbers[i] for i in filled], samples),
        sampling,
        progress=progress,
    )
    real = len(prompts) * samples
    tokens, lengths, finish = jax.device_get(
        (rollouts.tokens, rollouts.lengths, rollouts.finish_reason)
    )
    rows = tokens.reshape(-1, tokens.shape[-1])[:real]
    ends = lengths.reshape(-1)[:real].tolist()
    cut = (finish.reshape(-1)[:real] == FINISH_LENGTH).tolist()
    return Responses(
        texts=completion_texts(rollouts, tokenizer)[:real],
        lengths=ends,
        cut=cut,
        repeats=[
            c and repeats(row[:n].tolist()) for row, n, c in zip(rows, ends, cut, strict=True)
        ],
    )


def evaluate(
    engine: Engine,
    params: Params,
    problems: Sequence[EncodedProblem],
    tokenizer: Tokenizer,
    grader: Grader,
    *,
    samples: int,
    batch: int,
    temperature: float,
    top_p: float = 1.0,
    max_new_tokens: int = 0,
    require_format: bool | None = None,
    by: str = "",
    seed: int,
    progress: Callable[[int, int], Any] = lambda finished, total: None,
) -> tuple[dict[str, float], list[Verdict]]:
    """`eval/…` metrics: means over problems and samples, and the verdicts.

    Args:
      max_new_tokens: of a response, at most the engine's; 0: as many.
      require_format: default: the grader's.
      by: a column of the problems, see `group_of`; "": none.
      progress: called now and then with how many responses there are, and are to be.

    Returns:
      accuracy (mean verdict), length in tokens, the shares of all responses that were cut by the
      limit (truncated_frac) and that were cut while they repeated themselves (repetition_frac),
      and, where any was cut, the share of the cut ones that did (overlong_repetition_frac). With
      several samples also pass_at_K, the share of problems that any of the K solves, and with `by`
      accuracy/VALUE for each value of that column.
    """
    batch, total = min(batch, len(problems)), len(problems) * samples
    verdicts: list[Verdict] = []
    lengths: list[int] = []
    cut: list[bool] = []
    repeating: list[bool] = []
    sampling = sampling_params(
        (batch, samples),
        tokenizer.stop_ids,
        max_new_tokens=max_new_tokens or engine.max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    for start in range(0, len(problems), batch):
        asked = problems[start : start + batch]
        prompts, numbers = [ids for _, ids in asked], range(start, start + len(asked))

        def drawn(finished: int, _: int, before: int = start * samples) -> None:
            progress(min(before + finished, total), total)

        said = respond(
            engine, params, prompts, numbers, tokenizer, sampling, seed=seed, progress=drawn
        )
        graded = [problem for problem, _ in asked]
        verdicts += grade_all(grader, said.texts, graded, require_format=require_format)
        lengths += said.lengths
        cut += said.cut
        repeating += said.repeats
    right = np.array([v.reward for v in verdicts]).reshape(len(problems), samples)
    parts: dict[str, list[float]] = {}
    for (problem, _), share in zip(problems, right.mean(axis=1).tolist(), strict=True):
        parts.setdefault(group_of(problem, by), []).append(share)
    return {
        "eval/accuracy": float(right.mean()),
        **({f"eval/pass_at_{samples}": float(right.max(axis=1).mean())} if samples > 1 else {}),
        **{f"eval/accuracy/{value}": float(np.mean(x)) for value, x in parts.items() if value},
        "eval/length": float(np.mean(lengths)),
        "eval/truncated_frac": float(np.mean(cut)),
        "eval/repetition_frac": float(np.mean(repeating)),
        **({"eval/overlong_repetition_frac": sum(repeating) / sum(cut)} if any(cut) else {}),
    }, verdicts
