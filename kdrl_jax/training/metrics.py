"""Where numbers go: `metrics.jsonl`, TensorBoard, the terminal; and a count of compilations."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from kdrl_jax.training.safety import own_folder
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.types import UserError

CLOCKED = ("time/", "tokens_per_s/", "perf/", "share/", "verifier/")
"""How metrics begin that depend on the wall clock, on the order in which slots were filled, or on
what a process remembers: the only ones in which two equal runs may differ."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts XLA compilations of this process from its creation on."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs


class MetricsWriter:
    """One JSON object a line in `workdir/metrics.jsonl`, and the same scalars for TensorBoard.

    Opening it drops every line after `resume_step` and any torn last line, so that a resumed run
    leaves the file an uninterrupted one would have left.
    """

    def __init__(self, workdir: Path, resume_step: int | None):
        self.path = workdir / "metrics.jsonl"
        kept = [] if resume_step is None else read_metrics(self.path, up_to=resume_step)
        write_atomic(self.path, "".join(json_line(row) for row in kept))
        self._file = self.path.open("a", encoding="utf-8")
        # Written by this thread: tensorboardX's own waits for ever once its disk is full.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(workdir / "tensorboard" / "events"))
        if resume_step is not None:
            begins = SessionLog(status=SessionLog.START)
            self._add(Event(step=resume_step + 1, session_log=begins))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line and flush it to the file."""
        row = {"step": step, **{k: _plain(v) for k, v in scalars.items()}}
        with self._named():
            self._file.write(json_line(row))
            self._file.flush()
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._add(Event(step=step, summary=summary.scalar(name, value)))

    def sync(self) -> None:
        """Have what was written outlast a loss of power."""
        with self._named():
            os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close both files."""
        with self._named():
            self._file.close()
        self._board.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._board.write_event(event)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with None for numbers that JSON has not: NaN and the infinities."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def json_line(row: Mapping[str, Any]) -> str:
    """A line of a metrics file; see `finite`."""
    return json.dumps(finite(row), allow_nan=False) + "\n"


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics file; torn lines, others' bytes and rows after `up_to` are left out.

    A number that was not finite, null in the file, is NaN.
    """
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:  # UnicodeDecodeError is one
                continue
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                continue
            if up_to is None or row["step"] <= up_to:
                rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


_LOCKS: dict[Path, TextIO] = {}


def lock_folder(folder: Path) -> None:
    """Make `folder` and hold it for this process, until `unlock_folder` or the process ends.

    Raises:
      UserError: another process holds it, or anybody may write in it.
    """
    own_folder(folder, "--workdir or --output")
    if folder.resolve() in _LOCKS:  # left by an attempt that failed in this process
        return
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"{folder}: in use by another process; wait for it or give another folder"
        ) from error
    _LOCKS[folder.resolve()] = file


def unlock_folder(folder: Path) -> None:
    """Let other processes have `folder`."""
    if file := _LOCKS.pop(folder.resolve(), None):
        file.close()


def _plain(value: Any) -> float | int:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


class Display:
    """Progress for a person: a live bar on a terminal, one line per report elsewhere."""

    def __init__(self, quiet: bool = False):
        self.console = Console(file=sys.stdout, highlight=False, quiet=quiet, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line of plain text."""
        self.console.print(text, markup=False)

    def track(self, title: str, total: int, start: int = 0) -> Track:
        """A bar of `total` steps, `start` of them done; close it before opening another."""
        return Track(self.console, title, total, start)


class Track:
    """One phase of known length. `advance` reports a step with a short text beside it."""

    def __init__(self, console: Console, title: str, total: int, start: int):
        self._console, self._title, self._total, self._done = console, title, total, start
        self._begun, self._first = time.monotonic(), start
        self._printed = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
                transient=False,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, text="")
            self._bar.start()

    def advance(self, text: str = "", steps: int = 1, every_s: float = 0.0) -> None:
        """Report `steps` more; without a terminal a line at most each `every_s` seconds."""
        self._done += steps
        if self._bar:
            self._bar.update(self._task, completed=self._done, text=text)
            return
        now = time.monotonic()
        if self._done == self._total or now - self._printed >= every_s:
            pace = (now - self._begun) / max(self._done - self._first, 1)
            left = datetime.timedelta(seconds=round(pace * (self._total - self._done)))
            self._console.print(
                f"{self._title} {self._done}/{self._total}  {text}  ETA {left}", markup=False
            )
            self._printed = now

    def close(self) -> None:
        """Stop the bar, which stays on the screen."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Track:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
