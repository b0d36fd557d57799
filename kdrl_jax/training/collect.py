"""From problems to graded rollouts, with dynamic sampling where a config asks for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from kdrl_jax import processes
from kdrl_jax.data import Tokenizer, pad_prompts
from kdrl_jax.rewards import Grader, OwnReward, RewardFunctions
from kdrl_jax.rollout import (
    DecodeStats,
    Engine,
    Finished,
    finished_requests,
    request_keys,
)
from kdrl_jax.training.carried import (
    Group,
    from_text,
    join_groups,
    new_group,
    split_groups,
    to_text,
)
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import EncodedProblem, completion_texts, share_verdicts
from kdrl_jax.training.phases import Phases
from kdrl_jax.types import (
    FINISH_LENGTH,
    UNFINISHED,
    Params,
    Problem,
    Rollouts,
    SamplingParams,
    Verdict,
)

Own = dict[str, OwnReward]
"""What each of `reward.functions` gives, by its name."""


class Batches(Protocol):
    """Which problems each rollout batch asks."""

    per_step: int

    def __getitem__(self, position: int) -> Int[np.ndarray, " P"]:
        """Indices of the problems, [P]."""


def mixed(correct: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """Groups that policy gradients learn from: those with right and wrong responses."""
    return correct.max(axis=1) != correct.min(axis=1)


class Collected:
    """P·G rollouts of one step. Asking for `verdicts` waits for the graders of all processes,
    asking for `own` or `rewards` for reward functions too.

    Args:
      decoding: what drawing them took, with those that were replaced.
      functions: make the reward of verdicts and `own`.
      own: what the functions give to these rollouts.
    """

    def __init__(
        self,
        asked: Sequence[EncodedProblem],
        rollouts: Rollouts,
        grade: Callable[[], list[Verdict]],
        decoding: DecodeStats,
        functions: RewardFunctions,
        own: Callable[[Collected], Own],
    ):
        self.asked, self.rollouts = asked, rollouts
        self.decoding = decoding
        self.metrics: dict[str, float] = {}
        self._grade, self._functions, self._own = grade, functions, own

    @functools.cached_property
    def verdicts(self) -> list[Verdict]:
        """Of the P·G rollouts, problem by problem."""
        return self._grade()

    @property
    def correct(self) -> Float[np.ndarray, "P G"]:
        """The verifier's 1 and 0, float32."""
        rewards = [verdict.reward for verdict in self.verdicts]
        return np.array(rewards, np.float32).reshape(len(self.asked), -1)

    @functools.cached_property
    def own(self) -> Own:
        """What reward functions give."""
        return self._own(self)

    @property
    def rewards(self) -> Float[np.ndarray, "P G"]:
        """What advantages are made of, float32: `correct`, unless functions say more."""
        return self._functions.total(self.correct, self.own)


class Collector:
    """Samples and grades the groups of a step.

    Args:
      engine: of the model that samples.
      sampling: see `sampling_params`; for the [P, G] requests of a rollout batch.
      refill: how many more rollout batches may be drawn to replace groups that are not `mixed`
        (dynamic sampling, DAPO, arXiv 2503.14476). What cannot be replaced stays.
      carry: problems that are sampled beyond the P of a step, which begins as soon as P are done.
        The others go on in the next step (partial rollouts, arXiv 2501.12599).
      carried: those of an earlier collector, from its `carried`.
      phases: is told how far rollouts and verification are.
      functions: rewards of the user's own; default: none.
    """

    def __init__(
        self,
        engine: Engine,
        problems: Sequence[EncodedProblem],
        batches: Batches,
        tokenizer: Tokenizer,
        grader: Grader,
        sampling: SamplingParams,
        *,
        seed: int,
        refill: int = 0,
        carry: int = 0,
        carried: str = "",
        phases: Phases | None = None,
        functions: RewardFunctions | None = None,
    ):
        self._engine, self._problems, self._batches = engine, problems, batches
        self._tokenizer, self._grader, self._sampling = tokenizer, grader, sampling
        self._seed, self._refill = seed, refill
        self._functions = functions or RewardFunctions()
        # Mean length of each problem's last completions; NaN: it has not been seen.
        self._seen = np.full(len(problems), np.nan)
        self._phases = phases or Phases(Display(quiet=True), teacher=False)
        self._group = sampling.max_new_tokens.shape[1]
        self._carry, self._carried = carry, from_text(carried)
        # Groups of several batches are joined, so they must be of one width.
        joined = refill or carry
        self._buckets = engine.prompt_buckets[-1:] if joined else engine.prompt_buckets

    @property
    def carried(self) -> str:
        """What a step left to the next one, for a checkpoint."""
        return to_text(self._carried)

    def verification(self) -> dict[str, float]:
        """What this process's verifying processes did since the last call: counts and seconds."""
        counts = dataclasses.asdict(self._grader.take_counts())
        return {f"verifier/{name}": float(value) for name, value in counts.items()}

    def collect(
        self, params: Params, position: int, meanwhile: Callable[[], Any] = lambda: None
    ) -> tuple[Collected, int]:
        """The rollouts of a step, and the data position after them.

        Args:
          params: of the model that samples.
          position: the next rollout batch of the data; with `carry` the next problem.
          meanwhile: called while the devices sample.
        """
        if self._carry:
            return self._go_on(params, position, meanwhile)
        found, position = self._draw(params, position, meanwhile), position + 1
        if not self._refill:
            return found, position
        drawn = [found.rewards]
        while not (useful := mixed(found.correct)).all() and len(drawn) <= self._refill:
            more, position = self._draw(params, position), position + 1
            drawn.append(more.rewards)
            found = self._replace(found, useful, more)
        found.metrics = {
            "rollout/batches": float(len(drawn)),
            "rollout/useful_frac": float(mixed(found.correct).mean()),
            "reward/drawn_mean": float(np.mean(drawn)),
        }
        return found, position

    def _go_on(
        self, params: Params, position: int, meanwhile: Callable[[], Any]
    ) -> tuple[Collected, int]:
        """The first P problems that are done, of those that were begun before and new ones."""
        wanted, groups = self._batches.per_step, list(self._carried)
        while len(groups) < wanted + self._carry:
            problem = int(self._batches[position // wanted][position % wanted])
            groups.append(new_group(position, problem, self._group, self._engine.max_new_tokens))
            position += 1
        before = np.array([group.lengths.sum() for group in groups])
        found = self._sample(
            params,
            [group.problem for group in groups],
            [group.place // wanted for group in groups],
            meanwhile,
            groups=groups,
        )
        done = (found.rollouts.finish_reason != UNFINISHED).all(axis=1)
        # Those in front were begun first.
        picks = np.flatnonzero(done)[:wanted].tolist()
        rest = [p for p in range(len(groups)) if p not in picks]
        self._carried = split_groups(groups, found.rollouts, rest)
        total = found.rollouts.lengths[picks].sum()
        found = self._pick(found, picks, self._ask_functions)
        found.metrics = {
            "rollout/carried_frac": float((before[picks] > 0).mean()),
            "rollout/stale_frac": float(before[picks].sum() / total),
        }
        return found, position

    def _draw(
        self, params: Params, position: int, meanwhile: Callable[[], Any] = lambda: None
    ) -> Collected:
        chosen = self._batches[position]
        return self._sample(params, chosen.tolist(), position, meanwhile)

    def _sample(
        self,
        params: Params,
        chosen: Sequence[int],
        position: int | Sequence[int],
        meanwhile: Callable[[], Any],
        groups: Sequence[Group] | None = None,
    ) -> Collected:
        """Rollouts of the problems `chosen`, drawn with keys of `position`.

        Args:
          groups: what there is of them; then P done ones are enough.
        """
        asked = [self._problems[i] for i in chosen]
        prompts = pad_prompts([ids for _, ids in asked], self._buckets, self._tokenizer.pad_id)
        keys = request_keys(self._seed, position, chosen, self._group)
        graded: list[tuple[list[int], Future[list[Verdict]]]] = []

        def read(finished: list[Finished]) -> None:
            own = [request for request in finished if processes.mine(request.number)]
            numbers = [request.number for request in own]
            texts = [self._tokenizer.decode(request.tokens.tolist()) for request in own]
            problems = [asked[number // self._group][0] for number in numbers]
            graded.append((numbers, self._grade(texts, problems)))
            self._phases.grading(len(numbers), graded[-1][1])

        def grade() -> list[Verdict]:
            found = {n: v for ns, job in graded for n, v in zip(ns, job.result(), strict=True)}
            return share_verdicts(found, keys.size)

        options: dict[str, Any] = {"expected_lengths": self._expected(chosen)}
        if groups is not None:
            # Who is done first must not depend on what a checkpoint does not hold: in order.
            begun = join_groups(groups, prompts)
            options = {"begun": begun, "enough": self._batches.per_step}
            read(finished_requests(begun))
        self._phases.drawing(keys.size)
        rollouts = self._engine.generate(
            params,
            prompts,
            keys,
            self._sampling,
            meanwhile=meanwhile,
            on_finished=read,
            progress=self._phases.drawn,
            **options,
        )
        done = (rollouts.finish_reason != UNFINISHED).all(axis=1)
        self._seen[np.asarray(chosen)[done]] = rollouts.lengths.mean(1)[done]
        own = self._ask_functions
        return Collected(asked, rollouts, grade, self._engine.last, self._functions, own)

    def _grade(self, texts: list[str], problems: list[Problem]) -> Future[list[Verdict]]:
        """Verdicts on a response to each problem, from processes that work beside the devices."""
        answers, metas = [p.answer for p in problems], [p.meta for p in problems]
        return self._grader.submit(texts, answers, metas)

    def _ask_functions(self, found: Collected) -> Own:
        """What reward functions give to groups whose completions have all ended.

        Of several processes each asks about its share; all of them must call.
        """
        count, size = found.rollouts.lengths.shape
        if not self._functions.functions:
            return {}
        places = [p for p in range(count) if processes.mine(p)]
        rollouts = jax.tree.map(lambda x: x[places], found.rollouts)
        texts = completion_texts(rollouts, self._tokenizer)
        groups = []
        for i, p in enumerate(places):
            problem = found.asked[p][0]
            verdicts = found.verdicts[p * size : (p + 1) * size]
            groups.append(
                {
                    "problems": [problem.problem] * size,
                    "answers": [problem.answer] * size,
                    "metas": [problem.meta] * size,
                    "completions": texts[i * size : (i + 1) * size],
                    "verdicts": [verdict.outcome for verdict in verdicts],
                    "lengths": rollouts.lengths[i].tolist(),
                    "truncated": (rollouts.finish_reason[i] == FINISH_LENGTH).tolist(),
                }
            )
        with processes.together():
            said = self._functions.ask(groups)
        shared = {}
        for function in self._functions.functions:
            values, failed = np.zeros((count, size), np.float32), np.zeros(count, np.float32)
            if places:
                values[places], failed[places] = said[function.name]
            # Each process has zeros for the others' groups; NaN, no opinion, stays NaN.
            sums = (processes.gather(x).sum(axis=0) for x in (values, failed))
            shared[function.name] = OwnReward(*sums)
        return shared

    def _expected(self, chosen: Sequence[int]) -> list[float]:
        """What completions of these problems measured when last seen; new ones the usual."""
        seen = ~np.isnan(self._seen)
        usual = self._seen.mean(where=seen) if seen.any() else 0.0
        return np.where(seen[chosen], self._seen[chosen], usual).tolist()

    def _replace(
        self, found: Collected, useful: Bool[np.ndarray, " P"], more: Collected
    ) -> Collected:
        """`found` with useful groups of `more` in place of its useless ones, as far as they go."""
        groups = len(useful)
        spare = iter(np.flatnonzero(mixed(more.correct)) + groups)
        picks = [p if good else int(next(spare, p)) for p, good in enumerate(useful)]
        rollouts, own = jax.tree.map(
            lambda a, b: np.concatenate([a, b]),
            (found.rollouts, found.own),
            (more.rollouts, more.own),
        )
        verdicts = [*found.verdicts, *more.verdicts]
        both = Collected(
            [*found.asked, *more.asked],
            rollouts,
            lambda: verdicts,
            found.decoding + more.decoding,
            self._functions,
            lambda _: own,
        )
        return self._pick(both, picks, lambda _: jax.tree.map(lambda x: x[picks], own))

    def _pick(
        self, found: Collected, picks: Sequence[int], own: Callable[[Collected], Own]
    ) -> Collected:
        """The problems number `picks` alone; `own` says what functions give to them."""

        def flat(x: Sequence[Any]) -> list[Any]:
            return [x[p * self._group + g] for p in picks for g in range(self._group)]

        return Collected(
            [found.asked[p] for p in picks],
            jax.tree.map(lambda x: x[list(picks)], found.rollouts),
            lambda: flat(found.verdicts),
            found.decoding,
            self._functions,
            own,
        )
