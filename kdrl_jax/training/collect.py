"""From problems to graded rollouts, with dynamic sampling where a config asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from kdrl_jax.data import PromptBatches, Tokenizer, pad_prompts
from kdrl_jax.rewards import Grader
from kdrl_jax.rollout import Finished, RolloutEngine, request_keys
from kdrl_jax.training.evaluation import EncodedProblem
from kdrl_jax.types import Params, Problem, Rollouts, SamplingParams, Verdict

Useful = Callable[[Float[np.ndarray, "P G"]], Bool[np.ndarray, "P"]]


def mixed(rewards: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, "P"]:
    """Groups that policy gradients learn from: those whose rewards are not all equal."""
    return rewards.max(axis=1) != rewards.min(axis=1)


def solved(rewards: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, "P"]:
    """Groups that rejection sampling learns from: those with a right response."""
    return rewards.max(axis=1) > 0


class Collected:
    """P·G rollouts of one step with their texts. Asking for `verdicts` waits for the grader."""

    def __init__(
        self,
        asked: Sequence[EncodedProblem],
        rollouts: Rollouts,
        texts: Sequence[str],
        grade: Callable[[], list[Verdict]],
        metrics: dict[str, float],
    ):
        self.asked, self.rollouts, self.texts = asked, rollouts, texts
        self.metrics = metrics
        self._grade = grade

    @functools.cached_property
    def verdicts(self) -> list[Verdict]:
        """Of the P·G rollouts, problem by problem."""
        return self._grade()

    @property
    def rewards(self) -> Float[np.ndarray, "P G"]:
        """Outcome rewards, float32."""
        rewards = [verdict.reward for verdict in self.verdicts]
        return np.array(rewards, np.float32).reshape(len(self.asked), -1)


class Collector:
    """Samples and grades the groups of a step.

    Args:
      engine: of the model that samples.
      sampling: see `sampling_params`; for the [P, G] requests of a rollout batch.
      refill: how many more rollout batches may be drawn to replace groups that are not `useful`
        (dynamic sampling, DAPO, arXiv 2503.14476). What cannot be replaced stays.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        problems: Sequence[EncodedProblem],
        batches: PromptBatches,
        tokenizer: Tokenizer,
        grader: Grader,
        sampling: SamplingParams,
        *,
        seed: int,
        refill: int = 0,
        useful: Useful = mixed,
    ):
        self._engine, self._problems, self._batches = engine, problems, batches
        self._tokenizer, self._grader, self._sampling = tokenizer, grader, sampling
        self._seed, self._refill, self._useful = seed, refill, useful
        self._seen: dict[int, float] = {}  # mean length of a problem's last completions
        self._group = sampling.max_new_tokens.shape[1]
        # Groups of several batches are joined, so they must be of one width.
        self._buckets = engine.prompt_buckets[-1:] if refill else engine.prompt_buckets

    def collect(
        self, params: Params, position: int, meanwhile: Callable[[], Any] = lambda: None
    ) -> tuple[Collected, int]:
        """The rollouts of a step, and the data position after them.

        Args:
          params: of the model that samples.
          position: the next rollout batch of the data.
          meanwhile: called while the devices sample.
        """
        found, position = self._draw(params, position, meanwhile), position + 1
        if not self._refill:
            return found, position
        drawn = [found.rewards]
        while not (useful := self._useful(found.rewards)).all() and len(drawn) <= self._refill:
            more, position = self._draw(params, position), position + 1
            drawn.append(more.rewards)
            found = self._replace(found, useful, more)
        found.metrics = {
            "rollout/batches": float(len(drawn)),
            "rollout/useful_frac": float(self._useful(found.rewards).mean()),
            "reward/drawn_mean": float(np.mean(drawn)),
        }
        return found, position

    def _draw(
        self, params: Params, position: int, meanwhile: Callable[[], Any] = lambda: None
    ) -> Collected:
        chosen = self._batches[position]
        asked = [self._problems[i] for i in chosen]
        prompts = pad_prompts([ids for _, ids in asked], self._buckets, self._tokenizer.pad_id)
        keys = request_keys(self._seed, position, chosen, self._group)
        texts = [""] * keys.size
        graded: list[tuple[list[int], Future[list[Verdict]]]] = []

        def read(finished: list[Finished]) -> None:
            numbers = [request.number for request in finished]
            for request in finished:
                texts[request.number] = self._tokenizer.decode(request.tokens.tolist())
            problems = [asked[number // self._group][0] for number in numbers]
            graded.append((numbers, self._grade([texts[n] for n in numbers], problems)))

        def grade() -> list[Verdict]:
            found = {n: v for ns, job in graded for n, v in zip(ns, job.result(), strict=True)}
            return [found[number] for number in range(len(texts))]

        rollouts = self._engine.generate(
            params,
            prompts,
            keys,
            self._sampling,
            expected_lengths=self._expected(chosen),
            meanwhile=meanwhile,
            on_finished=read,
        )
        self._seen.update(zip(chosen, rollouts.lengths.mean(1).tolist(), strict=True))
        return Collected(asked, rollouts, texts, grade, {})

    def _grade(self, texts: list[str], problems: list[Problem]) -> Future[list[Verdict]]:
        """Verdicts on a response to each problem, from processes that work beside the devices."""
        answers, metas = [p.answer for p in problems], [p.meta for p in problems]
        return self._grader.submit(texts, answers, metas)

    def _expected(self, chosen: Iterable[int]) -> list[float]:
        """What completions of these problems measured when last seen; new ones the usual."""
        usual = float(np.mean([*self._seen.values()])) if self._seen else 0.0
        return [self._seen.get(problem, usual) for problem in chosen]

    def _replace(
        self, found: Collected, useful: Bool[np.ndarray, "P"], more: Collected
    ) -> Collected:
        """`found` with useful groups of `more` in place of its useless ones, as far as they go."""
        groups = len(useful)
        spare = iter(np.flatnonzero(self._useful(more.rewards)) + groups)
        picks = [p if good else int(next(spare, p)) for p, good in enumerate(useful)]
        rollouts = jax.tree.map(
            lambda a, b: np.concatenate([a, b])[picks], found.rollouts, more.rollouts
        )

        def flat(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
            both = [*first, *second]
            return [both[p * self._group + g] for p in picks for g in range(self._group)]

        verdicts = flat(found.verdicts, more.verdicts)
        asked = [*found.asked, *more.asked]
        texts = flat(found.texts, more.texts)
        return Collected([asked[p] for p in picks], rollouts, texts, lambda: verdicts, {})
