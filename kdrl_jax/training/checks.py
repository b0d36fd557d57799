"""What must hold of each record between two phases of a step: debug mode compares.

A failure is a fault of this program, or of a server or an engine of another kind, not of a config:
an AssertionError that names record, field, first bad index and step. Records on the devices of
several processes are compared only where this process has all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kdrl_jax.sharding import path_name
from kdrl_jax.training.batch import Rows
from kdrl_jax.training.integrity import checksums
from kdrl_jax.training.validation import Sizes
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, Params, Rollouts, Scores, TrainBatch

SLACK = 1e-3
"""Of sums that are 0 or 1 but for rounding in float32."""


class InvariantError(AssertionError):
    """A record is not what the next phase takes it for."""


class Checks:
    """The invariants of a run's records.

    Args:
      vocab: ids that the tokenizer knows.
      stop_ids: that end a completion.

    Attributes:
      step: that is being made; set by `rollouts`, the first check of each.
    """

    def __init__(self, config: ConfigDict, sizes: Sizes, vocab: int, stop_ids: tuple[int, ...]):
        self._config, self._sizes = config, sizes
        self._vocab, self._stop_ids = vocab, stop_ids
        self._frozen: dict[str, list[Any]] | None = None
        self.step = 0

    def rollouts(self, step: int, found: Rollouts) -> None:
        """Host arrays, when all of a step's completions are there.

        Raises:
          InvariantError: see the class.
        """
        self.step = step
        tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
        finish, log_probs = np.asarray(found.finish_reason), np.asarray(found.log_probs)
        prompts, before = np.asarray(found.prompt_tokens), np.asarray(found.prompt_lengths)
        most = self._config.rollout.max_new_tokens
        self._all("rollouts.prompt_lengths", (before >= 1) & (before <= prompts.shape[1]), before)
        self._all("rollouts.prompt_tokens", self._known(prompts), prompts)
        self._all("rollouts.lengths", (lengths >= 1) & (lengths <= most), lengths)
        self._all("rollouts.tokens", self._known(tokens), tokens)
        legal = (finish == FINISH_EOS) | (finish == FINISH_LENGTH)
        self._all("rollouts.finish_reason", legal, finish)
        last = np.take_along_axis(tokens, lengths[..., None] - 1, axis=-1)[..., 0]
        ended = np.isin(last, self._stop_ids) == (finish == FINISH_EOS)
        self._all("rollouts.finish_reason, by the last token,", ended, finish)
        mask = np.arange(tokens.shape[-1]) < lengths[..., None]
        fine = np.isfinite(log_probs) & (log_probs <= SLACK)
        self._all("rollouts.log_probs", fine | ~mask, log_probs)
        early = np.isin(tokens, self._stop_ids) & (
            np.arange(tokens.shape[-1]) < lengths[..., None] - 1
        )
        self._all("rollouts.tokens, stopping before the end,", ~early, tokens)

    def scored(
        self,
        rewards: np.ndarray,
        rows: Rows,
        scores: Scores,
        found: Rollouts,
        correct: np.ndarray | None = None,
    ) -> None:
        """When graders and models have spoken.

        Args:
          rewards: `[P, G]`.
          correct: the verifier's 1 and 0 `[P, G]`; None: they are the rewards.
          rows: that the models read; each token of `found` must be in them once.

        Raises:
          InvariantError: see the class.
        """
        mask = _mask(found)
        if rewards.shape != mask.shape[:2]:
            self._fail("rewards", f"shape {rewards.shape} for rollouts {mask.shape[:2]}")
        verdicts, weight = correct, self._config.reward.verdict_weight
        if verdicts is None:
            self._all("rewards", (rewards == 0) | (rewards == np.float32(weight)), rewards)
        else:
            self._all("rewards", np.isfinite(rewards), rewards)
            self._all("correct", (verdicts == 0) | (verdicts == 1), verdicts)
        self._rows(rows, found, mask.reshape(-1, mask.shape[-1]))
        heard = _trained(rows, mask)
        for name in ("old_log_probs", "reference_log_probs", "teacher_log_probs"):
            values = _fetch(getattr(scores, name))
            if values is None:
                continue
            if values.shape != heard.shape:
                self._fail(f"scores.{name}", f"shape {values.shape}, not {heard.shape}")
            fine = np.isfinite(values) & (values <= SLACK)
            self._all(f"scores.{name}", fine | ~heard, values)
        support = _fetch(scores.support)
        if support is not None:
            known = (support >= 0) & (support < self._vocab)
            self._all("scores.support", known | ~heard[..., None], support)
        hidden = _fetch(scores.teacher_hidden)
        if hidden is not None:
            self._all("scores.teacher_hidden", np.isfinite(hidden) | ~heard[..., None], hidden)

    def batch(self, batch: TrainBatch, rows: Rows, found: Rollouts) -> None:
        """The filled slots of the objective, `[M, B / M, …]`, before the first update on them.

        Raises:
          InvariantError: see the class.
        """
        weights, kd = _fetch(batch.weights), _fetch(batch.kd_weights)
        if weights is None or kd is None:
            return
        self._all("batch.weights", np.isfinite(weights) & (weights >= 0), weights)
        self._all("batch.kd_weights", np.isfinite(kd) & (kd >= 0), kd)
        self._all("batch.kd_weights, above weights,", kd <= weights + SLACK, kd)
        total = weights.sum(axis=tuple(range(1, weights.ndim)))
        norm = self._config.aggregation.endswith("sum-norm")
        fine = total <= 1 + SLACK if norm else (np.abs(total - 1) < SLACK) | (total == 0)
        self._all("batch.weights, their sum,", fine, total)
        mask = _mask(found)
        groups = mask.shape[0] if rows.packing is None else mask.shape[0] * mask.shape[1]
        laid = _joined(weights, groups)
        self._all("batch.weights, outside completions,", (laid == 0) | _trained(rows, mask), laid)
        method = self._sizes.method
        if method.supervised or not method.policy:
            return
        advantages = _joined(np.asarray(_fetch(batch.advantages)), groups)
        if rows.packing is not None:
            advantages = advantages.reshape(-1)[np.asarray(_fetch(rows.packing.places))]
        of = advantages[:, 0].reshape(mask.shape[:2])
        scale = SLACK * (1 + np.abs(of).sum(axis=1))
        self._all("batch.advantages, the sum of a group,", np.abs(of.sum(1)) <= scale, of.sum(1))

    def updated(
        self,
        before: Params,
        after: Params,
        metrics: Sequence[Mapping[str, jax.Array]],
        teacher: Params | None,
    ) -> None:
        """After a step's updates: the student has moved by what they say, the teacher has not.

        Args:
          metrics: of each update.

        Raises:
          InvariantError: see the class.
        """
        for name, leaf in _named(after):
            if not bool(_local(_all_finite(leaf))):
                self._fail(f"state.params.{name}", "is not finite")
        moved = sum(float(_local(x["params/update_norm"])) for x in metrics)
        if (checksums(before) == checksums(after)) != (moved == 0):
            self._fail(
                "state.params", f"updates of norm {moved} have{' not' * (moved > 0)} changed it"
            )
        if teacher is None:
            return
        now = checksums(teacher)
        changed = [name for name in now if self._frozen and self._frozen[name] != now[name]]
        self._frozen = now
        if changed:
            self._fail(f"teacher.params.{changed[0]}", "has changed since the step before")

    def _rows(self, rows: Rows, found: Rollouts, mask: np.ndarray) -> None:
        tokens = _fetch(rows.tokens)
        if tokens is None:
            return
        said = np.asarray(found.tokens).reshape(mask.shape)
        if rows.packing is None:
            there = tokens[:, -mask.shape[1] :]
        else:
            sources, places = _fetch(rows.packing.sources), _fetch(rows.packing.places)
            assert sources is not None
            assert places is not None
            named = np.bincount(sources[sources >= 0], minlength=mask.size)
            self._all("rows.packing.sources", named == mask.reshape(-1), named)
            there = tokens[:, 1:].reshape(-1)[places]
        self._all("rows.tokens", (there == said) | ~mask, there)

    def _known(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens >= 0) & (tokens < self._vocab)

    def _all(self, what: str, good: np.ndarray, values: np.ndarray) -> None:
        bad = np.argwhere(~good)
        if len(bad):
            index = tuple(int(i) for i in bad[0])
            self._fail(f"{what} {list(index)}", f"is {values[index]} ({len(bad)} such)")

    def _fail(self, what: str, why: str) -> None:
        raise InvariantError(f"step {self.step}: {what} {why}")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _local(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.device_get(x.addressable_data(0)))


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in leaves]


def _fetch(x: Any) -> np.ndarray | None:
    if x is None or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(jax.device_get(x))


def _joined(x: np.ndarray, groups: int) -> np.ndarray:
    """Rows of mini-batches `[M, B / M, …]` in the order of rollouts, `[B, …]`."""
    count, rows = x.shape[:2]
    x = x.reshape(count, groups // count, count * rows // groups, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(count * rows, *x.shape[3:])


def _mask(found: Rollouts) -> np.ndarray:
    """Tokens of completions, `[P, G, T]`."""
    return np.arange(found.tokens.shape[-1]) < np.asarray(found.lengths)[..., None]


def _trained(rows: Rows, mask: np.ndarray) -> np.ndarray:
    """Which columns of per-token arrays, in the rows' order, are about a completion's token."""
    if rows.packing is None:
        return mask.reshape(-1, mask.shape[-1])
    sources = _fetch(rows.packing.sources)
    return np.ones((1, 1), bool) if sources is None else sources >= 0
