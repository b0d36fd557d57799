"""Rejection sampling: the teacher's right answers, kept as a fixed set (2506.02208, appendix B.2).

Before the first step the teacher answers every problem `rollout.group_size` times. The right
answers are written to the run's folder, batch by batch, so that an interrupted run goes on with
them. Each step then trains on prompts_per_step · group_size of them, in shuffled epochs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.config import flatten
from kdrl_jax.data import PromptBatches, pad_prompts
from kdrl_jax.rewards import RewardFunctions
from kdrl_jax.rollout import DRAWING, DecodeStats
from kdrl_jax.training.collect import Collected, Collector
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import EncodedProblem
from kdrl_jax.training.learner import Weights
from kdrl_jax.training.problems import GRADING
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, Params, Rollouts, UserError, Verdict

FILE = "right_answers.jsonl"
"""In a run's folder: a line of JSON for each batch of problems that the teacher has answered."""


class RightAnswer(NamedTuple):
    """A right answer."""

    problem: int
    """Index into the data."""
    tokens: Int[np.ndarray, " n"]
    """Of the completion, the end token included."""
    ended: bool
    """False: the limit cut it, after the answer."""


def shaping_answers(config: ConfigDict) -> dict[str, Any]:
    """Returns the keys that the teacher's answers and their verdicts depend on."""
    flat = flatten(config)
    kept = [*(f"rollout.{key}" for key in (*DRAWING, "group_size"))]
    kept += [f"reward.{key}" for key in GRADING if key != "workers"]
    kept += ["teacher.path", "teacher.dtype", *(k for k in flat if k.startswith("teacher.s"))]
    return {key: flat[key] for key in kept}


class Once:
    """`batches[position]` are the problems of a batch: each once, in a seeded order.

    The last batch is filled up with the first problems.
    """

    def __init__(self, num: int, per_step: int, seed: int):
        self._order, self.per_step = np.random.default_rng(seed).permutation(num), per_step

    def __getitem__(self, position: int) -> Int[np.ndarray, " P"]:
        places = np.arange(position * self.per_step, (position + 1) * self.per_step)
        return self._order[places % len(self._order)]


class RightAnswers:
    """The answers in a run's folder, as far as they have been drawn.

    Args:
      workdir: of the run; all processes read it.
      made_of: digest of the problems, the teacher and the settings that the answers depend on,
        which must be that of the file.
      problems: number of problems in the data.
      wanted: problems to be answered; 0: all.
      batches: which problems are answered together.

    Raises:
      UserError: the file's answers are to other problems, or were made otherwise.
    """

    def __init__(self, workdir: Path, made_of: str, *, problems: int, wanted: int, batches: Once):
        self._file, self._made_of, self._batches = workdir / FILE, made_of, batches
        self.wanted = min(wanted or problems, problems)
        self.seen: set[int] = set()
        """Problems that have been answered."""
        self.answers: list[RightAnswer] = []
        self._position = 0
        lines = self._whole_lines() if self._file.exists() else []
        if lines and lines[0] != {"made_of": made_of}:
            raise UserError(
                f"{self._file}: holds answers to other problems, of another teacher, or of other "
                "keys of rollout, reward or seed; restore these, or use another --workdir"
            )
        for line in lines[1:]:
            self._take(line)

    @property
    def complete(self) -> bool:
        """Whether every problem has been answered."""
        return len(self.seen) >= self.wanted

    def draw_all(
        self,
        collector: Collector,
        teacher: Weights | None,
        go_on: Callable[[], bool],
        display: Display,
    ) -> None:
        """Has the teacher answer the problems that it has not answered yet.

        Args:
          collector: of the teacher.
          teacher: not needed where the set is complete.
          go_on: is asked before each batch.
        """
        assert teacher or self.complete
        # Offloaded weights are on the devices from here on.
        weights = teacher.params if teacher else {}
        with display.track("teacher's answers", self.wanted, len(self.seen)) as track:
            while not self.complete and go_on():
                self._draw(collector, weights)
                track.set(len(self.seen), f"{len(self.answers)} right")
        display.say(f"{self._file}: {len(self.answers)} right answers to {len(self.seen)} problems")

    def _draw(self, collector: Collector, params: Params) -> None:
        """Has the teacher answer a batch of problems."""
        found, _ = collector.collect(params, self._position)
        fields = (found.rollouts.tokens, found.rollouts.lengths, found.rollouts.finish_reason)
        tokens, lengths, finish = map(np.asarray, fields)
        chosen = self._batches[self._position].tolist()
        right = [
            [problem, tokens[p, g, : lengths[p, g]].tolist(), bool(finish[p, g] == FINISH_EOS)]
            for p, problem in enumerate(chosen)
            for g in np.flatnonzero(found.correct[p]).tolist()
        ]
        line = {"problems": chosen, "right": right}
        if processes.is_first():
            self._append(line)
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        """Adds a batch. A problem that an earlier batch had keeps its first answers."""
        new = set(line["problems"]) - self.seen
        self.answers += [
            RightAnswer(problem, np.array(tokens, np.int32), ended)
            for problem, tokens, ended in line["right"]
            if problem in new
        ]
        self.seen |= new
        self._position += 1

    def _append(self, line: dict[str, Any]) -> None:
        begun = self._file.exists()
        with self._file.open("a", encoding="utf-8") as file:
            if not begun:
                file.write(json.dumps({"made_of": self._made_of}) + "\n")
            file.write(json.dumps(line) + "\n")

    def _whole_lines(self) -> list[dict[str, Any]]:
        """The lines up to one that a kill has torn, which is cut off."""
        found, end = [], 0
        with self._file.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                found.append(json.loads(line))
                end += len(line)
        if processes.is_first() and end < self._file.stat().st_size:
            with self._file.open("r+b") as file:
                file.truncate(end)
        return found


class FixedSet:
    """Collects the batches of a step from right answers, as `Collector` does from a model.

    Args:
      rows: B, the answers of a step.
      buckets: padded prompt lengths.
      width: T, the completion slots.

    Raises:
      UserError: there are fewer answers than a step takes.
    """

    carried = ""

    def __init__(
        self,
        problems: Sequence[EncodedProblem],
        answers: Sequence[RightAnswer],
        *,
        rows: int,
        seed: int,
        pad_id: int,
        buckets: Sequence[int],
        width: int,
    ):
        if len(answers) < rows:
            raise UserError(
                f"rollout.prompts_per_step · rollout.group_size: {rows} exceeds the "
                f"{len(answers)} right answers of the teacher; lower them, or see whether the "
                "teacher and reward.answer fit the data"
            )
        self._problems, self._answers = problems, answers
        self._batches = PromptBatches(len(answers), rows, seed)
        self._pad_id, self._buckets, self._width = pad_id, tuple(buckets), width

    def verification(self) -> dict[str, float]:
        """Nothing is verified any more."""
        return {}

    def collect(
        self, params: Params, position: int, meanwhile: Callable[[], Any] = lambda: None
    ) -> tuple[Collected, int]:
        """Returns the answers of a step, [P, 1] with P = B, and the position after them.

        Args:
          params: is not read.
          position: number of steps whose answers were taken before.
          meanwhile: is called at once.
        """
        meanwhile()
        chosen = [self._answers[i] for i in self._batches[position]]
        asked = [self._problems[answer.problem] for answer in chosen]
        prompts = pad_prompts([ids for _, ids in asked], self._buckets, self._pad_id)
        tokens = np.full((len(chosen), 1, self._width), self._pad_id, np.int32)
        for row, answer in zip(tokens, chosen, strict=True):
            row[0, : len(answer.tokens)] = answer.tokens
        ended = np.array([[answer.ended] for answer in chosen])
        rollouts = Rollouts(
            prompt_tokens=prompts.tokens,
            prompt_lengths=prompts.lengths,
            tokens=tokens,
            log_probs=np.zeros(tokens.shape, np.float32),
            lengths=np.array([[len(answer.tokens)] for answer in chosen], np.int32),
            finish_reason=np.where(ended, FINISH_EOS, FINISH_LENGTH).astype(np.int32),
        )
        verdicts = [Verdict(1.0, "correct")] * len(chosen)
        found = Collected(
            asked, rollouts, lambda: verdicts, DecodeStats(), RewardFunctions(), lambda _: {}
        )
        epoch = position * self._batches.per_step / len(self._answers)
        found.metrics = {"sft/answers": float(len(self._answers)), "sft/epoch": epoch}
        return found, position + 1
