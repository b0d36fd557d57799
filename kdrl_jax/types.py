"""The records that flow through the program, and the legend of axis letters.

Axis letters, the same in array annotations and einsum strings:

    P  problems of a step          V  vocabulary rows
    G  group: samples per problem  D  model width
    B  rollouts, B = P * G         N  query heads
    R  rows of a training batch    K  key/value heads
    S  padded prompt length        H  head dimension
    T  padded completion length    F  MLP width
    L  row length, S + T           Y  decoder layers
    W  columns of a decode cache   C  tokens of a decode chunk
    J  support: tokens of a position at which teacher and student are compared
    E  teacher's width

Each arrow of a training step is one of these records:

    Problem -> Prompts -> Rollouts -> Verdict -> TrainBatch -> TrainState
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays. Everything outside `kdrl_jax.models` sees weights only as this."""

Outcome = Literal["correct", "wrong", "unparsable", "timeout", "format"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "unparsable", "timeout", "format")

FINISH_EOS, FINISH_LENGTH, UNFINISHED = 0, 1, 2


class UserError(Exception):
    """A mistake the user can mend. Entry points print it without a traceback and exit with 2.

    Each problem is one line that names the config key or file, the value found and the remedy. As
    a text they are merged, see `merged`.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(merged(problems)))
        self.problems = list(problems)


FEW_ALIKE, MOST_NAMED = 3, 8


def merged(lines: Sequence[str]) -> list[str]:
    """Lines with those that are alike made one, which counts and names the others.

    Lines are alike where one word makes the difference, the same word of each, and it stands before
    the first semicolon, behind which the remedy is. Fewer than three stay as they are. A line that
    is there several times is once.
    """
    texts = list(dict.fromkeys(lines))
    words = [line.split(" ") for line in texts]
    groups: list[list[int]] = []  # lines by number
    places: list[int | None] = []  # which word makes the difference; None: a line alone
    for line, text in enumerate(words):
        for i, group in enumerate(groups):
            at = _difference(words[group[0]], text)
            if at is not None and places[i] in (None, at):
                group.append(line)
                places[i] = at
                break
        else:
            groups.append([line])
            places.append(None)
    said: dict[int, str] = {}
    for group, place in zip(groups, places, strict=True):
        first, *others = group
        if place is None or len(group) < FEW_ALIKE:
            said |= {line: texts[line] for line in group}
            continue
        names = [words[line][place].rstrip(":,") for line in others]
        more = ", …" if len(names) > MOST_NAMED else ""
        listed = ", ".join(names[:MOST_NAMED]) + more
        said[first] = f"{texts[first]} (and {len(names)} more like it: {listed})"
    return [said[line] for line in sorted(said)]


def _difference(words: Sequence[str], others: Sequence[str]) -> int | None:
    """The only place before the first semicolon in which two lines differ; None: more do."""
    if len(words) != len(others):
        return None
    places = [i for i, (a, b) in enumerate(zip(words, others, strict=True)) if a != b]
    ends = [i for i, word in enumerate(words) if word.endswith(";")]
    last = ends[0] if ends else len(words) - 1
    return places[0] if len(places) == 1 and places[0] <= last else None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its gold answer, as read from a data set or made by a task."""

    id: str
    problem: str
    answer: str
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the grader says of one response: reward in {0, 1} and why."""

    reward: float
    outcome: Outcome


class Prompts(NamedTuple):
    """Tokenised prompts of one step, left-padded to a bucket (host arrays)."""

    tokens: Int[Any, "P S"]
    lengths: Int[Any, " P"]


class KVCache(NamedTuple):
    """Keys and values: of all layers, with an axis Y in front, from a prefill; of one in decoding.

    Columns are the last axis of keys and the last but one of values: so the products with queries
    and with weights read them best.
    """

    k: Float[Array, "B K H W"]
    v: Float[Array, "B K W H"]


COLUMNS = KVCache(k=-1, v=-2)  # type: ignore[arg-type]
"""Which axis of each array counts columns."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """G sampled completions of each of P prompts: host arrays, until they are put on devices.

    `log_probs` are the sampling policy's own: of the full distribution at the sampling
    temperature, before top-p, top-k and min-p. The end token is part of the completion.
    """

    prompt_tokens: Int[Any, "P S"]
    prompt_lengths: Int[Any, " P"]
    tokens: Int[Any, "P G T"]
    log_probs: Float[Any, "P G T"]
    lengths: Int[Any, "P G"]
    finish_reason: Int[Any, "P G"]
    """FINISH_EOS or FINISH_LENGTH; UNFINISHED in partial rollouts."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What models that are not being trained say of the last T tokens of each row.

    All are taken before the first update on the rows; None: not asked for.
    """

    old_log_probs: Float[Array, "B T"] | None = None
    """Of the student; needed where a rollout batch serves several updates."""
    reference_log_probs: Float[Array, "B T"] | None = None
    """Of the student as it was before the first step."""
    teacher_log_probs: Float[Array, "B T"] | None = None
    support: Int[Array, "B T J"] | None = None
    """Tokens of each position, chosen by teacher or student."""
    support_log_probs: Float[Array, "B T J"] | None = None
    """The teacher's log-probs of them, of its full distribution."""
    teacher_hidden: Float[Array, "B T E"] | None = None
    """The teacher's states before its output head."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Rows to train on. Per-token arrays describe the last T tokens of each row.

    A row is a left-padded prompt of S tokens and a right-padded completion of T. Nothing below
    depends on that: `segment_ids` (0 = padding) and `weights` (0 = not trained on) say it all.
    Until they are taken apart, mini-batches and micro-batches are axes M in front.
    """

    tokens: Int[Array, "*M R L"]
    positions: Int[Array, "*M R L"]
    segment_ids: Int[Array, "*M R L"]
    sampler_log_probs: Float[Array, "*M R T"]
    old_log_probs: Float[Array, "*M R T"] | None
    """None means on-policy: the student that sampled is the one being updated."""
    teacher_log_probs: Float[Array, "*M R T"] | None
    """None: no teacher. NaN where the teacher has no opinion; kd_weights are 0 there."""
    advantages: Float[Array, "*M R T"]
    weights: Float[Array, "*M R T"]
    kd_weights: Float[Array, "*M R T"]
    reference_log_probs: Float[Array, "*M R T"] | None = None
    support: Int[Array, "*M R T J"] | None = None
    support_log_probs: Float[Array, "*M R T J"] | None = None
    teacher_hidden: Float[Array, "*M R T E"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes: fp32 master weights, optimizer state and the number of updates."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample, as arrays, so that no change of value recompiles anything."""

    temperature: Float[Array, ""]
    """0 takes the most likely token; log-probs are then those at temperature 1."""
    top_p: Float[Array, ""]
    """1 keeps everything."""
    top_k: Int[Array, ""]
    """0 keeps everything."""
    min_p: Float[Array, ""]
    """0 keeps everything; otherwise tokens less likely than min_p times the likeliest go."""
    max_new_tokens: Int[Array, "P G"]
    stop_ids: Int[Array, " stops"]
    """Token ids that end a completion; pad with -1."""
