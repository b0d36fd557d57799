"""Measure kdrl_jax and other libraries on the same work, in turns, and print ratios.

    python benchmarks/peers/compare.py --tunix=ENV/bin/python [--workloads=W1,W2,W3,W4] \
        [--shape=small] [--pairs=3] [--output=FILE.json]

ENV is a virtual environment of the other library's own: `pip install google-tunix==0.1.7`. A pair
is one process of each, one after the other; the ratio of a workload is the median over the pairs,
so that what else the machine does strikes both alike. W5 takes --length and --shape=small152k.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SEPARATE = {"W3": ["", "distill"], "W1": ["", "log_probs"]}  # variants of the other library


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tunix", required=True, help="python of its environment")
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--shape", default="small")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = []
    print("| workload | kdrl_jax, s | MiB | tunix | s | MiB | times as fast | of the memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for workload in args.workloads.split(","):
        options = [f"--workload={workload}", f"--shape={args.shape}", f"--length={args.length}"]
        for variant in SEPARATE.get(workload, [""]):
            pairs = []
            for _ in range(args.pairs):
                own = run(sys.executable, "run_kdrl.py", options)
                other = run(args.tunix, "run_tunix.py", [*options, f"--variant={variant}"])
                pairs.append((own, other))
            found.append({"workload": workload, "variant": variant, "pairs": pairs})
            print(row(workload, variant, pairs), flush=True)
    if args.output:
        args.output.write_text(json.dumps({"shape": args.shape, "found": found}, indent=1) + "\n")


def run(python: str, script: str, options: list[str]) -> dict[str, float]:
    """The result of one process."""
    env = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    root = str(HERE.parent.parent)
    env["PYTHONPATH"] = root if script == "run_kdrl.py" else ""
    done = subprocess.run(
        [python, str(HERE / script), *options], env=env, text=True, capture_output=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{script} {' '.join(options)} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def row(workload: str, variant: str, pairs: list[tuple[dict, dict]]) -> str:
    """A line of the table: medians, and the median of the ratios."""

    def median(values) -> float:
        return statistics.median(values)

    times = [median(p[i]["seconds"] for p in pairs) for i in (0, 1)]
    memory = [median(p[i]["peak_mib"] for p in pairs) for i in (0, 1)]
    faster = median(b["seconds"] / a["seconds"] for a, b in pairs)
    leaner = median(a["peak_mib"] / b["peak_mib"] for a, b in pairs)
    return (
        f"| {workload} | {times[0]:.3f} | {memory[0]:.0f} | {variant or 'default'} | "
        f"{times[1]:.3f} | {memory[1]:.0f} | {faster:.2f} | {leaner:.2f} |"
    )


if __name__ == "__main__":
    main()
