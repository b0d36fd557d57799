"""Grading in worker processes that can be killed.

math-verify runs SymPy on what a model wrote, which can hang, exhaust memory or crash; a task's own
verifier is the user's code, which may do the same. Each worker
is a fresh interpreter (never a fork of this one, which holds JAX's threads) running `worker.py`.
One that exceeds the time limit is killed and replaced; no other task notices.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from kdrl_jax.rewards.format import final_answer
from kdrl_jax.rewards.math_answer import MAX_LENGTH, clean, quick_verdict
from kdrl_jax.types import Outcome, UserError, Verdict

STARTUP_S = 120.0  # imports on a busy machine with a cold disk
START_ATTEMPTS = 3
ATTEMPTS = 2  # of a comparison whose worker died: once may be bad luck
WORKER_TASKS = 2000  # comparisons after which a worker is replaced: SymPy's caches only grow
REMEMBERED = 10_000  # verdicts of earlier comparisons

# One hash seed: SymPy's order of terms, and so a verdict, does not vary between runs. A task's
# module may import JAX, but no worker takes a share of the accelerators.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "SYMPY_GROUND_TYPES": "python", "JAX_PLATFORMS": "cpu"}

Pair = tuple[str, ...]
"""What a worker is asked: the gold answer, the answer and, for a task's verifier, meta as JSON."""

Verifier = Callable[[str, str, dict[str, Any]], bool]
"""(answer from the box, gold answer, the problem's meta) -> whether the answer is right."""


class Grader:
    """Grades responses; a context manager that owns up to `workers` processes.

    Processes start when the first answer needs one: equal strings, words and plain numbers are
    decided here. They are ended by `close`, at the end of the `with` block, or with the program.
    """

    def __init__(
        self,
        workers: int = 4,
        timeout_s: float = 3.0,
        require_format: bool = True,
        verify: Verifier | str | None = None,
    ):
        """
        Args:
          workers: most processes at a time, 1 or more.
          timeout_s: wall-clock seconds for one comparison, not counting a worker's start.
          require_format: a response that lacks the format (`has_format`) is not graded further.
          verify: judges the answer in the box. None: mathematical equivalence. A function: called
            in this process, so it must be quick whatever it is given. 'module:attribute': imported
            and called in the worker processes, with their time limit; they find the module on
            this process's `sys.path`.

        Raises:
          ValueError: a number out of range.
        """
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"need workers >= 1 and timeout_s > 0, not {workers} and {timeout_s}")
        self.workers, self.timeout_s, self.require_format = workers, timeout_s, require_format
        self.verify = verify
        self._command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        self._command.append(str(timeout_s))
        if isinstance(verify, str):
            self._command += [verify, json.dumps([os.path.abspath(folder) for folder in sys.path])]
        self._pool: list[_Worker] = []
        self._known: collections.OrderedDict[Pair, Outcome] = collections.OrderedDict()
        self._failed_starts = 0
        self._warned = False
        self._lock = threading.Lock()
        self._background: ThreadPoolExecutor | None = None
        self._finalizer = weakref.finalize(self, _kill, self._pool)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Grading again would start new ones."""
        if self._background:
            self._background.shutdown(cancel_futures=True)
            self._background = None
        with self._lock:
            _kill(self._pool)

    def grade(
        self,
        responses: Sequence[str],
        answers: Sequence[str],
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> list[Verdict]:
        """One verdict for each response, in order.

        Args:
          responses: completions without the end token.
          answers: the gold answer of each; LaTeX without dollar signs, or plain text.
          metas: the `meta` of each problem, for a `verify` that looks at it; default {}.

        Returns:
          Verdicts with reward 1 for "correct" and 0 for "wrong", "unparsable" (empty, unreadable,
          too large to evaluate, a crash, or an exception in 'module:attribute'), "timeout", and
          "format" (only if it is required).

        Raises:
          ValueError: the lengths differ.
          UserError: a meta that is not JSON, where a worker needs it.
          RuntimeError: workers do not start; the message ends with what they wrote.
        """
        metas = [{}] * len(answers) if metas is None else metas
        if not len(responses) == len(answers) == len(metas):
            counts = f"{len(responses)} responses but {len(answers)} answers and {len(metas)} metas"
            raise ValueError(counts)
        outcomes: list[Outcome | None] = []
        pairs: dict[int, Pair] = {}
        for i, (response, gold, meta) in enumerate(zip(responses, answers, metas, strict=True)):
            if self.verify is None:
                outcome, pair = _decide(response, gold, self.require_format)
            else:
                outcome, pair = _ask(self.verify, response, gold, meta, self.require_format)
            outcomes.append(outcome)
            if outcome is None:
                pairs[i] = pair
        if pairs:
            with self._lock:
                verified = self._verify(dict.fromkeys(pairs.values()))
            for i, pair in pairs.items():
                outcomes[i] = verified[pair]
        return [_verdict(outcome) for outcome in outcomes if outcome is not None]

    def submit(
        self,
        responses: Sequence[str],
        answers: Sequence[str],
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> Future[list[Verdict]]:
        """`grade` beside whatever the caller does meanwhile; in the order of the calls."""
        if self._background is None:
            self._background = ThreadPoolExecutor(1, "grader")
        return self._background.submit(self.grade, responses, answers, metas)

    def _verify(self, pairs: Iterable[Pair]) -> dict[Pair, Outcome]:
        """Outcomes of different pairs by worker processes."""
        done: dict[Pair, Outcome] = {}
        todo: collections.deque[_Task] = collections.deque()
        for pair in pairs:
            if pair in self._known:
                done[pair] = self._known[pair]
                self._known.move_to_end(pair)
            else:
                todo.append(_Task(pair))
        try:
            while todo or any(worker.task for worker in self._pool):
                self._assign(todo)
                for task, outcome in self._collect(todo):
                    done[task.pair] = outcome
                    if outcome != "timeout":  # the machine may have been busy: try again next time
                        self._known[task.pair] = outcome
        except BaseException:
            _kill(self._pool)  # replies still under way must not meet the next call
            raise
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return done

    def _assign(self, todo: collections.deque[_Task]) -> None:
        """Give waiting tasks to idle workers, starting workers as far as they are needed."""
        for worker in [w for w in self._pool if not w.task and w.tasks_done >= WORKER_TASKS]:
            self._drop(worker)
        idle = [worker for worker in self._pool if worker.ready and not worker.task]
        for worker in idle:
            if todo:
                task = todo.popleft()
                if not worker.send(task, self.timeout_s):
                    todo.appendleft(task)
                    self._drop(worker)
        starting = sum(not worker.ready for worker in self._pool)
        while starting < len(todo) and len(self._pool) < self.workers:
            self._pool.append(_Worker(self._command))
            starting += 1

    def _collect(self, todo: collections.deque[_Task]) -> list[tuple[_Task, Outcome]]:
        """Wait for the next event; finished tasks. Crashed ones go back to the queue once."""
        finished: list[tuple[_Task, Outcome]] = []
        watched = [worker for worker in self._pool if worker.task or not worker.ready]
        if not watched:
            return finished
        with selectors.DefaultSelector() as selector:
            for worker in watched:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            now = time.monotonic()
            wait = max(0.0, min(worker.deadline for worker in watched) - now)
            events = selector.select(wait)
        for key, _ in events:
            worker = key.data
            message, alive = worker.receive()
            if message is not None and not worker.ready:
                worker.ready, worker.hello, worker.deadline = True, message, float("inf")
                self._failed_starts = 0
            elif message is not None and worker.task:
                outcome, _, error = message.partition(": ")
                if error and not self._warned:
                    self._warned = True
                    warnings.warn(f"{self.verify} raised {error}", RuntimeWarning, stacklevel=2)
                finished.append((worker.task, outcome))
                worker.task, worker.deadline = None, float("inf")
                worker.tasks_done += 1
            elif not alive and worker.ready:
                task = worker.task
                self._drop(worker)
                if task and task.attempts < ATTEMPTS:
                    todo.append(task)
                elif task:
                    finished.append((task, "unparsable"))
            elif not alive:
                self._start_failed(worker, "ended")
        now = time.monotonic()
        for worker in [w for w in self._pool if w.deadline <= now]:
            if worker.ready and worker.task:
                finished.append((worker.task, "timeout"))
                self._drop(worker)
            else:
                self._start_failed(worker, f"was not ready after {STARTUP_S:.0f} s")
        return finished

    def _start_failed(self, worker: _Worker, what: str) -> None:
        self._failed_starts += 1
        said = worker.said()
        self._drop(worker)
        if self._failed_starts >= START_ATTEMPTS:
            self._failed_starts = 0
            needed = self.verify if isinstance(self.verify, str) else "math-verify"
            raise RuntimeError(
                f"a verification process {what} before its first task; can {sys.executable} "
                f"import {needed}? It wrote:\n{said}"
            )

    def _drop(self, worker: _Worker) -> None:
        self._pool.remove(worker)
        worker.kill()


@dataclasses.dataclass
class _Task:
    pair: Pair
    attempts: int = 0


class _Worker:
    """One process: starting (not ready), idle (ready, no task) or busy (task, deadline)."""

    def __init__(self, command: list[str]):
        self.ready = False
        self.hello: Any = None
        self.task: _Task | None = None
        self.tasks_done = 0
        self.deadline = time.monotonic() + STARTUP_S
        self._buffer = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        # An own session: Ctrl-C in the terminal is for the trainer, which ends its workers itself.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT},
        )

    @property
    def replies(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def send(self, task: _Task, timeout_s: float) -> bool:
        """Hand over a task; False if the process is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task.pair).encode() + b"\n")
        except OSError:
            return False
        task.attempts += 1
        self.task, self.deadline = task, time.monotonic() + timeout_s
        return True

    def receive(self) -> tuple[Any, bool]:
        """The next whole message, or None, and whether the process still writes."""
        data = os.read(self.replies.fileno(), 1 << 16)
        self._buffer += data
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None, bool(data)
        self._buffer = rest
        return json.loads(line), True

    def said(self) -> str:
        """The end of what the process wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()[-2000:].decode(errors="replace").strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream and stream.close()


def _kill(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().kill()


def _decide(response: str, gold: str, require_format: bool) -> tuple[Outcome | None, Pair]:
    """The outcome as far as it needs no worker, else None and what to compare."""
    boxed = final_answer(response, require_format=require_format)
    if boxed is None and require_format:
        return "format", ("", "")
    answer = clean(boxed or "")
    if not answer:
        return "unparsable", ("", "")
    gold = clean(gold)
    equal = quick_verdict(gold, answer)
    if equal is None:
        return None, (gold, answer)
    if not equal and len(answer) > MAX_LENGTH:
        return "unparsable", ("", "")
    return "correct" if equal else "wrong", ("", "")


def _ask(
    verify: Verifier | str, response: str, gold: str, meta: dict[str, Any], require_format: bool
) -> tuple[Outcome | None, Pair]:
    """The outcome by a task's verifier, or None and what to ask it in a worker."""
    answer = final_answer(response, require_format=require_format)
    if answer is None and require_format:
        return "format", ()
    if not answer:
        return "unparsable", ()
    if not isinstance(verify, str):
        return "correct" if verify(answer, gold, meta) else "wrong", ()
    try:
        return None, (gold, answer, json.dumps(meta, sort_keys=True))
    except TypeError as error:
        raise UserError(f"{verify}: the meta of a problem is not JSON: {error}") from error


def _verdict(outcome: Outcome) -> Verdict:
    return Verdict(1.0 if outcome == "correct" else 0.0, outcome)


@functools.cache
def _shared_grader() -> Grader:
    return Grader(workers=1)  # closes with the program


def grade(response: str, answer: str, *, require_format: bool = True) -> Verdict:
    r"""The verdict on one response; `Grader.grade` is the way to grade many.

    Bounded in time whatever the response (`\boxed{9^{9^{9}}}`): what needs computer algebra runs
    in one shared worker process with a limit of 3 seconds, started at the first need (about a
    second) and ended with the program.

    Args:
      response: a completion without the end token.
      answer: the gold answer; LaTeX without dollar signs, or plain text.
      require_format: grade only a response that has the format (`has_format`), after whose
        `</think>` the answer is looked for. False: the last box, wherever it is.

    Returns:
      Verdict with reward 1 for "correct", else 0; see `Grader.grade` for the outcomes.
    """
    outcome, pair = _decide(response, answer, require_format)
    if outcome is None:
        grader = _shared_grader()
        with grader._lock:
            outcome = grader._verify([pair])[pair]
    return _verdict(outcome)
