"""An hour of training, watched from outside: does anything grow that should not?

    python benchmarks/soak.py --output=runs/soak [--minutes=60] [--core=0] [--config.key=value …]

The demo's models, teacher and grader at a learning rate at which the policy hardly moves, so that
a step has the same work from the first to the last. After the minutes the run is told to stop by
SIGTERM and must save and exit with 75. Beside it this process notes, every few seconds, the
trainer's memory, open files, threads and children (psutil comes with orbax-checkpoint).

Flat means: step time, median of the last tenth over that of the first, within 5 %; memory of the
trainer, the same ratio of medians, within 2 %; open files and threads, no more in the median of the
last tenth than in that of the first; not one compilation after the first tenth. A save holds some
twenty files for a moment, so the most of a half says how the looks fell into saves, not whether
files stay open: one that does raises every look after it. The most is shown and not judged.

What else the machine does in an hour moves the clock as well. So in the end a second run is started
afresh and both take turns, each standing still while the other works: the ratio of their step times
is what the hour did to the program, and the machine has no part in it.
"""

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.training.stopping import EXIT_STOPPED

ROOT = Path(__file__).resolve().parent.parent
STEPS = 1_000_000  # more than an hour holds
SETTINGS = {
    "steps": STEPS,
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-7,
    "rollout.prompts_per_step": 16,
    "micro_batch": 64,
    "eval.every": 100,
    "eval.problems": 128,
    "eval.batch": 128,
    "checkpoint.every": 100,
    "samples.every": 100,
}
TURNS, TURN_S = 8, 15.0
TIME, MEMORY = 0.05, 0.02
OTHERS = ("time/eval_s", "time/checkpoint_s")
"""Of the steps that evaluate or save, which are left out of the medians."""


def main() -> None:
    """Run, print the table, leave `soak.json`; exit with 1 unless all is flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between looks")
    parser.add_argument("--core", help="which core to keep the trainer on")
    args, overrides = parser.parse_known_args()
    flags = [f"--config.{key}={value}" for key, value in SETTINGS.items()] + overrides
    command = [sys.executable, "-m", "kdrl_jax.train", f"--config={ROOT / 'configs' / 'demo.py'}"]
    command += [f"--workdir={args.output / 'run'}", *flags]
    if args.core:
        command = ["taskset", "--cpu-list", args.core, *command]
    if (args.output / "run").exists():
        parser.error(f"{args.output}: holds a run already; give another folder")
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "log.txt").open("w") as log:
        trainer = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        looks = watch(trainer, args.minutes * 60, args.every, args.output / "run")
        fresh = [x.replace(f"{args.output / 'run'}", f"{args.output / 'fresh'}") for x in command]
        turns = in_turns(psutil.Process(trainer.pid), args.output / "run", fresh, log)
        trainer.send_signal(signal.SIGTERM)
        code = trainer.wait(timeout=600)
    rows = read_metrics(args.output / "run" / "metrics.jsonl")
    (args.output / "looks.jsonl").write_text("".join(json.dumps(x) + "\n" for x in looks))
    found = judge(rows, looks) | {"in turns with a fresh run": turns}
    found |= {"exit code": code, "minutes": args.minutes}
    found["stopped and saved"] = code == EXIT_STOPPED
    (args.output / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    kept = abs(turns["ratio"] - 1) <= TIME
    raise SystemExit(0 if found["flat"] and kept and found["stopped and saved"] else 1)


def watch(trainer: subprocess.Popen, seconds: float, every: float, run: Path) -> list[dict]:
    """What the trainer holds, every so often, for so many seconds from its first step on."""
    process, looks, rows = psutil.Process(trainer.pid), [], 0
    metrics = run / "metrics.jsonl"
    while trainer.poll() is None and not metrics.exists():
        time.sleep(every)
    with metrics.open("rb") as lines:
        while trainer.poll() is None and rows < 2:
            rows += lines.read().count(b"\n")
            time.sleep(every)
        begun = time.monotonic()
        while trainer.poll() is None and time.monotonic() - begun < seconds:
            time.sleep(every)
            rows += lines.read().count(b"\n")
            try:
                held = held_by(process)
            except psutil.Error:  # it has just ended
                break
            looks.append({"seconds": time.monotonic() - begun, "rows": rows} | held)
    return looks


def in_turns(old: psutil.Process, old_run: Path, command: list[str], log) -> dict:
    """Step times of a run and of a new one, seconds, each measured while the other stands still."""
    new_run = old_run.with_name("fresh")
    new = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while len(read_metrics(new_run / "metrics.jsonl")) < 50:
        if new.poll() is not None:
            raise SystemExit(f"{new_run}: ended with {new.returncode}; see log.txt")
        time.sleep(1)
    both = {old_run: old, new_run: psutil.Process(new.pid)}
    found: dict[Path, list[float]] = {run: [] for run in both}
    for turn in range(TURNS):
        for run, other in ((old_run, new_run), (new_run, old_run))[:: 1 if turn % 2 else -1]:
            both[other].suspend()
            try:
                before = len(read_metrics(run / "metrics.jsonl"))
                time.sleep(TURN_S)
                rows = read_metrics(run / "metrics.jsonl")[
                    before + 2 :
                ]  # the first was begun before
            finally:
                both[other].resume()
            plain = [row for row in rows if not any(k in row for k in OTHERS)]
            found[run].append(statistics.median(map(step_seconds, plain)))
    new.send_signal(signal.SIGTERM)
    new.wait(timeout=600)
    ratios = [a / b for a, b in zip(found[old_run], found[new_run], strict=True)]
    return {
        "old, s": statistics.median(found[old_run]),
        "fresh, s": statistics.median(found[new_run]),
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
    }


def held_by(process: psutil.Process) -> dict:
    """Memory in bytes, open files, threads and CPU seconds of a process, and its children."""
    with process.oneshot():
        found = {"rss": process.memory_info().rss, "files": process.num_fds()}
        found |= {"threads": process.num_threads(), "cpu": sum(process.cpu_times()[:2])}
    children = process.children(recursive=True)
    return found | {"children": len(children), "children_rss": sum(map(_rss, children))}


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def judge(rows: list[dict], looks: list[dict]) -> dict:
    """First against last tenth of everything; see the module's docstring for what is flat."""
    steps = [row for row in rows if row["step"] > 0]
    tenth = len(steps) // 10
    first, last = steps[:tenth], steps[-tenth:]
    looks_tenth, half = max(len(looks) // 10, 2), len(looks) // 2
    early, late = looks[:looks_tenth], looks[-looks_tenth:]
    warm = looks[looks_tenth : 2 * looks_tenth]
    spans = [{k: x[-1][k] - x[0][k] for k in ("cpu", "rows")} for x in (early, late)]
    cpu = [span["cpu"] / max(span["rows"], 1) for span in spans]

    def pair(of, a, b, by=statistics.median) -> dict:
        before, after = by(map(of, a)), by(map(of, b))
        return {"first": before, "last": after, "ratio": after / before if before else math.inf}

    plain = [[r for r in part if not any(k in r for k in OTHERS)] for part in (first, last)]
    table = {
        "step time, s": pair(step_seconds, *plain),
        "CPU time of a step, s": {"first": cpu[0], "last": cpu[1], "ratio": cpu[1] / cpu[0]},
        "tokens of a response": pair(lambda r: r["length/mean"], *plain, by=_mean),
        "memory, MiB": pair(lambda x: x["rss"] / 2**20, early, late),
        "least memory, MiB": pair(lambda x: x["rss"] / 2**20, early, late, by=min),
        "memory after the first tenth, MiB": pair(lambda x: x["rss"] / 2**20, warm, late),
        "memory of graders, MiB": pair(lambda x: x["children_rss"] / 2**20, early, late),
        "open files": pair(lambda x: x["files"], early, late),
        "threads": pair(lambda x: x["threads"], early, late),
        "most open files of a half": pair(lambda x: x["files"], looks[:half], looks[half:], by=max),
        "most threads of a half": pair(lambda x: x["threads"], looks[:half], looks[half:], by=max),
        "compilations": pair(lambda r: r["time/compilations"], first, last, by=max),
    }
    flat = {
        "step time": abs(table["step time, s"]["ratio"] - 1) <= TIME,
        "memory": table["memory, MiB"]["ratio"] - 1 <= MEMORY,
        "open files": table["open files"]["ratio"] <= 1,
        "threads": table["threads"]["ratio"] <= 1,
        "compilations": table["compilations"]["ratio"] == 1,
    }
    slope = statistics.linear_regression(
        [x["seconds"] / 3600 for x in looks[looks_tenth:]],
        [x["rss"] / 2**20 for x in looks[looks_tenth:]],
    ).slope
    return {
        "steps": len(steps),
        "table": table,
        "memory's slope after the first tenth, MiB an hour": slope,
        "flat": all(flat.values()),
        "flat by figure": flat,
    }


def step_seconds(row: dict) -> float:
    """Wall time of a step."""
    return sum(v for k, v in row.items() if k.startswith("time/") and k.endswith("_s"))


def _mean(values) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
