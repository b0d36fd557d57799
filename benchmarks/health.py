"""Which watches trip: the paper's own failures, healthy runs beside them, and injected faults.

    python benchmarks/health.py --output=runs/health [--seeds=0,1] [--only=reward_shaping,…]

Each row is a process of its own, on one core, with the tasks, teachers and students of
`configs/reproduce`: they are made by the first run and kept. Prints a table: what tripped at which
step, held-out accuracy at first and last, and how the run ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kdrl_jax import train
from kdrl_jax.cli import parse_config_args, run_entry
from kdrl_jax.reproduction.grid import Cell
from kdrl_jax.training.learner import Learner
from kdrl_jax.types import Scores

ROOT = Path(__file__).resolve().parent.parent
ARITHMETIC = {"task": "arithmetic"}
PUZZLES = {"task": "knights_knaves", "optimizer.learning_rate": 1e-3}
FAST = {**PUZZLES, "optimizer.learning_rate": 2e-3, "steps": 60}
TOPK = {"kd_estimator": "topk", "kd_topk.support": "teacher", "kd_topk.k": 2}

# Name → the keys that differ from the task's config, and a fault.
RUNS: dict[str, dict[str, Any]] = {
    "kdrl": {**ARITHMETIC, "objective": "kdrl"},
    "grpo": {**ARITHMETIC, "objective": "grpo"},
    "topk": {**ARITHMETIC, "objective": "kd_rkl", "beta.init": 3.0, **TOPK},
    "puzzles_kdrl": {**PUZZLES, "objective": "kdrl"},
    "puzzles_shaping": {**PUZZLES, "objective": "reward_shaping", "beta.init": 1.0},
    "fast_kdrl": {**FAST, "objective": "kdrl"},
    "fast_grpo": {**FAST, "objective": "grpo"},
    "fast_shaping": {**FAST, "objective": "reward_shaping", "beta.init": 1.0},
    "nan_once": {**ARITHMETIC, "objective": "kdrl", "steps": 12, "fault": "5:6"},
    "nan_for_ever": {**ARITHMETIC, "objective": "kdrl", "steps": 12, "fault": "5:1000"},
    "rate_1000": {
        **ARITHMETIC,
        "objective": "kdrl",
        "steps": 40,
        "optimizer.learning_rate": 0.3,
    },
}


def cell_of(name: str, seed: int) -> Cell:
    """A run as a cell of a grid of its own."""
    changes = {key: x for key, x in RUNS[name].items() if key not in ("task", "fault")}
    changes |= {"seed": seed, "student.sft.seed": seed + 1, "eval.every": 20}
    changes |= {"eval.problems": 512, "checkpoint.every": 1000}
    path = ROOT / "configs" / "reproduce" / f"{RUNS[name]['task']}.py"
    return Cell(name, "health", seed, str(path), tuple(f"{k}={v}" for k, v in changes.items()))


def spoil(steps: str) -> None:
    """Make the teacher's log-probs NaN in steps FIRST:END, counted from 0."""
    first, end = map(int, steps.split(":"))
    original, count = Learner.score, iter(range(10**9))

    def score(self: Learner, *args: Any) -> Scores:
        scores = original(self, *args)
        if not first <= next(count) < end or scores.teacher_log_probs is None:
            return scores
        nothing = jnp.log(scores.teacher_log_probs)  # they are negative
        return dataclasses.replace(scores, teacher_log_probs=nothing)

    Learner.score = score  # type: ignore[method-assign]


def child(name: str, argv: list[str]) -> None:
    """A run in this process."""
    if fault := RUNS[name].get("fault"):
        spoil(fault)
    summary = train.train(*parse_config_args(argv, __doc__))
    sys.exit(3 if summary["stopped_by"] else 0)


def run(name: str, seed: int, output: Path, core: int) -> str:
    """Run one, unless it has been, and describe how it went: a row of the table."""
    cell, folder = cell_of(name, seed), output / name / str(seed)
    summary = folder / "summary.json"
    if not summary.exists():
        flags = [f"--config={cell.config}", f"--workdir={folder}"]
        flags += [f"--config.{x}" for x in (*cell.overrides, f"cache_dir={output / 'cache'}")]
        threads = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **threads}
        command = [sys.executable, str(Path(__file__)), f"--child={name}", *flags]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
            os.sched_setaffinity(process.pid, {core})
            process.wait()
    if not summary.exists():
        return f"| {name} | {seed} | failed: see {folder / 'log.txt'} | | |"
    found = json.loads(summary.read_text())
    trips = ", ".join(f"{k} {v['first_step']}" for k, v in found["health"].items()) or "–"
    accuracy = [found.get(f"eval/accuracy/{end}") for end in ("first", "last")]
    shown = " → ".join("?" if x is None else f"{x:.1%}" for x in accuracy)
    end = f"stopped after step {found['steps']}" if found["stopped_by"] else "finished"
    return f"| {name} | {seed} | {trips} | {shown} | {end} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/health"))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.child:
        child(args.child, rest)
    core = max(os.sched_getaffinity(0))
    print("| run | seed | tripped, first step | held-out accuracy | end |\n|---|---|---|---|---|")
    for seed in map(int, args.seeds.split(",")):
        for name in args.only.split(","):
            print(run(name, seed, args.output.resolve(), core), flush=True)


if __name__ == "__main__":
    run_entry(main)
