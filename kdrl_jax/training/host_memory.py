"""Memory of the host that the allocator (glibc's) holds though nothing needs it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

M_ARENA_MAX = -8
"""Of malloc.h."""


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Compiling, loading and writing checkpoints free hundreds of MiB in pieces that glibc keeps, and
    that count as the process's until they are asked back. Takes some ms; the pages that are needed
    again are zeroed anew.
    """
    _libc("malloc_trim")(0)


def share_arenas() -> None:
    """One arena of the allocator for each core, not glibc's eight; before threads have theirs.

    Every arena keeps free blocks of its own, and a run's threads, some forty, come to most of them
    over the hours: the process grows though nothing more is in use. Unless MALLOC_ARENA_MAX or
    GLIBC_TUNABLES says another number.
    """
    told = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if not told:
        _libc("mallopt")(M_ARENA_MAX, max(os.cpu_count() or 1, 2))


@functools.cache
def _libc(name: str) -> Callable[..., int]:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):  # another C library
        return lambda *_: 0
