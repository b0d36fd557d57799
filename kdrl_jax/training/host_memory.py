"""Memory of the host that the allocator holds though nothing needs it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Compiling, loading and writing checkpoints free hundreds of MiB in pieces that glibc keeps, and
    that count as the process's until they are asked back. Takes some ms; the pages that are needed
    again are zeroed anew.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return lambda _: 0
