"""The demo's student by objective: held-out accuracy before and after, over several seeds.

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--objectives kdrl grpo kd_rkl] [--output=DIR]

Each run is `configs/demo.py` with another objective, seed and warm start; teacher, steps, data
and all else are the same. Prints a Markdown table. Runs that are already there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


def run(objective: str, seed: int, output: Path, extra: list[str]) -> dict:
    """The run's summary, after making the run if need be."""
    workdir = output / f"{objective}_{seed}"
    command = [
        *(sys.executable, "-m", "kdrl_jax.train", "--config=configs/demo.py"),
        f"--workdir={workdir}",
        f"--config.objective={objective}",
        f"--config.seed={seed}",
        f"--config.student.sft.seed={seed + 1}",
        *extra,
    ]
    subprocess.run(command, check=True)
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["kdrl", "grpo", "kd_rkl"])
    parser.add_argument("--output", type=Path, default=Path("runs/demo_seeds"))
    args, extra = parser.parse_known_args()
    after: dict[str, list[float]] = {}
    before: list[float] = []
    lines = []
    for seed in args.seeds:
        found = [run(objective, seed, args.output, extra) for objective in args.objectives]
        starts = {summary["eval/accuracy/first"] for summary in found}
        if len(starts) != 1:
            raise SystemExit(f"seed {seed}: the runs do not start from one student: {starts}")
        before.append(starts.pop())
        cells = [f"{seed}", f"{before[-1]:.1%}"]
        for objective, summary in zip(args.objectives, found, strict=True):
            after.setdefault(objective, []).append(summary["eval/accuracy/last"])
            cells.append(f"{after[objective][-1]:.1%}")
        lines.append(cells)
    columns = [before, *after.values()]
    lines.append(["**mean**", *(f"**{statistics.mean(c):.1%}**" for c in columns)])
    if len(args.seeds) > 1:
        lines.append(["std", *(f"{statistics.stdev(c):.1%}" for c in columns)])
    header = ["seed", "warm start", *args.objectives]
    print()
    for cells in (header, ["---"] * len(header), *lines):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
