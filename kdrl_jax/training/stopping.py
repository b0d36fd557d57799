"""Being told to stop: at once while there is nothing to save, later after the step."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Any, ClassVar

from kdrl_jax import processes

EXIT_STOPPED = 75
"""EX_TEMPFAIL: stopped before it was done; the same command goes on."""
GRACE_S = 5.0
"""How long the main thread has to end by itself, seconds: it may be compiling."""


class EndAtOnce:
    """Ends the command on SIGTERM, as long as no step has been made that is worth saving.

    The main thread gets a SystemExit. Python's handlers wait while it compiles or reads files, so
    after GRACE_S another thread ends the process. Outside the main thread, where no handler can be
    set, this does nothing.
    """

    current: ClassVar[EndAtOnce | None] = None

    def __init__(self) -> None:
        self._over = threading.Event()
        self._ends: tuple[socket.socket, socket.socket] | None = None

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

    def _watch(self) -> None:
        assert self._ends
        with self._ends[0] as end:
            while signals := end.recv(64):
                if signal.SIGTERM in signals and not self._over.is_set():
                    if not self._over.wait(GRACE_S):
                        os._exit(EXIT_STOPPED)
                    return


class StopRequest:
    """True after SIGTERM or the first Ctrl-C: finish the step, save, and leave.

    A second Ctrl-C interrupts at once, and so does SIGTERM within EndAtOnce. Handlers are put back
    on exit; outside the main thread, where none can be set, it stays False. Of several processes
    all stop after the same step, whichever was told to: after the next `agree`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.unhealthy = False
        """All processes see the same numbers, so all set it after the same step."""
        self._agreed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
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
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

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
