"""Where numbers go: `metrics.jsonl` and TensorBoard; and who holds a folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from kdrl_jax.training.display import finite
from kdrl_jax.training.safety import own_folder
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.types import UserError

CLOCKED = ("time/", "tokens_per_s/", "perf/", "share/", "verifier/")
"""How metrics begin that depend on the wall clock, on the order in which slots were filled, or on
what a process remembers: the only ones in which two equal runs may differ."""


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

    def write(self, step: int, scalars: Mapping[str, float]) -> dict[str, float]:
        """Append one line and flush it to the file; returns what is in it."""
        row = {"step": step, **{k: _plain(v) for k, v in scalars.items()}}
        with self._named():
            self._file.write(json_line(row))
            self._file.flush()
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._add(Event(step=step, summary=summary.scalar(name, value)))
        return row

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


def sparkline(shares: Sequence[float], most: int = 40) -> str:
    """A learning curve in a line of text: a bar for each of `shares`, all in [0, 1].

    Of more than `most` only so many are shown, evenly spaced, the first and the last included.
    """
    bars, last, steps = "▁▂▃▄▅▆▇█", len(shares) - 1, min(most, len(shares)) - 1
    shown = [shares[last - round(i * last / steps)] for i in range(steps, 0, -1)] + [*shares[-1:]]
    return "".join(bars[min(int(share * len(bars)), len(bars) - 1)] for share in shown)


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
