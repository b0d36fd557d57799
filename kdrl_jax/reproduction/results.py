"""What a grid measured: one small record a cell, read from the runs' folders or from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_jax.reproduction.grid import Cell
from kdrl_jax.reproduction.runner import FAILURE, read_json
from kdrl_jax.training.metrics import read_metrics

ACCURACY = "eval/accuracy"
AT_EVALUATIONS = (ACCURACY, "eval/length", "eval/truncated_frac", "eval/repetition_frac")
BETWEEN = (
    *("reward/mean", "length/mean", "length/truncated_frac"),
    *("kl/teacher", "entropy/mean", "beta", "gradient/norm"),
)
TRAINING_TIMES = ("time/rollout_s", "time/score_s", "time/update_s")
ONE_OFF = 3.0  # a step that takes so many times the run's median compiled or started something
DIGITS = 4  # significant, in JSON


@dataclasses.dataclass(frozen=True)
class CellResult:
    """A cell's curve at its evaluations; E of them, the one before the first step included."""

    task: str
    method: str
    seed: int
    status: str
    """finished | diverged | failed | unfinished"""
    message: str
    seconds: float
    """Wall time of the process."""
    steps: tuple[int, ...]
    times: tuple[float, ...]
    """Training seconds until each evaluation: see `training_times`."""
    series: dict[str, tuple[float, ...]]
    """[E] each, NaN where there is none. Metrics of training steps are means since the last
    evaluation."""

    @property
    def counts(self) -> bool:
        """Whether the cell enters means: it finished, or diverged after an evaluation."""
        return self.status in ("finished", "diverged") and bool(self.steps)

    def final(self, name: str) -> float:
        """The last evaluation's value; NaN if it was not measured."""
        values = self.series.get(name, ())
        return values[-1] if values else math.nan


def read_results(cells: Iterable[Cell], output: Path) -> list[CellResult]:
    """The results of the cells that have any."""
    found = []
    for cell in cells:
        folder = cell.folder(output)
        rows = read_metrics(folder / "metrics.jsonl")
        if rows or (folder / FAILURE).exists():
            found.append((cell, folder, rows))
    pace: dict[tuple[str, str], list[np.ndarray]] = {}
    for cell, _, rows in found:
        pace.setdefault((cell.task, cell.method), []).append(step_seconds(rows))
    times = {key: training_times(seeds) for key, seeds in pace.items()}
    return [
        _read_cell(cell, folder, rows, times[cell.task, cell.method])
        for cell, folder, rows in found
    ]


def step_seconds(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """[N] seconds of training in each step: sampling, grading and scoring, the update.

    Evaluations and checkpoints are not training. A step that takes over `ONE_OFF` times the run's
    median compiled a program or started a verification process, which a longer run pays no more
    often: it counts as the median.
    """
    steps = [row for row in rows if TRAINING_TIMES[0] in row]
    seconds = np.array([sum(row.get(k, 0.0) for k in TRAINING_TIMES) for row in steps], np.float64)
    if len(seconds):
        median = np.median(seconds)
        seconds[seconds > ONE_OFF * median] = median
    return seconds


def training_times(seeds: Sequence[np.ndarray]) -> np.ndarray:
    """[N + 1] training seconds after 0, 1, … N steps of a method on a task.

    Each step counts as its median over the seeds, so that what else a machine does while one seed
    runs does not become a property of the method.
    """
    longest = max(map(len, seeds), default=0)
    table = np.full((len(seeds), longest), np.nan)
    for row, seconds in zip(table, seeds, strict=True):
        row[: len(seconds)] = seconds
    medians = np.nanmedian(table, axis=0) if longest else np.empty(0)
    return np.concatenate([[0.0], np.cumsum(medians)])


def _read_cell(
    cell: Cell, folder: Path, rows: Sequence[dict[str, Any]], times: np.ndarray
) -> CellResult:
    summary, failure = read_json(folder / "summary.json"), read_json(folder / FAILURE)
    process = read_json(folder / "process.json")
    status, message, seconds = "unfinished", "", math.nan
    if summary and summary["finished"]:
        status, seconds = "finished", (process or summary)["seconds"]
    elif failure:
        status = "diverged" if failure["diverged"] else "failed"
        message, seconds = failure["message"], failure["seconds"]
    evaluated = [row for row in rows if ACCURACY in row]
    steps = tuple(int(row["step"]) for row in evaluated)
    series = {name: tuple(_number(row, name) for row in evaluated) for name in AT_EVALUATIONS}
    for name in BETWEEN:
        series[name] = tuple(_means_between(rows, steps, name))
    series = {name: values for name, values in series.items() if not np.isnan(values).all()}
    return CellResult(
        task=cell.task,
        method=cell.method,
        seed=cell.seed,
        status=status,
        message=message,
        seconds=seconds,
        steps=steps,
        times=tuple(float(times[step]) for step in steps),
        series=series,
    )


def _number(row: dict[str, Any], name: str) -> float:
    return float(row.get(name, math.nan))


def _means_between(
    rows: Sequence[dict[str, Any]], steps: Sequence[int], name: str
) -> Iterable[float]:
    """The metric's mean over the steps since the evaluation before; NaN before the first step."""
    for low, high in zip((-1, *steps), steps, strict=False):
        values = [row[name] for row in rows if low < row["step"] <= high and name in row]
        yield float(np.mean(values)) if values else math.nan


def to_json(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Plain rows, numbers rounded, NaN as None: what `results.json` holds."""
    return [
        {
            **dataclasses.asdict(result),
            "seconds": _round(result.seconds),
            "times": [_round(x) for x in result.times],
            "series": {k: [_round(x) for x in v] for k, v in result.series.items()},
        }
        for result in results
    ]


def from_json(rows: Sequence[dict[str, Any]]) -> list[CellResult]:
    """The inverse of `to_json`, to its precision."""
    return [
        CellResult(
            **{
                **row,
                "seconds": _nan(row["seconds"]),
                "steps": tuple(row["steps"]),
                "times": tuple(map(_nan, row["times"])),
                "series": {k: tuple(map(_nan, v)) for k, v in row["series"].items()},
            }
        )
        for row in rows
    ]


def dump(document: dict[str, Any]) -> str:
    """JSON with one cell a line, so that differences between versions can be read."""
    cells = ",\n".join(json.dumps(row, separators=(",", ":")) for row in document["cells"])
    head = json.dumps({k: v for k, v in document.items() if k != "cells"}, indent=2)
    return f'{head[:-2]},\n  "cells": [\n{cells}\n]\n}}\n'


def _round(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
