"""How a grid was run: command, machine, versions and time, kept beside its cells."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrl_jax.reproduction.grid import Grid
from kdrl_jax.reproduction.results import CellResult
from kdrl_jax.reproduction.runner import read_json
from kdrl_jax.training.storage import write_atomic

RECORD = "record.json"


def add_sitting(output: Path, command: str, workers: int, seconds: float) -> None:
    """Note that the grid ran for so long; a grid that was interrupted has several sittings."""
    record = read_json(output / RECORD) or {"sittings": []}
    sitting = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": f"{_processor()}, {_cores()} cores, {platform.system()}",
        "workers": workers,
        "seconds": round(seconds, 1),
    }
    record["sittings"].append(sitting)
    write_atomic(output / RECORD, json.dumps(record, indent=2) + "\n")


def facts(output: Path, grid: Grid, results: Sequence[CellResult]) -> dict[str, str]:
    """What the report's setup lists, in order."""
    sittings: list[dict[str, Any]] = (read_json(output / RECORD) or {"sittings": []})["sittings"]
    finished = [r for r in results if r.status == "finished"]
    found = {"Command": f"python -m kdrl_jax.reproduce --grid={grid.path}"}
    if sittings:
        last = sittings[-1]
        total = sum(sitting["seconds"] for sitting in sittings) / 60
        found |= {"Command": last["command"], "Date": last["date"], "Machine": last["machine"]}
        how = "a core and a thread each" if grid.pin else "sharing the machine"
        found["Processes"] = f"{last['workers']} at a time, {how}"
        times = "" if len(sittings) == 1 else f" in {len(sittings)} sittings"
        found["Wall time"] = f"{total:.1f} min{times}; the budget is {grid.budget_minutes} min"
    if finished:
        cell = finished[0]
        folder = output / "cells" / cell.task / cell.method / str(cell.seed)
        summary = read_json(folder / "summary.json") or {}
        versions = summary.get("versions", {})
        found["Device of a run"] = summary.get("device", "")
        found["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        seconds = sum(r.seconds for r in finished) / len(finished)
        found["Runs"] = (
            f"{len(finished)} of {len(grid.cells)} finished, {len(grid.seeds)} seeds, "
            f"{seconds:.0f} s each on average, start and evaluations included"
        )
    for task, path in grid.tasks.items():
        found[f"Config of {task}"] = path
    return {name: text for name, text in found.items() if text}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
