"""How many rows go through forward and backward at once, where the config leaves it open.

It changes memory and speed, and results by rounding alone: so that a run that continues does so to
the bit, the choice is written down with each start and kept while the devices are the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.models import ModelConfig
from kdrl_jax.sharding import batch_parts
from kdrl_jax.training.locate import PROVENANCE
from kdrl_jax.training.memory_check import LEARNING, MemoryCheck
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.validation import Sizes

PASSES = 4
"""Passes of an update at least: short responses share a row, so some passes fall away."""
UNKNOWN_LIMIT = 64
"""Rows at most, where nobody knows what a device can hold."""


def settle_micro_batch(
    config: ConfigDict,
    sizes: Sizes,
    shapes: Mapping[str, ModelConfig],
    meshes: Meshes,
    *,
    limit: float | None = None,
    workdir: Path | None = None,
) -> tuple[Sizes, str]:
    """Sizes with the rows of a micro-batch, and a line on them; "" where the config has them.

    They are the most that divide the rows of an update into PASSES, that the meshes can split, and
    that the memory plan says fit; the least, where none fits. All processes must call this.

    Args:
      shapes, limit: as `MemoryCheck` takes them.
      workdir: of a run; what it began with is kept, if it fits and the devices are the same.
    """
    if config.micro_batch:
        return sizes, ""
    rows = sizes.rollouts // config.mini_batches

    def of(count: int) -> Sizes:
        return dataclasses.replace(sizes, micro_batch=count, micro_batches=rows // count)

    def fits(count: int) -> bool:
        check = MemoryCheck(config, of(count), shapes, meshes, limit=limit)
        if check.limit is None:
            return count <= UNKNOWN_LIMIT
        needs = [check.plan.need(x) for x in LEARNING if x in check.plan.phases]
        return max(needs) <= check.limit

    choices = _choices(rows, shapes, meshes)
    begun = _begun_with(workdir) if workdir else 0
    kept = begun in choices and fits(begun)
    several = [n for n in choices if n * PASSES <= rows]
    chosen = begun if kept else next(filter(fits, several), choices[-1])
    chosen = int(processes.gather(np.array(chosen)).min())  # hosts may differ in memory
    why = "as the run began" if kept else f"the most that fits, in {PASSES} passes or more"
    return of(chosen), f"micro_batch: {chosen} of an update's {rows} rows at once, {why}"


def device_facts(sizes: Sizes) -> dict[str, Any]:
    """What a start of a run has to say of its devices."""
    return {"devices": _devices(), "micro_batch": sizes.micro_batch}


def _devices() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _choices(rows: int, shapes: Mapping[str, ModelConfig], meshes: Meshes) -> list[int]:
    """The largest first; see `check_shapes` for there being one."""
    meshes_of = [meshes.student, *([meshes.teacher] if "teacher" in shapes else [])]
    ways = math.lcm(*map(batch_parts, meshes_of))
    return [n for n in range(rows, 0, -1) if rows % n == 0 and n % ways == 0]


def _begun_with(workdir: Path) -> int:
    """The micro-batch of a run's last start, if that was on devices like these; else 0."""
    try:
        starts = json.loads((workdir / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    last = starts[-1] if starts else {}
    return int(last.get("micro_batch", 0)) if last.get("devices") == _devices() else 0
