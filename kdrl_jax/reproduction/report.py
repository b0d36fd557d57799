"""`report.html`, PNG files and `results.json` of a grid: everything but the runs themselves."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kdrl_jax.reproduction import figures, tables
from kdrl_jax.reproduction.claims import VERDICTS, Judgement, judge_claims
from kdrl_jax.reproduction.grid import Grid
from kdrl_jax.reproduction.methods import METHODS
from kdrl_jax.reproduction.results import CellResult, dump, to_json
from kdrl_jax.reproduction.statistics import bootstrap
from kdrl_jax.reproduction.study import Study
from kdrl_jax.training.storage import write_atomic

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(
    grid: Grid, results: Sequence[CellResult], setup: dict[str, Any], output: Path
) -> list[Path]:
    """Write the report of what has been measured so far.

    Args:
      setup: 'facts' (what to value, shown as a list) and 'teachers' (task → role → accuracy).
      output: the folder for `report.html`, `results.json` and `*.png`.

    Returns:
      The files written.

    Raises:
      UserError: matplotlib is not installed.
    """
    study = Study(results)
    judgements = judge_claims(study, list(grid.tasks))
    document = {
        "title": grid.title,
        **setup,
        "verdicts": [
            {"claim": j.claim.id, "task": j.task, "verdict": j.verdict} for j in judgements
        ],
        "cells": to_json(results),
    }
    written = [output / "results.json", output / "report.html"]
    write_atomic(written[0], dump(document))
    panels = _panels(study, grid)
    write_atomic(written[1], render(study, grid, judgements, setup, panels))
    for name, group in panels.items():
        if group:
            path = output / f"{name}.png"
            figures.write_png(study, group, path)
            written.append(path)
    return written


def _panels(study: Study, grid: Grid) -> dict[str, list[figures.Panel]]:
    """Panels that have something to show, by topic."""
    groups: dict[str, list[figures.Panel]] = {"curves": []}
    for task in grid.tasks:
        panels = figures.panels_of(task, [m for m in grid.methods if study.has(task, m)])
        panels = [panel for panel in panels if figures.has_data(study, panel)]
        groups["curves"] += panels[:2]
        groups[f"dynamics_{task}"] = panels[2:]
    ablations = figures.ablation_panels(study, grid.ablation_task)
    groups["ablations"] = [panel for panel in ablations if figures.has_data(study, panel)]
    return groups


def render(
    study: Study,
    grid: Grid,
    judgements: Sequence[Judgement],
    setup: dict[str, Any],
    panels: dict[str, list[figures.Panel]],
) -> str:
    """The page: one file without anything from outside."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    found = [task for task in grid.tasks if study.start(task)]
    counts = collections.Counter(j.verdict for j in judgements)
    claims: dict[str, list[tuple[Judgement, list[tables.Evidence]]]] = {}
    for judgement, evidence in zip(judgements, tables.evidence(judgements), strict=True):
        claims.setdefault(judgement.claim.id, []).append((judgement, evidence))
    drawn = {
        name: [(panel, Markup(figures.svg(study, panel))) for panel in group]
        for name, group in panels.items()
    }
    return template.render(
        title=grid.title,
        lead=lead(study, grid),
        counts=[(verdict, counts[verdict]) for verdict in VERDICTS],
        claims=claims,
        name=tables.title,
        tasks=found,
        main=tables.main_table(study, grid, setup["teachers"]),
        differences=[tables.difference_table(study, grid, task) for task in found],
        times=[tables.time_table(study, grid, task) for task in found],
        dynamics=[tables.dynamics_table(study, grid, task) for task in found],
        ablations=tables.ablation_table(study, grid),
        failures=tables.failure_table(study, len(grid.cells)),
        seeds=tables.seed_table(study, grid),
        seed_count=len(grid.seeds),
        drawn=drawn,
        facts=setup["facts"],
    )


def lead(study: Study, grid: Grid) -> list[str]:
    """A sentence a task: the best method, and the joint loss against its two halves."""
    sentences = []
    for task in grid.tasks:
        means = {
            method: bootstrap(list(study.values(task, method, "accuracy").values())).mean
            for method in grid.methods
            if study.has(task, method)
        }
        if not means:
            continue
        best = max(means, key=lambda method: means[method])
        start = bootstrap(list(study.start(task).values())).mean
        text = (
            f"{tables.title(task)}: {METHODS[best].label} ends highest, at {100 * means[best]:.1f} "
            f"% from {100 * start:.1f} %."
        )
        for other in ("grpo", "kd_rkl"):
            if study.has(task, other) and study.has(task, "kdrl"):
                gap = tables.change(study.difference(task, "accuracy", "kdrl", other))
                shown = f"{gap.text} {gap.sub}".strip()
                text += f" KDRL {tables.MINUS} {METHODS[other].label}: {shown}."
        sentences.append(text)
    return sentences
