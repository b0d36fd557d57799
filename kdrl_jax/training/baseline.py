"""Another run that held-out accuracy is compared with: does the teacher bring anything?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.types import UserError

ACCURACY = "eval/accuracy"
GAIN = "eval/gain_over_baseline"
LAST = 3
"""Evaluations that are averaged: one alone is too noisy to judge by."""


class Baseline:
    """The held-out accuracies of another run, such as GRPO on the same data.

    Args:
      folder: of that run; "": there is none.

    Raises:
      UserError: no run there, or one without evaluations.
    """

    def __init__(self, folder: str):
        self._accuracies: dict[int, float] = {}
        if not folder:
            return
        file = Path(folder) / "metrics.jsonl"
        if not file.is_file():
            raise UserError(f"health.baseline: no file {file}; give the folder of a run, or ''")
        rows = read_metrics(file)
        self._accuracies = {row["step"]: row[ACCURACY] for row in rows if ACCURACY in row}
        if not self._accuracies.keys() - {0}:
            raise UserError(
                f"health.baseline: {folder} has no evaluation after its first step; run it with "
                "eval.every of this one"
            )

    def gain(self, accuracies: Iterable[tuple[int, float]]) -> dict[str, float]:
        """Returns the mean gain of the last evaluations at steps that both runs have.

        Args:
          accuracies: (step, held-out accuracy) of this run, in order.

        Returns:
          {GAIN: difference of accuracies}; {} before there are LAST such evaluations.
        """
        differences = [
            accuracy - self._accuracies[step]
            for step, accuracy in accuracies
            if step and step in self._accuracies
        ]
        last = differences[-LAST:]
        return {GAIN: sum(last) / LAST} if len(last) == LAST else {}
