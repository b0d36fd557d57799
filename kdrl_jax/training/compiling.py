"""XLA's compilations as they happen: which program is being compiled, how many have been.

JAX tells its monitors with a scalar when a compilation begins, with a duration when it has ended;
a program that comes out of the persistent cache is one as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import jax

_COMPILE = "/jax/core/compile/backend_compile_duration"
PATIENCE_S = 5.0
"""A compilation that lasts longer is told of."""


class Compilations:
    """Those of this process, from the first import on.

    Attributes:
      running: name of a program and since when (`time.monotonic`); None: nothing is compiled.
      count: compilations that have ended.
      seconds: what they have taken.
      begins: told of each that begins, at once.
      lasts: told (name, seconds, done) of one that lasts, and of its end.
    """

    def __init__(self) -> None:
        self.running: tuple[str, float] | None = None
        self.count, self.seconds = 0, 0.0
        self.begins: Callable[[], None] = lambda: None
        self.lasts: Callable[[str, float, bool], None] = lambda name, seconds, done: None
        self._timer: threading.Timer | None = None
        jax.monitoring.register_scalar_listener(self._begun)
        jax.monitoring.register_event_duration_secs_listener(self._ended)

    def _begun(self, event: str, value: float, **more: str | int) -> None:
        if event != _COMPILE:
            return
        if self._timer:
            self._timer.cancel()
        name = str(more.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
        self.running = name.strip("_"), time.monotonic()
        self._timer = threading.Timer(PATIENCE_S, self._still, [self.running])
        self._timer.daemon = True
        self._timer.start()
        self.begins()

    def _ended(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event != _COMPILE:
            return
        if self._timer:
            self._timer.cancel()
        before, self.running, self._timer = self.running, None, None
        self.count += 1
        self.seconds += duration_secs
        if before and duration_secs > PATIENCE_S:
            self.lasts(before[0], duration_secs, True)

    def _still(self, running: tuple[str, float]) -> None:
        if self.running is running:
            self.lasts(running[0], PATIENCE_S, False)


COMPILING = Compilations()
"""Of this process."""


class CompileCounter:
    """Counts the compilations of this process from its creation on."""

    def __init__(self) -> None:
        self._count, self._seconds = COMPILING.count, COMPILING.seconds

    @property
    def count(self) -> int:
        return COMPILING.count - self._count

    @property
    def seconds(self) -> float:
        return COMPILING.seconds - self._seconds
