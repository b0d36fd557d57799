"""Runs the cells of a grid as processes: N at a time, each on its own cores, resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kdrl_jax.config import to_json
from kdrl_jax.reproduction.grid import Cell, Grid
from kdrl_jax.training.display import Display
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.training.validation import compare_for_resume
from kdrl_jax.types import UserError

POLL_S = 0.1
GRACE_S = 120.0  # for a run to finish its step and save before it is killed
TAIL = 12  # lines kept of a failed run's output
DIVERGED = re.compile(r"stopped by health: (\w+) at step (\d+): ")
"""What a run says in the end that a watch of `health` has stopped."""
FAILURE = "failed.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """A process to run: its output goes to `log`, which is started anew."""

    name: str
    command: tuple[str, ...]
    log: Path


@dataclasses.dataclass(frozen=True)
class Done:
    """How a process ended. tail: the last lines of its output."""

    job: Job
    code: int
    seconds: float
    tail: tuple[str, ...]


def train_job(cell: Cell, output: Path) -> Job:
    """`python -m kdrl_jax.train` for a cell."""
    folder = cell.folder(output)
    command = (sys.executable, "-m", "kdrl_jax.train", f"--config={cell.config}")
    overrides = (f"--config.{item}" for item in cell.overrides)
    return Job(cell.name, (*command, f"--workdir={folder}", *overrides), folder / "log.txt")


def is_done(cell: Cell, output: Path) -> bool:
    """Whether the cell's result is final: the run finished, or it diverged, which is a result.

    Raises:
      UserError: the folder holds a run of another config.
    """
    folder = cell.folder(output)
    saved = folder / "config.json"
    if not saved.exists():
        return False
    config = cell.load()
    old = json.loads(saved.read_text(encoding="utf-8"))
    compare_for_resume(old, config, saved, option="--output")
    if old["steps"] != json.loads(to_json(config))["steps"]:
        return False
    summary = read_json(folder / "summary.json")
    if summary and summary["finished"]:
        return True
    failure = read_json(folder / FAILURE)
    return bool(failure and failure["diverged"])


def missing_cells(cells: Sequence[Cell], output: Path) -> list[Cell]:
    """The cells without a final result, in order.

    Raises:
      UserError: folders that hold runs of other configs; one line per difference.
    """
    missing, problems = [], []
    for cell in cells:
        try:
            if not is_done(cell, output):
                missing.append(cell)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return missing


def run_cells(
    grid: Grid,
    cells: Sequence[Cell],
    output: Path,
    *,
    preparation: Sequence[Job],
    done: int,
    workers: int,
    display: Display,
    job_of: Callable[[Cell, Path], Job] = train_job,
) -> None:
    """Run the cells; failures are recorded and the others go on.

    Args:
      preparation: jobs that must be finished before the cells start.
      done: how many cells there are beside these, for the display.
      workers: processes at a time.
      job_of: the command of a cell.

    Raises:
      UserError: a preparation failed.
      KeyboardInterrupt: Ctrl-C or SIGTERM, after the running cells have saved.
    """
    run = functools.partial(run_jobs, workers=workers, pin=grid.pin, environment=environment(grid))
    with stop_on_sigterm():
        with display.track("preparation", len(preparation)) as track:
            for end in run(preparation):
                if end.code:
                    raise UserError(f"{end.job.name}: exit {end.code}; {_last(end)}")
                track.advance(f"{end.job.name}  {end.seconds:.0f} s")
        by_name = {cell.name: cell for cell in cells}
        with display.track("cell", done + len(cells), done) as track:
            for end in run([job_of(cell, output) for cell in cells]):
                track.advance(_record(by_name[end.job.name], end, output))


def _record(cell: Cell, end: Done, output: Path) -> str:
    """Keep how a cell's process ended; a line about it."""
    folder = cell.folder(output)
    seconds = f"{end.seconds:.0f} s"
    if not end.code:
        (folder / FAILURE).unlink(missing_ok=True)
        summary = read_json(folder / "summary.json") or {}
        write_atomic(folder / "process.json", json.dumps({"seconds": round(end.seconds, 1)}))
        accuracy = summary.get("eval/accuracy/last")
        return f"{cell.name}  {seconds}" + (
            f"  accuracy {accuracy:.3f}" if accuracy is not None else ""
        )
    diverged = next((line for line in end.tail if DIVERGED.search(line)), None)
    failure = {
        "code": end.code,
        "diverged": diverged is not None,
        "message": diverged or _last(end),
        "tail": end.tail,
        "seconds": round(end.seconds, 1),
    }
    write_atomic(folder / FAILURE, json.dumps(failure, indent=2) + "\n")
    return f"{cell.name}  {seconds}  {'diverged' if diverged else 'FAILED'}: {failure['message']}"


def _last(end: Done) -> str:
    return end.tail[-1] if end.tail else f"no output; see {end.job.log}"


def run_jobs(
    jobs: Sequence[Job], *, workers: int, pin: bool, environment: dict[str, str]
) -> Iterator[Done]:
    """Run processes, `workers` at a time in the given order; yields each as it ends.

    An exception or the end of the loop over it stops those that run: SIGTERM, then a kill.

    Args:
      pin: give each worker an equal share of this process's cores for its own.
      environment: of the processes.
    """
    waiting = list(reversed(jobs))
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
    shares = core_shares(workers) if pin else [set()] * workers
    try:
        while waiting or running:
            for slot in range(workers):
                if slot not in running and waiting:
                    job = waiting.pop()
                    running[slot] = (job, _start(job, shares[slot], environment), time.monotonic())
            time.sleep(POLL_S)
            for slot, (job, process, begun) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    yield Done(job, process.returncode, time.monotonic() - begun, tail(job.log))
    finally:
        _stop([process for _, process, _ in running.values()])


def core_shares(workers: int) -> list[set[int]]:
    """This process's cores dealt out; fewer cores than workers are shared. Empty: no pinning."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * workers
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[slot::workers]) or {cores[slot % len(cores)]} for slot in range(workers)]


def _start(job: Job, cores: set[int], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(  # in its own session: Ctrl-C here is passed on by `_stop`
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    if cores:  # before it has started a thread: all it starts inherit this
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, cores)
    return process


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # too slow, or a second Ctrl-C
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does. Without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(grid: Grid) -> dict[str, str]:
    """The processes' variables: the grid's platform, and one thread each where they are pinned."""
    found = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if grid.platform:
        found["JAX_PLATFORMS"] = grid.platform
    if grid.pin:
        found["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        found |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Huge pages for XLA's scratch memory, where the kernel gives them on request: a third less
    # processor time for small models on a CPU.
    found.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return found


def tail(log: Path, lines: int = TAIL) -> tuple[str, ...]:
    """The last lines of a file that are not empty."""
    if not log.exists():
        return ()
    text = log.read_text(encoding="utf-8", errors="replace")
    return tuple([line for line in text.splitlines() if line.strip()][-lines:])


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
