"""Which request goes to which slot, and how large the decode batch is: decided on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

SHRINK = 4
"""The decode batch falls to a quarter when no more of it is in use."""


def window_sizes(longest: int, smallest: int) -> tuple[int, ...]:
    """Columns that caches may have, growing: `longest` halved while `smallest` still fits."""
    step = 128 if longest > 1024 else 8
    sizes = [_round_up(longest, step)]
    while (half := _round_up(-(-sizes[-1] // 2), step)) >= smallest and half < sizes[-1]:
        sizes.append(half)
    return tuple(reversed(sizes))


def choose_window(sizes: Sequence[int], needed: int) -> int:
    """The smallest size with room for `needed` columns."""
    return next(size for size in sizes if size >= needed)


def smaller_batch(slots: int, running: int, parts: int) -> int:
    """How many slots are enough for `running`: `slots`, or a quarter of it, or of that, …

    Args:
      parts: every size is a multiple of it.
    """
    while running <= slots // SHRINK and slots % (SHRINK * parts) == 0:
        slots //= SHRINK
    return slots


class Queue:
    """P·G requests, the G of a problem side by side, prefilled some problems at a time.

    Args:
      order: the problems, the first to start first.
      at_once: problems of a prefill.
    """

    def __init__(self, order: Sequence[int], group: int, at_once: int):
        self._order, self._group, self._at_once = list(order), group, at_once
        self._next = 0

    def __len__(self) -> int:
        return len(self._order) * self._group - self._next

    @property
    def batch(self) -> int:
        """Which prefill the next request belongs to."""
        return self._next // (self._at_once * self._group)

    def problems(self, batch: int) -> list[int]:
        """The problems of a prefill; fewer than `at_once` in the last one."""
        return self._order[batch * self._at_once : (batch + 1) * self._at_once]

    def take(self, most: int) -> Iterator[tuple[int, int]]:
        """Up to `most` requests of one prefill: (row within it, number p·G + g)."""
        batch = self.batch
        while most and len(self) and self.batch == batch:
            place, sample = divmod(self._next, self._group)
            yield place % self._at_once, self._order[place] * self._group + sample
            self._next += 1
            most -= 1


def longest_first(expected: Sequence[float]) -> list[int]:
    """Problems by expected length, the longest first; equal ones in their own order."""
    return sorted(range(len(expected)), key=lambda p: -expected[p])


@dataclasses.dataclass
class Seats:
    """Who sits in each slot, as the host knows it."""

    request: Int[np.ndarray, "B"]
    """−1: nobody."""
    lengths: Int[np.ndarray, "B"]
    """Columns of cache in use."""

    @classmethod
    def empty(cls, slots: int) -> Seats:
        """`slots` free seats."""
        return cls(np.full(slots, -1), np.zeros(slots, np.int64))

    @property
    def taken(self) -> Int[np.ndarray, "n"]:
        """Slots with a request in them."""
        return np.flatnonzero(self.request >= 0)

    @property
    def free(self) -> Int[np.ndarray, "n"]:
        """Slots without one."""
        return np.flatnonzero(self.request < 0)

    @property
    def longest(self) -> int:
        """Columns of cache that the fullest slot uses."""
        return int(self.lengths[self.taken].max(initial=0))

    def pick(self, rows: Int[np.ndarray, "n"]) -> Seats:
        """The slots `rows` alone."""
        return Seats(self.request[rows], self.lengths[rows])


def _round_up(x: int, step: int) -> int:
    return math.ceil(x / step) * step
