"""A grid of runs as data: tasks × methods × seeds, each cell a config file and its overrides."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax.config import CONFIGS, apply_overrides, load_config
from kdrl_jax.reproduction.methods import METHODS
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError

KEYS: dict[str, type] = {
    "title": str,
    "tasks": ConfigDict,
    "seeds": tuple,
    "methods": tuple,
    "ablations": tuple,
    "ablation_task": str,
    "workers": int,
    "pin": bool,
    "platform": str,
    "budget_minutes": int,
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of `kdrl_jax.train`."""

    task: str
    method: str
    seed: int
    config: str
    """Path of the config file, with its variant."""
    overrides: tuple[str, ...]
    """'key=value'."""

    @property
    def name(self) -> str:
        """'arithmetic/kdrl/0': the cell's folder under OUT/cells."""
        return f"{self.task}/{self.method}/{self.seed}"

    def folder(self, output: Path) -> Path:
        """Where the run's files are."""
        return output / "cells" / self.task / self.method / str(self.seed)

    def load(self) -> ConfigDict:
        """The config that the run will have."""
        return load_config(self.config, self.overrides)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a grid file describes; `configs/reproduce/cpu.py` explains the keys."""

    path: Path
    title: str
    tasks: dict[str, str]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    ablations: tuple[str, ...]
    ablation_task: str
    workers: int
    pin: bool
    platform: str
    budget_minutes: int
    cells: tuple[Cell, ...]
    """Seed by seed, so that a grid that is cut short has every method."""


def load_grid(path: str | Path) -> Grid:
    """Read a grid file and check every cell's config.

    Args:
      path: a Python file whose `get_config()` returns a ConfigDict with the keys of `KEYS`.

    Raises:
      UserError: a key, task or method that does not exist, or a cell whose config cannot work;
        one line per problem.
    """
    found = load_config(path)
    problems = list(_grid_problems(found, path))
    if problems:
        raise UserError(*problems)
    values: dict[str, Any] = {key: found[key] for key in KEYS}
    values["tasks"] = dict(found.tasks.items())
    cells, problems = _expand(values)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return Grid(path=Path(path), **values, cells=tuple(cells))


def _grid_problems(found: ConfigDict, path: str | Path) -> Iterable[str]:
    for key in sorted(found.keys() - KEYS.keys()):
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)
        yield f"{path}: {key}: no such key; the nearest is {near[0]}"
    for key, kind in KEYS.items():
        if key not in found:
            yield f"{path}: {key}: missing; configs/reproduce/cpu.py has every key"
        elif type(found[key]) is not kind:
            yield f"{path}: {key}: {found[key]!r} must be {kind.__name__}"
        elif kind is tuple:
            wanted = int if key == "seeds" else str
            if any(type(item) is not wanted for item in found[key]):
                yield f"{path}: {key}: {found[key]!r} must hold {wanted.__name__} only"
            elif len(set(found[key])) != len(found[key]):
                yield f"{path}: {key}: {found[key]!r} names something twice"
    for key in ("methods", "ablations"):
        for name in found[key] if type(found.get(key)) is tuple else ():
            if name not in METHODS:
                near = difflib.get_close_matches(str(name), METHODS, n=1, cutoff=0.0)
                yield f"{path}: {key}: no method {name!r}; the nearest is {near[0]!r}"
    if type(found.get("tasks")) is ConfigDict:
        if not found.tasks:
            yield f"{path}: tasks: empty; name at least one task and its config file"
        elif found.get("ablations") and found.get("ablation_task") not in found.tasks:
            there = ", ".join(found.tasks)
            yield f"{path}: ablation_task: {found.get('ablation_task')!r} is none of {there}"
    for key in ("seeds", "methods"):
        if found.get(key) == ():
            yield f"{path}: {key}: empty; give at least one"
    for key in ("workers", "budget_minutes"):
        if type(found.get(key)) is int and found[key] < 1:
            yield f"{path}: {key}: {found[key]} must be at least 1"


def _expand(values: dict[str, Any]) -> tuple[list[Cell], list[str]]:
    cells, problems, bases = [], [], {}
    reference = load_config(CONFIGS / "base.py")
    for seed in values["seeds"]:
        for task, path in values["tasks"].items():
            ablations = values["ablations"] if task == values["ablation_task"] else ()
            for name in dict.fromkeys((*values["methods"], *ablations)):
                method = METHODS[name]
                config = method.config_path(path)
                try:
                    if config not in bases:
                        bases[config] = load_config(config)
                except UserError as error:
                    problems += error.problems
                    continue
                base = bases[config]
                changes = {**method.changes(base), "seed": seed}
                if base.student.sft.steps:  # the warm start is another one for each seed
                    changes["student.sft.seed"] = seed + 1
                overrides = tuple(f"{key}={value}" for key, value in changes.items())
                cells.append(Cell(task, name, seed, config, overrides))
                try:
                    validate(apply_overrides(base, overrides), reference)
                except UserError as error:
                    problems += [f"{task}/{name}: {problem}" for problem in error.problems]
    return cells, problems
