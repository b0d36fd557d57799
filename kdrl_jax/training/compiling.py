"""XLA's compilations as they happen: which program is being compiled, how many were.

JAX tells its monitors when something has ended. The lowering of a program ends where its
compilation begins, so between these two a program of that name is being compiled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import jax

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"
PATIENCE_S = 5.0
"""A compilation that lasts longer is told of."""


class CompileCounter:
    """Counts XLA compilations of this process from its creation on."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            self.count += 1
            self.seconds += duration_secs


class _Compiling:
    """What this process compiles now.

    Attributes:
      running: name of a program and since when (`time.monotonic`); None: nothing is compiled.
      seconds: what compilations have taken so far.
      listener: told (name, seconds, done) of a compilation that lasts, and of its end.
    """

    def __init__(self) -> None:
        self.running: tuple[str, float] | None = None
        self.seconds = 0.0
        self.listener: Callable[[str, float, bool], None] = lambda name, seconds, done: None
        self._timer: threading.Timer | None = None
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **more: str | int) -> None:
        if event not in (_LOWERED, _COMPILED):
            return
        if self._timer:
            self._timer.cancel()
        before, self.running, self._timer = self.running, None, None
        if event == _COMPILED:
            self.seconds += duration_secs
            if before and duration_secs > PATIENCE_S:
                self.listener(before[0], duration_secs, True)
            return
        name = str(more.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
        self.running = name.strip("_"), time.monotonic()
        self._timer = threading.Timer(PATIENCE_S, self._lasts, [self.running])
        self._timer.daemon = True
        self._timer.start()

    def _lasts(self, running: tuple[str, float]) -> None:
        if self.running is running:
            self.listener(running[0], PATIENCE_S, False)


COMPILING = _Compiling()
"""Of this process; listens from the first import on."""
