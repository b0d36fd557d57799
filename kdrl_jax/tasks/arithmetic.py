"""Chains of additions and subtractions with worked solutions.

A problem is a chain such as `58+7-9+4=`; its answer is the value of the chain, `60`; its worked
solution carries one running value from left to right, one operation a step:

    <think>58+7=65,65-9=56,56+4=60</think>\\boxed{60}

Every running value stays in [0, max_value], so no number is negative. One step is easy, the whole
chain is right only if every step is: a model that is right in 80 % of its steps solves about half
of the chains of four numbers, which leaves room to learn on either side.

Train and test problems are disjoint whatever their seeds: a checksum of the problem's text decides
which split it belongs to.
"""

import random

from kdrl_jax.tasks.splits import collect
from kdrl_jax.types import Problem


def problems(
    count: int,
    seed: int,
    *,
    split: str = "train",
    min_terms: int = 4,
    max_terms: int = 4,
    max_operand: int = 9,
    max_value: int = 99,
) -> list[Problem]:
    """`count` different problems of one split, a function of the arguments alone.

    min_terms, max_terms: how many numbers a chain has, drawn uniformly, both ends included.
    max_operand: largest number after the first one; the smallest is 1.
    max_value: largest running value, the first number included.

    Raises ValueError for arguments out of range, UserError for more problems than there are.
    """
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"need 2 <= min_terms <= max_terms, not {min_terms} and {max_terms}")
    if max_operand < 1 or max_value < 1:
        raise ValueError(f"max_operand and max_value must be >= 1: {max_operand}, {max_value}")

    rng = random.Random(f"arithmetic {split} {seed}")

    def draw() -> tuple[str, Problem]:
        terms, answer = _chain(rng, rng.randint(min_terms, max_terms), max_operand, max_value)
        text = f"{terms[0]}" + "".join(f"{term:+d}" for term in terms[1:]) + "="
        return text, Problem("", text, str(answer), {"terms": terms})

    return collect("arithmetic", count, seed, split, draw)


def solution(problem: Problem) -> str:
    """The worked response to a problem of `problems`, without an end token."""
    value, *rest = problem.meta["terms"]
    steps = []
    for term in rest:
        steps.append(f"{value}{term:+d}={value + term}")
        value += term
    return f"<think>{','.join(steps)}</think>\\boxed{{{problem.answer}}}"


def _chain(
    rng: random.Random, length: int, max_operand: int, max_value: int
) -> tuple[list[int], int]:
    """`length` signed terms whose running sums stay in [0, max_value], and their sum."""
    value = rng.randint(1, max_value)
    terms = [value]
    for _ in range(length - 1):
        room_up, room_down = min(max_operand, max_value - value), min(max_operand, value)
        up = room_down == 0 or (room_up > 0 and rng.random() < 0.5)
        term = rng.randint(1, room_up) if up else -rng.randint(1, room_down)
        terms.append(term)
        value += term
    return terms, value
