"""Workers that lose only what hangs, however busy the machine is."""

from __future__ import annotations

import json

import pytest
from commands import HANG_S

from kdrl_jax.rewards.supervisor import Worker


def only_hanging_is_timed(patch: pytest.MonkeyPatch, *marks: str) -> None:
    """A request has the given seconds if one of `marks` is in it, and all others take their time.

    On a busy machine any answer may take longer than a deadline short enough for a test.
    """
    begin = Worker.begin

    def patient(self, task, timeout_s):
        text = json.dumps(task.request, ensure_ascii=False)
        begin(self, task, timeout_s if any(mark in text for mark in marks) else HANG_S)

    patch.setattr(Worker, "begin", patient)
