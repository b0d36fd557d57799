"""What a report reads of a run: numbers by step, alerts, sample rollouts. A run may be going on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_jax.reporting.panels import drawn_metrics
from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.types import UserError

Columns = dict[str, list[float | None]]

MOST_POINTS = 3000
"""Of a line; of more steps every n-th is drawn."""
SAMPLE_BYTES = 12_000_000
"""Of sample files that a page may hold, for all its runs together."""
PHASES = tuple(f"time/{name}_s" for name in ("rollout", "score", "update", "eval", "checkpoint"))
"""In the order of a step."""
LISTS = ("tokens", "log_probs", "teacher_log_probs")
"""Keys of a sample that hold an entry a token."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, as JSON may have it.

    Attributes:
      steps: made, and to be made; 0 where its configuration is not there.
      columns: "step", "seconds" spent in steps so far, and each metric; None: not measured.
      alerts: {"name", "first", "last"}, the steps during which a watch was tripped.
      samples: {"step", "rows"} for each file that is shown.
      notes: what a reader should know.
    """

    name: str
    objective: str
    steps: tuple[int, int]
    columns: Columns
    phases: list[str]
    alerts: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    notes: list[str]

    def last(self, metric: str) -> float | None:
        """The newest value."""
        return next((x for x in reversed(self.columns.get(metric, [])) if x is not None), None)

    def first(self, metric: str) -> float | None:
        """The oldest value."""
        return next((x for x in self.columns.get(metric, []) if x is not None), None)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Everything the page needs of some runs.

    Raises:
      UserError: one line for each folder without metrics.
    """
    rows = {folder: read_metrics(folder / "metrics.jsonl") for folder in folders}
    if empty := [folder for folder in rows if not rows[folder]]:
        raise UserError(
            *(f"{f}: holds no metrics.jsonl with a step; give a run's folder" for f in empty)
        )
    names = labels(list(rows))
    budget = SAMPLE_BYTES // len(rows)
    return [_read_run(f, name, rows[f], budget) for f, name in zip(rows, names, strict=True)]


def labels(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their folders' names, or paths where names are alike."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder)
        for folder, name in zip(folders, names, strict=True)
    ]


def read_config(folder: Path) -> dict[str, Any]:
    """A run's configuration; {} where there is none."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_run(folder: Path, name: str, rows: list[dict[str, Any]], budget: int) -> RunRecord:
    settings, notes = read_config(folder), []
    every = -(-len(rows) // MOST_POINTS)
    timed = {k for row in rows for k in row if k.startswith("time/") and k.endswith("_s")}
    phases = [p for p in PHASES if p in timed] + sorted(timed - set(PHASES))
    spent = np.cumsum([sum(_number(row.get(k)) or 0.0 for k in phases) for row in rows])
    wanted = sorted(drawn_metrics(k for row in rows for k in row)) + phases
    columns: Columns = {key: [] for key in ("step", "seconds", *wanted)}
    for i, row in enumerate(rows):
        if i % every == 0 or "eval/accuracy" in row or i == len(rows) - 1:
            columns["step"].append(row["step"])
            columns["seconds"].append(round(float(spent[i]), 2))
            for key in wanted:
                columns[key].append(_number(row.get(key)))
    if every > 1:
        notes.append(f"Of {len(rows):,} steps one in {every} is drawn.")
    samples, left_out = _read_samples(folder / "samples", budget)
    if left_out:
        notes.append(left_out)
    heat = str(settings.get("logprob_temperature", "rollout"))
    drawn_at = str(settings.get("rollout", {}).get("temperature", heat))
    if heat not in ("rollout", drawn_at):
        notes.append(
            f"Rollouts were drawn at temperature {drawn_at}, and the teacher was asked at {heat}: "
            "log-ratios in the samples compare the two."
        )
    return RunRecord(
        name=name,
        objective=str(settings.get("objective", "")),
        steps=(rows[-1]["step"], int(settings.get("steps", 0))),
        columns=columns,
        phases=[p.removeprefix("time/").removesuffix("_s") for p in phases],
        alerts=_alerts(rows),
        samples=samples,
        notes=notes,
    )


def _number(x: Any) -> float | None:
    """Six significant digits; None for what is no finite number."""
    return float(f"{x:.6g}") if isinstance(x, int | float) and math.isfinite(x) else None


def _alerts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stretches of steps in which a watch of `health` was tripped."""
    found: list[dict[str, Any]] = []
    open_now: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "health/alerts" not in row:  # an evaluation before the first step judges nothing
            continue
        on = {k.removeprefix("health/") for k in row if k.startswith("health/")}
        on -= {"alerts", "teacher_effect"}
        open_now = {name: alert for name, alert in open_now.items() if name in on}
        for name in sorted(on):
            if name not in open_now:
                open_now[name] = {"name": name, "first": row["step"]}
                found.append(open_now[name])
            open_now[name]["last"] = row["step"]
    return found


def _read_samples(folder: Path, budget: int) -> tuple[list[dict[str, Any]], str]:
    """The files of samples that fit into so many bytes, and what to say of the others."""
    files = sorted(folder.glob("step_*.jsonl"))
    sizes = [file.stat().st_size for file in files]
    picks = pick_evenly(sizes, budget)
    shown, kept, total = [], 0, 0
    for index in picks:
        rows: list[dict[str, Any]] = []
        used = 0
        for line in files[index].read_bytes().split(b"\n"):
            row = _sample(line)
            if row is None:
                continue
            total += 1
            used += len(line)
            if used <= budget or not rows:  # the newest file alone may be too large
                rows.append(row)
        kept += len(rows)
        step = files[index].stem.removeprefix("step_")
        if rows and step.isdigit():
            shown.append({"step": int(step), "rows": rows})
    left_out = []
    if len(picks) < len(files):
        left_out.append(f"samples of {len(files) - len(picks)} of {len(files)} steps")
    if kept < total:
        left_out.append(f"{total - kept} of {total} rollouts of the newest step")
    said = f"Left out to keep the page small: {' and '.join(left_out)}." if left_out else ""
    return shown, said


def pick_evenly(sizes: Sequence[int], budget: int) -> list[int]:
    """As many indices as fit into `budget`, evenly spaced and with the last one, which always is.

    Args:
      sizes: of what the indices stand for.
    """
    last = len(sizes) - 1
    for count in range(len(sizes), 1, -1):
        picks = [round(i * last / (count - 1)) for i in range(count)]
        if sum(sizes[i] for i in picks) <= budget:
            return picks
    return [last] if sizes else []


def _sample(line: bytes) -> dict[str, Any] | None:
    """A line of a file of samples; None for what is none. Lists of another length are dropped."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
        return None
    tokens = row.get("tokens")
    count = len(tokens) if isinstance(tokens, list) else -1
    for key in LISTS:
        values = row.get(key)
        row[key] = values if isinstance(values, list) and len(values) == count else None
    return row
