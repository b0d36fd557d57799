"""Train and test problems that are disjoint whatever their seeds, and draws without repeats."""

import dataclasses
import zlib
from collections.abc import Callable

from kdrl_jax.types import Problem, UserError

SPLITS = ("train", "test")
TEST_SHARE = 10  # one text in TEST_SHARE belongs to the test split
MAX_MISSES = 1000  # draws in a row without a new problem before the space counts as exhausted


def split_of(text: str) -> str:
    """The split to which a problem's text belongs: a checksum of the text decides."""
    return "test" if zlib.crc32(text.encode()) % TEST_SHARE == 0 else "train"


def collect(
    name: str, count: int, seed: int, split: str, draw: Callable[[], tuple[str, Problem]]
) -> list[Problem]:
    """`count` problems with different texts, all of one split.

    Args:
      name: the task's; ids are `name/split/seed/number`.
      seed: for the ids alone; the randomness is `draw`'s.
      draw: one more problem, behind the text that decides on its split.

    Raises:
      ValueError: a negative count or an unknown split.
      UserError: fewer different problems than `count` turn up.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if count < 0:
        raise ValueError(f"count must not be negative: {count}")
    found: dict[str, Problem] = {}
    misses = 0
    while len(found) < count:
        text, problem = draw()
        if problem.problem in found or split_of(text) != split:
            misses += 1
            if misses > MAX_MISSES:
                raise UserError(
                    f"{name}: {count} different {split} problems wanted, {len(found)} found; "
                    "lower data.size or eval.problems"
                )
            continue
        misses = 0
        number = f"{name}/{split}/{seed}/{len(found)}"
        found[problem.problem] = dataclasses.replace(problem, id=number)
    return list(found.values())
