"""Groups whose rollouts a step did not wait for, between steps and in checkpoints."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from kdrl_jax.types import UNFINISHED, Prompts, Rollouts


class Group(NamedTuple):
    """The samples of one problem, as far as they have got."""

    place: int
    """In the stream of problems."""
    problem: int
    """Index into the data."""
    tokens: Int[np.ndarray, "G T"]
    log_probs: Float[np.ndarray, "G T"]
    lengths: Int[np.ndarray, " G"]
    finish_reason: Int[np.ndarray, " G"]


def new_group(place: int, problem: int, group: int, length: int) -> Group:
    """A problem of which nothing has been sampled."""
    numbers = np.zeros(group, np.int32)
    tokens = np.zeros((group, length), np.int32)
    log_probs, finish = tokens.astype(np.float32), np.full_like(numbers, UNFINISHED)
    return Group(place, problem, tokens, log_probs, numbers, finish)


def join_groups(groups: Sequence[Group], prompts: Prompts) -> Rollouts:
    """Partial rollouts of several problems."""
    fields = (np.stack(x) for x in zip(*(group[2:] for group in groups), strict=True))
    return Rollouts(prompts.tokens, prompts.lengths, *fields)


def split_groups(groups: Sequence[Group], rollouts: Rollouts, which: Sequence[int]) -> list[Group]:
    """The groups number `which`, as `rollouts` has them."""
    fields = (rollouts.tokens, rollouts.log_probs, rollouts.lengths, rollouts.finish_reason)
    return [Group(*groups[p][:2], *(np.asarray(x)[p].copy() for x in fields)) for p in which]


def to_text(groups: Sequence[Group]) -> str:
    """`groups` for a checkpoint's JSON; '' for none."""
    if not groups:
        return ""
    file = io.BytesIO()
    columns = (np.stack(values) for values in zip(*groups, strict=True))
    np.savez_compressed(file, *columns)
    return base64.b64encode(file.getvalue()).decode("ascii")


def from_text(text: str) -> list[Group]:
    """The inverse of `to_text`, bit for bit."""
    if not text:
        return []
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
        columns = [file[f"arr_{i}"] for i in range(len(Group._fields))]
    rows = zip(*columns, strict=True)
    return [Group(int(place), int(problem), *rest) for place, problem, *rest in rows]
