"""Being told to stop: at once while there is nothing to save, later after the step."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from kdrl_jax import processes

EXIT_STOPPED = 75
"""EX_TEMPFAIL: stopped before it was done; the same command goes on."""
EXIT_INTERRUPTED = 130
"""Ended by Ctrl-C."""
SHOW_CURSOR = b"\x1b[?25h"
GRACE_S = 5.0
"""How long the main thread has to end by itself, seconds: a library may not let it."""


class EndAtOnce:
    """Ends the command on SIGTERM or Ctrl-C, as long as no step has been made worth saving.

    The main thread gets a SystemExit or KeyboardInterrupt. Python's handlers wait while a library
    reads files or computes, so after GRACE_S another thread ends the process. Outside the main
    thread, where no handler can be set, this does nothing.

    Attributes:
      heard: called by that thread with each signal once a step has been made; whether the process
        is to end after GRACE_S all the same.
    """

    current: ClassVar[EndAtOnce | None] = None

    def __init__(self) -> None:
        self._over, self._left = threading.Event(), threading.Event()
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self.heard: Callable[[int], bool] = lambda number: False

    def __enter__(self) -> EndAtOnce:
        try:
            self._before: Any = signal.signal(signal.SIGTERM, lambda *_: self.end())
        except ValueError:
            return self
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
        self._ends[0].setblocking(True)
        threading.Thread(target=self._watch, daemon=True).start()
        EndAtOnce.current = self
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._left.set()
        if self._ends:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._before)
            self._ends[1].close()  # which ends the thread
            EndAtOnce.current = None

    @property
    def over(self) -> bool:
        """Whether a step has been made."""
        return self._over.is_set()

    def step_made(self) -> None:
        """From here on a signal is the run's: it saves first."""
        self._over.set()

    def end(self) -> None:
        """Leave.

        Raises:
          SystemExit: with EXIT_STOPPED.
        """
        os.write(2, b"stopped before a step was made; run the same command again\n")
        raise SystemExit(EXIT_STOPPED)

    def left(self) -> None:
        """The main thread has been interrupted, and is closing what is open."""
        self._left.set()

    def _watch(self) -> None:
        assert self._ends
        with self._ends[0] as end:
            while signals := end.recv(64):
                for number in signals:
                    if number not in (signal.SIGTERM, signal.SIGINT):
                        continue
                    if not self._over.is_set():
                        if not self._over.wait(GRACE_S):
                            _exit(number)
                        return
                    if self.heard(number) and not self._left.wait(GRACE_S):
                        _exit(number)


def _exit(number: int) -> None:
    """End the process while its main thread can not."""
    for stream in (1, 2):
        if os.isatty(stream):
            os.write(stream, SHOW_CURSOR)  # which a live display hides
    if number == signal.SIGINT:
        os.write(2, b"interrupted; run the same command again\n")
    os._exit(EXIT_STOPPED if number == signal.SIGTERM else EXIT_INTERRUPTED)


class StopRequest:
    """True after SIGTERM or the first Ctrl-C: finish the step, save, and leave.

    A second Ctrl-C interrupts at once, and so do both within EndAtOnce before a step was made.
    Handlers are put back on exit; outside the main thread, where none can be set, it stays False.
    Of several processes all stop after the same step, whichever was told to: after the next
    `agree`.

    Args:
      told: called within EndAtOnce by another thread, at once, with the first signal.
    """

    def __init__(self, told: Callable[[int], Any] = lambda number: None) -> None:
        self.signal: int | None = None
        self._told, self._heard = told, 0
        self.unhealthy = False
        """All processes see the same numbers, so all set it after the same step."""
        self._agreed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
            if EndAtOnce.current:
                EndAtOnce.current.heard = self._hear
        except ValueError:
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        now = EndAtOnce.current
        if now and not now.over and number == signal.SIGTERM:
            now.end()
        again = self.signal is not None or (now and not now.over)
        if again and number == signal.SIGINT:
            if now:
                now.left()
            raise KeyboardInterrupt
        self.signal = number

    def _hear(self, number: int) -> bool:
        self._heard += 1
        if self._heard == 1:
            self._told(number)
        return self._heard > 1 and number == signal.SIGINT

    def step_made(self) -> None:
        """There is something to save from here on."""
        if EndAtOnce.current:
            EndAtOnce.current.step_made()

    def agree(self) -> None:
        """Ask the other processes. All of them must call."""
        self._agreed = processes.any_of(self.signal is not None)

    def __bool__(self) -> bool:
        alone = processes.count() == 1
        return self.unhealthy or self._agreed or (alone and self.signal is not None)
