"""Sample rollouts as files: text, verdict, and what the loss was told of each token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from kdrl_jax.data import Tokenizer, token_pieces
from kdrl_jax.training.batch import Rows, join_mini_batches
from kdrl_jax.training.collect import Collected
from kdrl_jax.training.display import finite
from kdrl_jax.training.evaluation import completion_texts
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.types import FINISH_LENGTH, Rollouts, Scores, TrainBatch

DIGITS = 4
"""After the point, of log-probs and advantages in a file."""


class TokenTraces(NamedTuple):
    """What the loss is told of the tokens of the first n rollouts, wherever their rows are."""

    advantages: Float[Any, "n T"]
    weights: Float[Any, "n T"]
    kd_weights: Float[Any, "n T"]
    teacher_log_probs: Float[Any, "n T"] | None
    """None: the teacher was not asked. NaN where it has no opinion."""


def traced_slots(fill_slots: Callable[..., TrainBatch]) -> Callable[..., TokenTraces]:
    """`(rows, rollouts, rewards, scores, beta, correct, count) -> TokenTraces`, to be jitted.

    The batch is made once more, of which a compiler keeps what is asked for: elementwise work.

    Args:
      fill_slots: (rows, rollouts, rewards, scores, beta, correct) → batch; see `build_batch`.
    """

    def trace(
        rows: Rows,
        rollouts: Rollouts,
        rewards: Float[Array, "P G"],
        scores: Scores,
        beta: Float[Array, ""],
        correct: Float[Array, "P G"] | None,
        count: int,
    ) -> TokenTraces:
        batch = fill_slots(rows, rollouts, rewards, scores, beta, correct)
        p, g, t = rollouts.tokens.shape
        groups = p if rows.packing is None else p * g

        def of_rollouts(x: Array) -> Array:
            x = join_mini_batches(x, groups)
            return (x[:, -t:] if rows.packing is None else rows.packing.collect(x))[:count]

        fields = {name: getattr(batch, name) for name in TokenTraces._fields}
        return TokenTraces(**jax.tree.map(of_rollouts, fields))

    return trace


def asked_of(scores: Scores) -> Scores:
    """`scores` without what `traced_slots` does not read."""
    return Scores(teacher_log_probs=scores.teacher_log_probs)


def write_samples(
    path: Path, found: Collected, count: int, tokenizer: Tokenizer, traces: TokenTraces
) -> None:
    """The first `count` rollouts of a step, one JSON object a line.

    "prompt" is what the model was given, special tokens by their names. Beside the verdict:
    "advantage", whether the rollout is "trained" on and "distilled"; and, a
    list entry for each token, "tokens" (texts that join to the completion; see `token_pieces`),
    "log_probs" of the sampler and "teacher_log_probs", in nats. The latter are null where the
    teacher was not asked or has no opinion; "tokens" is null where the text cannot be taken apart.

    Args:
      traces: of as many rollouts; device arrays that this process has whole.
    """
    group = found.rollouts.lengths.shape[1]
    shown = jax.tree.map(lambda x: x[: -(-count // group)], found.rollouts)
    lengths, finish = shown.lengths.reshape(-1), shown.finish_reason.reshape(-1)
    tokens, drawn = (x.reshape(len(lengths), -1) for x in (shown.tokens, shown.log_probs))
    told = jax.device_get(traces)
    rewards, lines = found.rewards.reshape(-1), []
    for i, text in enumerate(completion_texts(shown, tokenizer)[:count]):
        (problem, prompt), verdict, n = found.asked[i // group], found.verdicts[i], int(lengths[i])
        cut = finish[i] == FINISH_LENGTH
        pieces = token_pieces(tokenizer, tokens[i, : n if cut else n - 1].tolist(), text)
        scored = told.teacher_log_probs
        row = {
            "id": problem.id,
            "sample": i % group,
            "problem": problem.problem,
            "prompt": tokenizer.spell(prompt),
            "answer": problem.answer,
            "completion": text,
            "reward": float(rewards[i]),
            "outcome": verdict.outcome,
            **finite({f"reward/{k}": float(x.values.flat[i]) for k, x in found.own.items()}),
            "length": n,
            "finish_reason": "length" if cut else "eos",
            # One for all tokens of a rollout; a response without tokens has none.
            "advantage": _rounded(told.advantages[i, :1])[0] if n else None,
            "trained": bool(told.weights[i, :n].any()),
            "distilled": bool(told.kd_weights[i, :n].any()),
            "tokens": pieces if pieces is None or cut else [*pieces, ""],  # the end token
            "log_probs": _rounded(drawn[i, :n]),
            "teacher_log_probs": None if scored is None else _rounded(scored[i, :n]),
        }
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomic(path, "".join(lines))


def _rounded(x: np.ndarray) -> list[float | None]:
    """JSON numbers; null for what is not finite."""
    return [round(v, DIGITS) + 0.0 if math.isfinite(v) else None for v in x.tolist()]
