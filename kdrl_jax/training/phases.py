"""What a training step is doing, as rows beneath its bar.

Everything here is told by the host when it looks at the devices anyway, or by the graders' threads.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

from kdrl_jax.training.display import Display

WORTH_S = 1.0
"""A phase that took longer the last time is told of in JSON."""


class Phases:
    """The rows: rollout, verification, teacher or scoring, update; others while they last.

    Args:
      teacher: whether scoring asks a teacher.
    """

    def __init__(self, display: Display, *, teacher: bool):
        self._display, self._phase, self._lock = display, "", threading.Lock()
        self.rollout = display.track("rollout", 0, part=True)
        self.verification = display.track("verification", 0, part=True)
        named = {"score": "teacher" if teacher else "scoring", "update": "update"}
        named |= {"eval": "evaluation", "checkpoint": "checkpoint"}
        self._rows = {
            phase: display.track(name, 0 if phase == "eval" else None, part=True)
            for phase, name in named.items()
        }
        for phase, row in self._rows.items():
            row.active, row.shown = None, phase in ("score", "update")
        self._seconds: dict[str, float] = {}
        self._before = self._drawn = 0, 0

    def next_step(self) -> None:
        """The rollouts of another step are about to be drawn."""
        self._before = self._drawn = 0, 0
        for track in (self.rollout, self.verification):
            track.total, track.done, track.text = 0, 0, ""

    def enter(self, phase: str) -> None:
        """What the time is spent on from now on: a phase of `StepClock`."""
        now, row = time.monotonic(), self._rows.get(self._phase)
        if row and row.active is not None:
            self._seconds[self._phase] = now - row.active
            row.text, row.active = f"{now - row.active:.1f} s", None
            row.shown = self._phase in ("score", "update")
        self._phase = phase
        if phase == "rollout":
            self.rollout.active = now
        elif row := self._rows.get(phase):
            row.active, row.shown = now, True
            row.text = f"(last time {row.text})" if row.text and row.total is None else ""
        if self._seconds.get(phase, WORTH_S) >= WORTH_S:
            self._display.event("phase", {"phase": phase})

    def drawing(self, requests: int) -> None:
        """So many more requests are to be drawn in this step."""
        self._before = self._drawn
        self.rollout.total = (self.rollout.total or 0) + requests

    def drawn(self, finished: int, tokens: int) -> None:
        """See `Engine.generate`; of the requests of the last `drawing`."""
        self._drawn = self._before[0] + finished, self._before[1] + tokens
        self.rollout.drawn(*self._drawn)

    def grading(self, answers: int, verdicts: Future[Any]) -> None:
        """So many answers have been handed to the graders."""
        track = self.verification
        track.total = (track.total or 0) + answers

        def graded(_: Future[Any]) -> None:
            with self._lock:  # the graders' thread, or this one where they were quicker
                track.set(track.done + answers)

        verdicts.add_done_callback(graded)

    def evaluated(self, finished: int, total: int) -> None:
        """See `training.evaluation.evaluate`."""
        self._rows["eval"].total = total
        self._rows["eval"].set(finished)

    def close(self) -> None:
        """Take the rows away."""
        for track in (self.rollout, self.verification, *self._rows.values()):
            track.close()
