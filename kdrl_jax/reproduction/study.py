"""Questions to a grid's results: a metric's mean, its curve, and what one method gains on another.

Accuracies are fractions of 1. A run that diverged counts with its last evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from kdrl_jax.reproduction.results import ACCURACY, CellResult
from kdrl_jax.reproduction.statistics import Interval, at_time, bootstrap, paired

BySeed = dict[int, float]
Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _drop(cell: CellResult) -> float:
    accuracy = np.array(cell.series.get(ACCURACY, (math.nan,)))
    return float(np.nanmax(accuracy) - accuracy[-1])


def _gain(cell: CellResult) -> float:
    accuracy = cell.series.get(ACCURACY, (math.nan,))
    return accuracy[-1] - accuracy[0]


METRICS: dict[str, Callable[[CellResult], float]] = {
    "accuracy": lambda cell: cell.final(ACCURACY),
    "gain": _gain,  # last minus first accuracy
    "drop": _drop,  # best minus last accuracy: what a run lost again
    "length": lambda cell: cell.final("eval/length"),
    "truncated": lambda cell: cell.final("eval/truncated_frac"),
    "repetition": lambda cell: cell.final("eval/repetition_frac"),
    "kl": lambda cell: cell.final("kl/teacher"),
    "entropy": lambda cell: cell.final("entropy/mean"),
    "step_seconds": lambda cell: (
        cell.times[-1] / cell.steps[-1] if cell.steps and cell.steps[-1] else math.nan
    ),
}
AT_TIME = "accuracy_at_time"


class Study:
    """The results of a grid, indexed."""

    def __init__(self, results: Sequence[CellResult]):
        self.results = tuple(results)
        self._cells: dict[tuple[str, str], dict[int, CellResult]] = {}
        self._curves: dict[tuple[str, str, str], tuple[Curve, np.ndarray]] = {}
        for cell in results:
            if cell.counts:
                self._cells.setdefault((cell.task, cell.method), {})[cell.seed] = cell

    def has(self, task: str, method: str) -> bool:
        """Whether any seed of the method counts."""
        return (task, method) in self._cells

    def cells(self, task: str, method: str) -> dict[int, CellResult]:
        """The cells that count, by seed."""
        return self._cells.get((task, method), {})

    def values(self, task: str, method: str, metric: str) -> BySeed:
        """A metric of `METRICS` at the end of each seed's run."""
        return {seed: METRICS[metric](cell) for seed, cell in self.cells(task, method).items()}

    def start(self, task: str) -> BySeed:
        """Accuracy before the first step; by seed it is the same for all methods."""
        found: BySeed = {}
        for (name, _), cells in self._cells.items():
            if name == task:
                found |= {seed: cell.series[ACCURACY][0] for seed, cell in cells.items()}
        return found

    def common_time(self, task: str, methods: Sequence[str]) -> float:
        """The training seconds that every finished run of the methods reached; NaN if none did."""
        cells = [cell for method in methods for cell in self.cells(task, method).values()]
        return min((c.times[-1] for c in cells if c.status == "finished"), default=math.nan)

    def at(self, task: str, method: str, seconds: float) -> BySeed:
        """Accuracy after so many seconds of training, by seed."""
        found: BySeed = {}
        for seed, cell in self.cells(task, method).items():
            ended = cell.status == "diverged" and seconds > cell.times[-1]
            when = cell.times[-1] if ended else seconds
            found[seed] = at_time(cell.times, cell.series[ACCURACY], when)
        return found

    def difference(self, task: str, metric: str, left: str, right: str) -> Interval:
        """left − right, paired by seed; `AT_TIME` at the time that both reached."""
        if metric == AT_TIME:
            seconds = self.common_time(task, (left, right))
            return paired(self.at(task, left, seconds), self.at(task, right, seconds))
        return paired(self.values(task, left, metric), self.values(task, right, metric))

    def curve(self, task: str, method: str, name: str, by: str) -> Curve:
        """x, mean, low and high of a series over the seeds, [E] each.

        Where a run diverged its last value is carried on.

        Args:
          by: what x is: "step", "time" or "length", the mean length of held-out responses.
        """
        if by == "length":
            return self._over_length(task, method, name)
        if (task, method, name) not in self._curves:  # drawn more than once, costly to make
            self._curves[task, method, name] = self._curve(task, method, name)
        (steps, mean, low, high), times = self._curves[task, method, name]
        return times if by == "time" else steps, mean, low, high

    def _over_length(self, task: str, method: str, name: str) -> Curve:
        """A curve by the mean length at the same steps."""
        steps, mean, low, high = self.curve(task, method, name, "step")
        at, length, _, _ = self.curve(task, method, "eval/length", "step")
        _, first, second = np.intersect1d(steps, at, return_indices=True)
        return length[second], mean[first], low[first], high[first]

    def _curve(self, task: str, method: str, name: str) -> tuple[Curve, np.ndarray]:
        """The curve by step, and the times of its points."""
        cells = [c for c in self.cells(task, method).values() if name in c.series]
        if not cells:
            nothing = np.empty(0)
            return (nothing, nothing, nothing, nothing), nothing
        longest = max(cells, key=lambda cell: len(cell.steps))
        x, times = np.array(longest.steps, np.float64), np.array(longest.times, np.float64)
        rows = np.full((len(cells), len(x)), np.nan)
        for row, cell in zip(rows, cells, strict=True):
            values = cell.series[name]
            row[: len(values)] = values
            if cell.status == "diverged":
                row[len(values) :] = values[-1]
        intervals = [bootstrap(column.tolist()) for column in rows.T]
        mean, low, high = (
            np.array([getattr(i, key) for i in intervals]) for key in ("mean", "low", "high")
        )
        known = ~np.isnan(mean)
        return (x[known], mean[known], low[known], high[known]), times[known]
