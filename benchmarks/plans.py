"""Which of the shipped runs fit which machines: `kdrl_jax.plan --check` for a list, as a table.

    pip install 'kdrl_jax[tpu]'      # libtpu compiles without a TPU
    python benchmarks/plans.py [--only=NAME,…] [--compile=all] [--folder=DIR] [--output=FILE.md]

DIR keeps each plan as JSON; one that is there already is not made again. "estimate" and "compiler"
are GiB of a device in the phase that needs most; seconds are of the longest step there can be,
every completion at its whole budget. No clock has seen any of it.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

# name: (config, topology, variant)
CASES = {
    "stage2, v5p-32": ("stage2", "v5p-32", ""),
    "stage2, v6e-64": ("stage2", "v6e-64", ""),
    "stage2, v5e-256": ("stage2", "v5e-256", "v5e_256"),
    "zero_rl (3B, teacher 7B), v5p-128": ("zero_rl", "v5p-128", ""),
    "zero_rl_teacher (7B), v5p-128": ("zero_rl_teacher", "v5p-128", ""),
    "stage2 with a 32B teacher, v5p-128": ("stage2", "v5p-128", "teacher_32b"),
}
PHASES = ("rollout", "score", "update")
GIB = 2**30


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--compile", default="all")
    parser.add_argument("--folder", type=Path, default=Path("runs/plans"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    names = [n for n in CASES if any(part in n for part in args.only.split(","))]
    args.folder.mkdir(parents=True, exist_ok=True)
    head = ["run, machine", "mesh", "chip, GiB"]
    head += [f"{phase}: estimate / compiler" for phase in PHASES]
    head += ["fits", "step, s: bound / compiler"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name in names:
        lines.append(row(name, plan(name, args)))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


def plan(name: str, args: argparse.Namespace) -> dict:
    """What `kdrl_jax.plan` says of a case."""
    config, topology, variant = CASES[name]
    file = f"configs/{config}.py" + (f":{variant}" if variant else "")
    output = args.folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
    if not output.exists():
        command = [sys.executable, "-m", "kdrl_jax.plan", f"--config={file}"]
        command += [f"--topology={topology}", "--check", f"--compile={args.compile}"]
        done = subprocess.run([*command, f"--output={output.resolve()}"], cwd=ROOT, check=False)
        if done.returncode not in (0, 1):  # 1: it does not fit
            sys.exit(f"{name}: {' '.join(command)} ended with {done.returncode}")
    return json.loads(output.read_text(encoding="utf-8"))


def row(name: str, found: dict) -> str:
    """A line of the table."""

    def gib(size: float | None) -> str:
        return "–" if size is None else f"{size / GIB:.1f}"

    def pair(phase: str) -> str:
        if phase not in found["estimated_need"]:
            return "–"
        return f"{gib(found['estimated_need'][phase])} / {gib(found['compiled_need'][phase])}"

    speed = found["speed"].values()
    bound = sum(x["bound"] for x in speed)
    known = all(x["compiler"] is not None for x in speed)
    whole = f"{sum(x['compiler'] for x in speed):,.0f}" if known else "–"
    mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    cells = [name, mesh or "1", gib(found["limit"]), *map(pair, PHASES)]
    cells += ["yes" if found["fits"] else "no", f"{bound:,.0f} / {whole}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
