"""Problems of one's own data that are kept from training, to measure a run on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from kdrl_jax.data.filters import normalise
from kdrl_jax.types import Problem, UserError


def hold_out(
    problems: Sequence[Problem], share: float, most: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """What is left to train on, and what is held out, both in the order of the data.

    Texts are chosen by a digest of `seed` and themselves, whatever their order, so no text is on
    both sides; see `normalise` for which texts are the same. Of a text that is held out the first
    problem stands for all.

    Args:
      share: of the different texts, above 0 and below 1; at least one is held out.
      most: problems that are held out.

    Raises:
      UserError: all problems have the same text.
    """
    texts = [normalise(problem.problem) for problem in problems]
    ranked = sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
    if len(ranked) < 2:
        raise UserError(
            f"data.eval_fraction: {share} of problems that all have one text leaves none to train "
            "on; add problems or set it to 0"
        )
    count = min(max(round(share * len(ranked)), 1), most, len(ranked) - 1)
    chosen = set(ranked[:count])
    training = [p for p, text in zip(problems, texts, strict=True) if text not in chosen]
    first: dict[str, Problem] = {}
    for problem, text in zip(problems, texts, strict=True):
        if text in chosen:
            first.setdefault(text, problem)
    return training, list(first.values())


def to_json_lines(problems: Sequence[Problem]) -> str:
    """Problems as rows that `read_problems` reads, with their other columns."""
    rows = [
        {**problem.meta, "id": problem.id, "problem": problem.problem, "answer": problem.answer}
        for problem in problems
    ]
    return "".join(json.dumps(row, default=str) + "\n" for row in rows)
