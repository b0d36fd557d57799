"""Kills a tiny run at random moments until it ends, and looks whether anything was lost.

    python benchmarks/faults.py --output=DIR [--kills=100] [--seed=0] [--storage] [--damages=200]

One run goes through undisturbed. Others are ended by SIGKILL or SIGTERM, either at a moment drawn
evenly from the time that the undisturbed one took, or some way into a phase: while the first
checkpoint is being written, an old one deleted, a compiled program cached. They are started again
until they end by themselves, and must then leave the same parameters and moments, bit for bit,
the same metrics but those of speed, the same samples, byte for byte, and nothing else. --storage
damages checkpoints and fills disks instead. A line of JSON for each run goes to
DIR/kills.jsonl or DIR/storage.jsonl. Exits with 1 unless nothing was lost.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import inspect
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
SETTINGS = {
    "steps": 8,
    "data.size": 64,
    **{f"{role}.shape.{key}": n for role in ("teacher", "student") for key, n in SHAPE.items()},
    **{"teacher.shape.hidden_size": 24, "teacher.shape.head_dim": 16, "teacher.shape.mlp_size": 32},
    **{"student.shape.hidden_size": 16, "student.shape.head_dim": 8, "student.shape.mlp_size": 16},
    **{"teacher.sft.steps": 3, "teacher.sft.problems": 64, "teacher.sft.batch_size": 8},
    **{"student.sft.steps": 2, "student.sft.problems": 64, "student.sft.batch_size": 8},
    **{"rollout.prompts_per_step": 4, "rollout.group_size": 4, "rollout.max_new_tokens": 10},
    **{"micro_batch": 8, "optimizer.schedule": "constant", "reward.workers": 1},
    **{"eval.every": 3, "eval.problems": 6, "eval.batch": 4},
    **{"checkpoint.every": 2, "checkpoint.keep": 2, "samples.every": 2, "samples.count": 5},
}
PHASES = {
    "data": ("kdrl_jax.train", "read_run_data"),
    "warm-up": ("kdrl_jax.training.roles", "train_supervised"),
    "warm-up save": ("kdrl_jax.training.roles", "keep_model"),
    "restore": ("kdrl_jax.training.checkpoints:CheckpointStore", "restore"),
    "evaluation": ("kdrl_jax.train", "evaluate"),
    "rollout": ("kdrl_jax.training.collect:Collector", "collect"),
    "update": ("kdrl_jax.training.learner:Learner", "learn"),
    "metrics": ("kdrl_jax.training.metrics:MetricsWriter", "write"),
    "metrics reopened": ("kdrl_jax.training.metrics:MetricsWriter", "__init__"),
    "samples": ("kdrl_jax.training.run:Run", "write_samples"),
    "save": ("kdrl_jax.training.checkpoints:CheckpointStore", "save"),
    "commit": ("orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath", "finalize"),
    "deletion": ("kdrl_jax.training.checkpoints:CheckpointStore", "_sweep"),
    "compile": ("jax._src.compiler", "backend_compile_and_load"),
    "compile cache": ("jax._src.compilation_cache", "put_executable_and_time"),
    "end": ("kdrl_jax.training.run:Run", "finish"),
}
"""What is watched: where it is defined, and its name there."""
COLD = {
    "warm-up": "models",
    "warm-up save": "models",
    "compile": "programs",
    "compile cache": "programs",
}
"""Phases that come only where a cache is empty, and which."""
TARGETS = [name for name in PHASES if name not in COLD]
PER_RUN = 4
"""Kills of a run at most, before it is left alone."""


# --- the run that is killed -----------------------------------------------------------------


def child(channel: int, argv: list[str]) -> None:
    """The training command, telling `channel` where it is: '+PHASE' and '-PHASE', a line each."""

    def watched(name, call):
        @functools.wraps(call)
        def run(*args, **kwargs):
            os.write(channel, f"+{name}\n".encode())
            try:
                return call(*args, **kwargs)
            finally:
                os.write(channel, f"-{name}\n".encode())

        @functools.wraps(call)
        async def run_async(*args, **kwargs):
            os.write(channel, f"+{name}\n".encode())
            try:
                return await call(*args, **kwargs)
            finally:
                os.write(channel, f"-{name}\n".encode())

        return run_async if inspect.iscoroutinefunction(call) else run

    from kdrl_jax.cli import run_entry
    from kdrl_jax.train import main

    for name, (place, attribute) in PHASES.items():
        module, _, owner = place.partition(":")
        at = importlib.import_module(module)
        at = getattr(at, owner) if owner else at
        setattr(at, attribute, watched(name, getattr(at, attribute)))
    run_entry(lambda: main(argv))


@dataclasses.dataclass
class Place:
    """The folders of one run."""

    work: Path
    models: Path
    programs: Path

    def start(self, log: Path) -> tuple[subprocess.Popen, int]:
        """The command, and where it tells of its phases."""
        settings = SETTINGS | {"cache_dir": self.models}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        argv = [f"--config={ROOT / 'configs/demo.py'}", f"--workdir={self.work}", *flags]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        reader, writer = os.pipe()
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, __file__, f"--child={writer}", "--", *argv],
                cwd=ROOT,
                env=environment,
                pass_fds=[writer],
                stdout=out,
                stderr=out,
            )
        os.close(writer)
        return process, reader


@dataclasses.dataclass
class Blow:
    """When and how to kill: after `after` seconds, counted from entering `phase` if there is one
    for the `nth` time."""

    signal: signal.Signals
    after: float
    phase: str = ""
    nth: int = 1


class Watch:
    """The phases that a run is in, from what it tells."""

    def __init__(self, reader: int):
        self._reader, self._rest = reader, b""
        self.within: list[str] = []
        self.entered: collections.Counter[str] = collections.Counter()
        self.lasted: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self.ended = False

    def look(self, wait: float) -> None:
        """Read what has been told, for at most `wait` seconds."""
        if self.ended or not select.select([self._reader], [], [], max(wait, 0))[0]:
            return
        data = os.read(self._reader, 65536)
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            name = line[1:].decode()
            if line[:1] == b"+":
                self.within.append(name)
                self.entered[name] += 1
                self._since[name] = time.monotonic()
            elif name in self.within:
                self.within.remove(name)
                self.lasted[name] = max(
                    self.lasted.get(name, 0), time.monotonic() - self._since[name]
                )

    def where(self) -> str:
        """The innermost phase."""
        return self.within[-1] if self.within else "between" if self.entered else "imports"

    def close(self) -> None:
        """No more is told."""
        os.close(self._reader)


def strike(place: Place, blow: Blow | None, log: Path, limit: float = 300) -> dict:
    """Run the command and kill it as `blow` says; what happened."""
    begun = time.monotonic()
    process, reader = place.start(log)
    watch, due, hit, told = Watch(reader), None, None, ""
    try:
        if blow and not blow.phase:
            due = begun + blow.after
        while process.poll() is None and not watch.ended:
            now = time.monotonic()
            if now - begun > limit:
                process.kill()
                return {"hung": watch.within, "exit": None}
            if due is not None and now >= due:
                process.send_signal(blow.signal)
                hit, due = now - begun, None
                told = watch.where()
            watch.look(min(0.05, (due - now) if due is not None else 0.05))
            late = blow and blow.phase and hit is None and due is None
            if late and watch.entered[blow.phase] >= blow.nth:
                due = time.monotonic() + blow.after
        process.wait(timeout=limit)
        while not watch.ended:
            watch.look(1)
    finally:
        process.kill()
        process.wait()
        watch.close()
    found = sorted(p.name for p in (place.work / "checkpoints").glob("*"))
    return {
        "exit": process.returncode,
        "signal": blow.signal.name if hit is not None else None,
        "aimed": (blow.phase or "any time") if blow else None,
        "at_s": hit and round(hit, 3),
        # What SIGTERM interrupts has been left by the time the process ends.
        "phase": (watch.where() if blow.signal == signal.SIGKILL else told) if hit else None,
        "writing": any("tmp" in name for name in found),
        "deleting": ".deleted" in found,
        "lasted": watch.lasted,
        "entered": watch.entered,
    }


# --- what must be the same ------------------------------------------------------------------


def arrays(work: Path) -> dict[str, bytes]:
    """All arrays of the newest checkpoint, as Orbax itself reads them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    steps = [int(p.name) for p in (work / "checkpoints").iterdir() if p.name.isdigit()]
    found = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "opt_state"):
            tree = checkpointer.restore((work / "checkpoints" / str(max(steps)) / item).resolve())
            for path, x in jax.tree_util.tree_leaves_with_path(tree):
                found[item + jax.tree_util.keystr(path)] = np.asarray(x).tobytes()
    return found


def metric_lines(work: Path) -> list[dict]:
    """The rows without what depends on the clock; a torn line is an error."""
    from kdrl_jax.training.metrics import CLOCKED

    text = (work / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


def outcome(work: Path) -> dict:
    """What a run leaves that must not depend on how often it was killed."""
    newest = work / "checkpoints" / str(SETTINGS["steps"]) / "meta" / "metadata"
    meta = json.loads(newest.read_text(encoding="utf-8"))
    summary = json.loads((work / "summary.json").read_text(encoding="utf-8"))
    left = [p.name for p in work.iterdir()]
    kept = [p.name for p in (work / "checkpoints").iterdir()]
    left += [f"checkpoints/{name}" for name in kept if not name.isdigit()]
    # Which older one is there may differ: SIGTERM saves at the step where it finds the run.
    left += [f"checkpoints: {sum(map(str.isdigit, kept))}"]
    return {
        "arrays": arrays(work),
        "metrics": metric_lines(work),
        "samples": {p.name: p.read_bytes() for p in sorted((work / "samples").iterdir())},
        "data position": meta["data_position"],
        "meta": meta,
        "finished": summary["finished"],
        "files": sorted(left),
    }


def lost(work: Path, reference: dict) -> list[str]:
    """What differs from the undisturbed run."""
    try:
        found = outcome(work)
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:200]}"]
    steps = [row["step"] for row in found["metrics"]]
    wrong = [key for key in reference if found[key] != reference[key]]
    if steps != list(range(SETTINGS["steps"] + 1)):
        wrong.append(f"steps {steps}")
    return wrong


# --- the campaign ---------------------------------------------------------------------------


def campaign(output: Path, kills: int, seed: int) -> int:
    """Kill `kills` times; how many runs lost something."""
    draw = random.Random(seed)
    shared = Place(output / "reference", output / "models", output / "programs")
    log = output / "log.txt"
    programs = strike(shared, None, log)["entered"]["compile"]  # and fills the caches
    shutil.rmtree(shared.work)
    begun = time.monotonic()
    first = strike(shared, None, log)
    whole_s, lasted = time.monotonic() - begun, first["lasted"]
    reference = outcome(shared.work)
    assert not lost(shared.work, reference)
    print(f"undisturbed: {whole_s:.1f} s", flush=True)

    done, losses, number = 0, 0, 0
    hits: collections.Counter[str] = collections.Counter()
    with (output / "kills.jsonl").open("w") as results:
        while done < kills:
            number += 1
            cold = "" if draw.random() < 0.65 else draw.choice(list(COLD))
            place = dataclasses.replace(shared, work=output / f"run{number}")
            if cold:
                place = dataclasses.replace(place, **{COLD[cold]: output / f"cache{number}"})
            blows = []
            for i in range(min(draw.randint(1, PER_RUN), kills - done)):
                sign = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
                if cold and i == 0:
                    aim = cold
                else:
                    aim = draw.choice(TARGETS) if draw.random() < 0.5 else ""
                span = lasted.get(aim, 0.05) if aim else whole_s
                nth = draw.randint(1, programs if aim == "compile" else 2)
                blows.append(Blow(sign, draw.uniform(0, span), aim, nth))
            lives = []
            for blow in [*blows, None, None]:
                lives.append(strike(place, blow, log))
                if lives[-1]["exit"] == 0:
                    break
            struck = [life for life in lives if life.get("signal")]
            odd = [x for x in lives if x["exit"] not in (0, 75, -9, -15)]
            wrong = lost(place.work, reference) + [f"exit {x['exit']}" for x in odd]
            done, losses = done + len(struck), losses + bool(wrong)
            for life in lives:
                for key in ("lasted", "entered"):
                    life.pop(key, None)
            for life in struck:
                hits[life["phase"] + (", writing" if life["writing"] else "")] += 1
            row = {"run": number, "cold": cold, "lives": lives, "lost": wrong}
            results.write(json.dumps(row) + "\n")
            results.flush()
            print(f"run {number}: {done} kills, lost: {wrong or 'nothing'}", flush=True)
            if not wrong:
                shutil.rmtree(place.work)
                shutil.rmtree(output / f"cache{number}", ignore_errors=True)
    print("\n| killed during | times |\n|---|---|")
    for phase, count in hits.most_common():
        print(f"| {phase} | {count} |")
    print(f"\nkills = {done}, runs = {number}, losses = {losses}")
    return losses


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:2] and sys.argv[1].startswith("--child="):
        return child(int(sys.argv[1].partition("=")[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", action="store_true")
    parser.add_argument("--damages", type=int, default=200)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    sys.modules["faults"] = sys.modules["__main__"]
    args.output.mkdir(parents=True, exist_ok=True)
    output = args.output.resolve()
    if args.storage:
        import faults_storage

        losses = faults_storage.table(output, args.damages, args.seed)
    else:
        losses = campaign(output, args.kills, args.seed)
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
