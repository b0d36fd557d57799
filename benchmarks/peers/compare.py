"""Measure kdrl_jax and other libraries on the same work, in turns, and print ratios.

    python benchmarks/peers/compare.py [--tunix=ENV/bin/python] [--trl=ENV/bin/python] \
        [--workloads=W1,W2,W3,W4] [--shape=small] [--dtype=float32] [--rounds=3] \
        [--output=FILE.json]

Each ENV is a virtual environment of the other library's own: `pip install google-tunix==0.1.7`,
`pip install trl==1.16.0 torch==2.13.0`. A round is one process of each, one after the other; a
ratio is the median over the rounds, so that what else the machine does strikes all alike. Bar: as
fast as each of them and no more memory. W5 takes --shape=small152k; --rows and --length change a
workload's size, see workloads.py.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import workloads as w

HERE = Path(__file__).parent
LIBRARIES = ["tunix", "trl"]
# Beside a library's default: what it does more there than kdrl_jax, or what kdrl_jax does always.
VARIANTS = {
    ("tunix", "W1"): ["log_probs"],
    ("tunix", "W3"): ["distill"],
    ("trl", "W3"): ["distill"],
}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in LIBRARIES:
        parser.add_argument(f"--{name}", help="python of its environment")
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    w.add_sizes(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="calls a process measures")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    given = [name for name in LIBRARIES if getattr(args, name)]
    if not given:
        parser.error("give an environment: --tunix or --trl")
    sizes = [f"--{k}={getattr(args, k)}" for k in ("shape", "dtype", "rows", "length", "repeats")]
    found = []
    print("| workload | kdrl_jax, s | MiB | library | s | MiB | times as fast | of its memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for workload in args.workloads.split(","):
        options = [f"--workload={workload}", *sizes]
        others = [(n, v) for n in given for v in ["", *VARIANTS.get((n, workload), [])]]
        rounds = []
        for _ in range(args.rounds):
            own = run(sys.executable, "kdrl", options)
            rest = [run(getattr(args, n), n, [*options, f"--variant={v}"]) for n, v in others]
            rounds.append([own, *rest])
        for place, (name, variant) in enumerate(others, 1):
            pairs = [(each[0], each[place]) for each in rounds]
            label = f"{name} {variant}".strip()
            found.append({"workload": workload, "library": label, "pairs": pairs})
            print(row(workload, label, pairs), flush=True)
    if args.output:
        settings = {"shape": args.shape, "dtype": args.dtype, "found": found}
        args.output.write_text(json.dumps(settings, indent=1) + "\n")


def run(python: str, library: str, options: list[str]) -> dict[str, float]:
    """The result of one process."""
    command = [python, str(HERE / f"run_{library}.py"), *options]
    return w.in_process(command, own=library == "kdrl")


def row(workload: str, label: str, pairs: list[tuple[dict, dict]]) -> str:
    """A line of the table: medians, and the medians of the ratios."""

    def median(values) -> float:
        return statistics.median(values)

    times = [median(p[i]["seconds"] for p in pairs) for i in (0, 1)]
    memory = [median(p[i]["peak_mib"] for p in pairs) for i in (0, 1)]
    faster = median(b["seconds"] / a["seconds"] for a, b in pairs)
    leaner = median(a["peak_mib"] / b["peak_mib"] for a, b in pairs)
    return (
        f"| {workload} | {times[0]:.3f} | {memory[0]:.0f} | {label} | "
        f"{times[1]:.3f} | {memory[1]:.0f} | {faster:.2f} | {leaner:.2f} |"
    )


if __name__ == "__main__":
    main()
