"""Worker processes: started, fed, timed, distrusted and replaced.

A worker answers one request at a time. What it writes is data of a process that ran a model's
text: anything but one known outcome for one request gets it killed, never an exception here.
Neither writing to a worker nor reading from it can block this process.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import IO, Any

from kdrl_jax.types import Outcome

STARTUP_S = 120.0  # imports on a busy machine with a cold disk
START_ATTEMPTS = 3  # while none has ever started: something is not installed
LATER_ATTEMPTS = 8  # once one has: memory or process ids may be short for a minute
BACK_OFF_S = 0.5  # doubles with each failure after the first good start
ATTEMPTS = 2  # of a request whose worker died: once may be bad luck
WORKER_TASKS = 2000  # requests after which a worker is replaced: SymPy's caches only grow
LONGEST_REPLY = 1 << 16
GLANCE_S = 0.25  # how often a wait looks whether the grader is being closed

# One hash seed: SymPy's order of terms, and so a verdict, does not vary between runs. A task's
# module may import JAX, but no worker takes a share of the accelerators.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "SYMPY_GROUND_TYPES": "python", "JAX_PLATFORMS": "cpu"}
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
"""In the names of variables that a worker is not told, unless it runs a task's own verifier."""

Request = tuple[str, ...]
"""What a worker is asked: the gold answer, the answer and, for a task's verifier, meta as JSON."""

REPLIES: dict[str, Outcome] = {o: o for o in ("correct", "wrong", "unparsable")}


@dataclasses.dataclass
class Counts:
    """What the workers did since the last `take`; seconds are wall time from hand-over to verdict.

    Attributes:
      asked: requests answered, however that ended.
      timeouts: of these, by the deadline.
      crashes: workers that died, or wrote what they should not, over a request.
      restarts: workers started in place of one that was killed or had died.
    """

    asked: int = 0
    timeouts: int = 0
    crashes: int = 0
    restarts: int = 0
    seconds: float = 0.0
    seconds_max: float = 0.0


def worker_command(timeout_s: float, own: tuple[str, Sequence[str]] | None = None) -> list[str]:
    """How a worker is started.

    Args:
      timeout_s: most seconds of CPU time for a request.
      own: functions of the user's own: 'verify', 'answer' or 'reward', and their names; None:
        mathematics.
    """
    command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(timeout_s)]
    if own:
        folders = [os.path.abspath(folder) for folder in sys.path]
        command += [own[0], json.dumps(own[1]), json.dumps(folders)]
    return command


class Supervisor:
    """Up to `count` workers that run `command`; one thread at a time may `ask`.

    Attributes:
      timed_out, crashed: the reply to a request that ended so; with `understand` they say what a
        subclass asks its workers for. Here that is an `Outcome`.
    """

    timed_out: Any = "timeout"
    crashed: Any = "unparsable"

    def __init__(
        self, command: list[str], count: int, timeout_s: float, needs: str, *, secrets: bool = True
    ):
        """
        Args:
          needs: what a worker imports, for the error if none starts.
          secrets: whether workers inherit variables that are named like one.
        """
        self.command, self.count, self.timeout_s, self.needs = command, count, timeout_s, needs
        told = {k: v for k, v in os.environ.items() if secrets or not SECRET.search(k)}
        self._environment = told | ENVIRONMENT
        self.workers: list[Worker] = []
        self.counts = Counts()
        self._stopping = threading.Event()
        self._failed_starts = 0
        self._start_after = 0.0
        self._ever_ready = False
        self._to_replace = 0
        self._warned = False

    def stop(self) -> None:
        """Have `ask`, in whatever thread, end at once with CancelledError, until `resume`."""
        self._stopping.set()

    def resume(self) -> None:
        """Allow `ask` again."""
        self._stopping.clear()

    def ask(self, requests: Iterable[Request]) -> dict[Request, Any]:
        """The reply to each of these different requests.

        Raises:
          RuntimeError: workers do not start; the message ends with what they wrote.
          CancelledError: `stop` was called.
        """
        todo = collections.deque(Task(request) for request in requests)
        done: dict[Request, Any] = {}
        try:
            while todo or any(worker.task for worker in self.workers):
                if self._stopping.is_set():
                    raise CancelledError("the grader is being closed")
                self._assign(todo)
                for task, reply in self._collect(todo):
                    done[task.request] = reply
        except BaseException:
            kill_all(self.workers)  # replies still under way must not meet the next call
            raise
        return done

    def _assign(self, todo: collections.deque[Task]) -> None:
        """Give waiting tasks to idle workers, starting workers as far as they are needed."""
        for worker in [w for w in self.workers if w.ready and not w.task]:
            if worker.tasks_done >= WORKER_TASKS or worker.has_something_to_read():
                self._drop(worker)  # it is old, or it speaks without having been asked
        idle = [worker for worker in self.workers if worker.ready and not worker.task]
        for worker, task in zip(idle, list(todo), strict=False):
            todo.popleft()
            worker.begin(task, self.timeout_s)
        starting = sum(not worker.ready for worker in self.workers)
        while starting < len(todo) and len(self.workers) < self.count:
            if time.monotonic() < self._start_after:
                break
            try:
                self.workers.append(Worker(self.command, self._environment))
            except OSError as error:  # no process ids or memory left on the machine
                self._start_failed(None, f"could not be started ({error})")
                break
            self.counts.restarts += self._to_replace > 0
            self._to_replace = max(0, self._to_replace - 1)
            starting += 1

    def _collect(self, todo: collections.deque[Task]) -> list[tuple[Task, Any]]:
        """Wait for the next event; finished tasks. Crashed ones go back to the queue once."""
        finished: list[tuple[Task, Any]] = []
        for worker in self._wait():
            if not worker.ready:
                self._greet(worker)
                continue
            task, (message, alive) = worker.task, worker.receive()
            assert task is not None
            if message is None and alive:
                continue
            reply = self._read_reply(message) if alive else None
            if reply is not None and not worker.buffer:
                finished.append((task, self._booked(worker, reply)))
                worker.end()
            elif not alive and task.attempts < ATTEMPTS:
                self.counts.crashes += 1
                todo.append(task)
                self._drop(worker)
            else:  # it crashes workers, or made one write what no worker writes
                self.counts.crashes += 1
                finished.append((task, self._booked(worker, self.crashed)))
                self._drop(worker)
        now = time.monotonic()
        for worker in [w for w in self.workers if w.deadline <= now]:
            if worker.ready and worker.task:
                self.counts.timeouts += 1
                finished.append((worker.task, self._booked(worker, self.timed_out)))
                self._drop(worker)
            else:
                self._start_failed(worker, f"was not ready after {STARTUP_S:.0f} s")
        return finished

    def _wait(self) -> Sequence[Worker]:
        """Workers that have something to say, within a moment; writes what they have room for."""
        watched = [worker for worker in self.workers if worker.task or not worker.ready]
        if not watched:
            time.sleep(max(0.0, min(GLANCE_S, self._start_after - time.monotonic())))
            return []
        with selectors.DefaultSelector() as selector:
            for worker in watched:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.requests, selectors.EVENT_WRITE, worker)
            until = min(worker.deadline for worker in watched) - time.monotonic()
            events = selector.select(max(0.0, min(until, GLANCE_S)))
        for key, mask in events:
            if mask & selectors.EVENT_WRITE:
                key.data.write()
        return [key.data for key, mask in events if mask & selectors.EVENT_READ]

    def _greet(self, worker: Worker) -> None:
        message, alive = worker.receive()
        if not alive:
            self._start_failed(worker, "ended")
        elif message is not None:
            try:
                worker.hello = json.loads(message)
            except ValueError:
                self._start_failed(worker, "wrote something else than its greeting")
                return
            worker.ready, worker.deadline = True, float("inf")
            self._failed_starts, self._ever_ready = 0, True

    def _read_reply(self, line: bytes | None) -> Any:
        """What a line states; None if it states nothing."""
        try:
            reply = json.loads(line or b"")
        except (ValueError, RecursionError):
            return None
        return self.understand(reply)

    def understand(self, reply: Any) -> Any:
        """What a worker's JSON says; None: no worker writes that."""
        if not isinstance(reply, str):
            return None
        name, _, error = reply.partition(": ")
        if error and name in REPLIES and not self._warned:
            self._warned = True
            warnings.warn(f"{self.needs} raised {error}", RuntimeWarning, stacklevel=2)
        return REPLIES.get(name)

    def _booked(self, worker: Worker, reply: Any) -> Any:
        seconds = time.monotonic() - worker.began
        self.counts.asked += 1
        self.counts.seconds += seconds
        self.counts.seconds_max = max(self.counts.seconds_max, seconds)
        return reply

    def _start_failed(self, worker: Worker | None, what: str) -> None:
        """Try again at once, or later where it has worked before; in the end that is an error."""
        self._failed_starts += 1
        said = ""
        if worker:
            said = worker.said()
            self._drop(worker)
        if self._ever_ready:
            self._start_after = time.monotonic() + BACK_OFF_S * 2 ** (self._failed_starts - 1)
        if any(other.ready for other in self.workers):
            self._failed_starts = min(self._failed_starts, LATER_ATTEMPTS - 1)
            return  # the others go on
        if self._failed_starts >= (LATER_ATTEMPTS if self._ever_ready else START_ATTEMPTS):
            self._failed_starts = 0
            raise RuntimeError(
                f"a worker process {what} before its first task; can {sys.executable} "
                f"import {self.needs}? It wrote:\n{said}"
            )

    def _drop(self, worker: Worker) -> None:
        self._to_replace += worker.ready
        self.workers.remove(worker)
        worker.kill()


@dataclasses.dataclass
class Task:
    """A request and how often a worker was given it."""

    request: Request
    attempts: int = 0


class Worker:
    """One process: starting (not ready), idle (ready, no task) or busy (task, deadline)."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.ready = False
        self.hello: Any = None
        self.task: Task | None = None
        self.tasks_done = 0
        self.began = time.monotonic()
        self.deadline = self.began + STARTUP_S
        self.buffer, self.unsent = b"", memoryview(b"")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        # An own session: Ctrl-C in the terminal is for the trainer, which ends its workers itself.
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                start_new_session=True,
                env=environment,
            )
        except OSError:
            self._errors.close()
            raise
        for pipe in (self.requests, self.replies):
            os.set_blocking(pipe.fileno(), False)

    @property
    def requests(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def replies(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def begin(self, task: Task, timeout_s: float) -> None:
        """Hand over a task. The clock runs from here, while the pipe takes the request too."""
        task.attempts += 1
        self.task, self.began = task, time.monotonic()
        self.deadline = self.began + timeout_s
        self.unsent = memoryview(json.dumps(task.request).encode() + b"\n")
        self.write()

    def end(self) -> None:
        """The task is done."""
        self.task, self.deadline = None, float("inf")
        self.tasks_done += 1

    def write(self) -> None:
        """As much of the request as the pipe takes; a process that is gone will say so itself."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.unsent:
                self.unsent = self.unsent[os.write(self.requests.fileno(), self.unsent) :]
            return
        if self.process.poll() is not None:
            self.unsent = memoryview(b"")

    def receive(self) -> tuple[bytes | None, bool]:
        """The next line, whole or too long for a reply, or None; and whether it still writes."""
        try:
            data = os.read(self.replies.fileno(), LONGEST_REPLY)
        except BlockingIOError:
            return None, True
        self.buffer += data
        line, newline, rest = self.buffer.partition(b"\n")
        if not newline and len(self.buffer) <= LONGEST_REPLY:
            return None, bool(data)
        self.buffer = rest
        return line, True

    def has_something_to_read(self) -> bool:
        """Whether it wrote more than it was asked for, or has ended."""
        if self.buffer:
            return True
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            return bool(selector.select(0))

    def said(self) -> str:
        """The end of what the process wrote to stderr."""
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        return self._errors.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """End the process and forget its pipes."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream and stream.close()


def kill_all(workers: list[Worker]) -> None:
    """End these processes and empty the list."""
    while workers:
        workers.pop().kill()
