"""Programs that tests start: the machine they see, and waiting for them.

A deadline guards against hanging alone: no load may reach it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence

DEVICES = "xla_force_host_platform_device_count"
HANG_S = 1800.0
"""Seconds after which something hangs: many times what a busy machine takes for any one wait."""


def xla_flags(devices: int | None = None) -> str:
    """XLA_FLAGS for a program with so many devices, or the machine's own: what the tests have,
    such as an instruction set, is the program's too."""
    kept = [x for x in os.environ.get("XLA_FLAGS", "").split() if DEVICES not in x]
    return " ".join([*kept, f"--{DEVICES}={devices}"] if devices else kept)


def wait_until(ready: Callable[[], object], what: str, seconds: float = HANG_S) -> None:
    """Returns when `ready()` is true.

    Args:
      what: is waited for, in words; it may end the wait by raising.
    """
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


def finish(
    processes: Sequence[subprocess.Popen], what: str, seconds: float = HANG_S
) -> tuple[list[str], list[int]]:
    """What the processes, whose stdout is a pipe, said, and what they exited with; none is left."""
    end = time.monotonic() + seconds
    late = False
    said: list[str] = []
    try:
        for process in processes:
            try:
                text, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
                for other in processes:
                    other.kill()
                text, _ = process.communicate()
            said.append(text)
    finally:
        for process in processes:
            process.kill()
    assert not late, f"waited {seconds:.0f} s for {what} to end; said so far: {said}"
    return said, [process.returncode for process in processes]
