"""Debug mode: broken records are named with field, index and step; NaN stops where it arises."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import xla_flags
from test_train import TINY, command

from kdrl_jax import train
from kdrl_jax.config import ROOT, apply_overrides, load_config
from kdrl_jax.training.batch import rollout_rows
from kdrl_jax.training.checks import Checks, InvariantError
from kdrl_jax.training.integrity import checksums
from kdrl_jax.training.packing import pack_rows
from kdrl_jax.training.validation import validate
from kdrl_jax.types import Rollouts, Scores

P, G, T, VOCAB, EOS = 2, 2, 4, 9, 0


@pytest.fixture
def checks():
    flags = [f"rollout.max_new_tokens={T}", "debug=true"]
    config = apply_overrides(load_config(ROOT / "configs" / "demo.py"), flags)
    return Checks(config, validate(config), VOCAB, (EOS,))


def good() -> Rollouts:
    """Two ended by the end token, two by the limit."""
    tokens = np.array([[[3, 4, EOS, 0], [5, 6, 7, 8]], [[EOS, 0, 0, 0], [1, 2, 3, 4]]], np.int32)
    lengths = np.array([[3, 4], [1, 4]], np.int32)
    mask = np.arange(T) < lengths[..., None]
    return Rollouts(
        prompt_tokens=np.array([[0, 1, 2], [3, 4, 5]], np.int32),
        prompt_lengths=np.array([2, 3], np.int32),
        tokens=tokens,
        log_probs=np.where(mask, np.float32(-0.5), 0),
        lengths=lengths,
        finish_reason=np.array([[0, 1], [0, 1]], np.int32),
    )


def spoilt(field: str, index: tuple[int, ...], value: float) -> Rollouts:
    array = np.array(getattr(good(), field))
    array[index] = value
    return dataclasses.replace(good(), **{field: array})


@pytest.mark.parametrize(
    ("field", "index", "value", "said"),
    [
        ("tokens", (0, 1, 2), VOCAB, r"rollouts\.tokens \[0, 1, 2\] is 9"),
        ("tokens", (0, 1, 0), -1, r"rollouts\.tokens \[0, 1, 0\] is -1"),
        ("tokens", (0, 1, 1), EOS, r"rollouts\.tokens, stopping before the end, \[0, 1, 1\]"),
        ("tokens", (0, 0, 2), 5, r"rollouts\.finish_reason, by the last token, \[0, 0\] is 0"),
        ("log_probs", (1, 1, 3), 0.5, r"rollouts\.log_probs \[1, 1, 3\] is 0\.5"),
        ("log_probs", (1, 1, 3), np.nan, r"rollouts\.log_probs \[1, 1, 3\] is nan"),
        ("log_probs", (0, 0, 0), -np.inf, r"rollouts\.log_probs \[0, 0, 0\] is -inf"),
        ("lengths", (1, 1), T + 1, r"rollouts\.lengths \[1, 1\] is 5"),
        ("lengths", (1, 0), 0, r"rollouts\.lengths \[1, 0\] is 0"),
        ("finish_reason", (0, 1), 2, r"rollouts\.finish_reason \[0, 1\] is 2"),
        ("prompt_lengths", (0,), 4, r"rollouts\.prompt_lengths \[0\] is 4"),
        ("prompt_tokens", (1, 0), 99, r"rollouts\.prompt_tokens \[1, 0\] is 99"),
    ],
)
def test_broken_rollouts_are_named(checks, field, index, value, said):
    checks.rollouts(7, good())
    with pytest.raises(InvariantError, match=rf"^step 7: {said}"):
        checks.rollouts(7, spoilt(field, index, value))


def test_what_lies_beyond_a_completion_is_not_looked_at(checks):
    checks.rollouts(1, spoilt("log_probs", (1, 0, 3), np.nan))


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_lose_a_token_and_scores_that_are_none(checks, packed):
    found, rewards = good(), np.array([[1, 0], [0, 1]], np.float32)
    rows = pack_rows(found, mini_batches=1, micro_batch=2) if packed else rollout_rows(found)
    checks.rollouts(3, found)
    width = rows.tokens.shape[1] - 1 if packed else T
    fine = jnp.full((P * G, width), -1.0)
    checks.scored(rewards, rows, Scores(teacher_log_probs=fine), found)
    column = width - 1
    wanted = np.asarray(rows.packing.sources) >= 0 if packed else None
    row, column = np.argwhere(wanted)[0] if packed else (1, T - 1)
    bad = fine.at[row, column].set(jnp.nan)
    with pytest.raises(InvariantError, match=rf"3: scores.teacher_log_probs \[{row}, {column}\]"):
        checks.scored(rewards, rows, Scores(teacher_log_probs=bad), found)
    with pytest.raises(InvariantError, match=r"step 3: rewards \[0, 1\] is 0\.5"):
        checks.scored(rewards + np.float32([[0, 0.5], [0, 0]]), rows, Scores(), found)
    # With functions of the user's own a reward may be anything finite; a verdict may not.
    own = rewards * 0.5 - 0.25
    checks.scored(own, rows, Scores(), found, rewards)
    with pytest.raises(InvariantError, match=r"step 3: rewards \[1, 1\] is nan"):
        checks.scored(np.where(np.eye(2) * [[0], [1]], np.nan, own), rows, Scores(), found, rewards)
    with pytest.raises(InvariantError, match=r"step 3: correct \[0, 0\] is 0\.25"):
        checks.scored(own, rows, Scores(), found, own)
    with pytest.raises(InvariantError, match="step 3: rewards shape"):
        checks.scored(rewards[:1], rows, Scores(), found)
    tokens = np.array(rows.tokens)
    tokens[tokens == 7] = 6
    with pytest.raises(InvariantError, match=r"step 3: rows\.tokens \[1, 2\] is 6"):
        checks.scored(rewards, rows._replace(tokens=tokens), Scores(), found)
    if packed:
        sources = np.array(rows.packing.sources)
        sources[sources == 1] = 0  # one token twice, another never
        twice = rows._replace(packing=rows.packing._replace(sources=sources))
        with pytest.raises(InvariantError, match=r"rows\.packing\.sources \[0\] is 2"):
            checks.scored(rewards, twice, Scores(), found)


def batch_of(**changes):
    mask = (np.arange(T) < good().lengths[..., None]).reshape(1, P * G, T)
    weights = mask / mask.sum()
    advantages = np.broadcast_to(np.array([1.0, -1, 0, 0])[None, :, None], mask.shape)
    fields = {"weights": weights, "kd_weights": weights, "advantages": advantages}
    return types.SimpleNamespace(**(fields | changes))


def test_broken_batches_are_named(checks):
    found, rows = good(), rollout_rows(good())
    fine = batch_of()
    checks.batch(fine, rows, found)
    outside = np.array(fine.weights)
    outside[0, 2, 3], outside[0, 2, 0] = outside[0, 2, 0], 0
    for changes, said in (
        ({"weights": fine.weights * 2}, r"batch\.weights, their sum, \[0\] is 2"),
        ({"weights": -fine.weights}, r"batch\.weights \[0, 0, 0\] is -"),
        ({"weights": outside, "kd_weights": 0 * outside}, r"outside completions, \[2, 3\]"),
        ({"kd_weights": fine.weights + 0.1}, r"batch\.kd_weights, above weights, \[0, 0, 0\]"),
        ({"advantages": fine.advantages + 1}, r"batch\.advantages, the sum of a group, \[0\] is 2"),
    ):
        with pytest.raises(InvariantError, match=said):
            checks.batch(batch_of(**changes), rows, found)


def test_a_student_that_stands_still_and_a_teacher_that_moves(checks):
    one = {"layers": {"w": jnp.arange(6.0)}, "head": jnp.ones((2, 3), jnp.bfloat16)}
    other = {**one, "head": one["head"].at[1, 2].set(1.0078125)}  # by the last bit
    moved, still = [{"params/update_norm": jnp.array(x)} for x in (0.1, 0.0)]
    assert [k for k in checksums(one) if checksums(one)[k] != checksums(other)[k]] == ["head"]
    checks.updated(one, other, [moved], one)
    checks.updated(one, one, [still], one)
    for before, after, metrics in ((one, one, moved), (one, other, still)):
        with pytest.raises(InvariantError, match=r"state\.params updates of norm"):
            checks.updated(before, after, [metrics], one)
    with pytest.raises(InvariantError, match=r"teacher\.params\.head has changed since the step"):
        checks.updated(one, other, [moved], other)
    bad = {**one, "layers": {"w": jnp.array([1.0, jnp.inf])}}
    with pytest.raises(InvariantError, match=r"state\.params\.layers/w is not finite"):
        checks.updated(one, bad, [moved], None)


GRPO = {"objective": "grpo", "student.sft.steps": 0, "teacher.sft.steps": 0}
RUN = TINY | GRPO | {"steps": 1, "eval.every": 0}


def test_nan_stops_where_it_arises_and_says_when(tmp_path, monkeypatch):
    """Without debug mode it would be sampled from, graded and trained on."""
    whole = train.init_state

    def spoil(*args):
        state = whole(*args)
        params = jax.tree.map(lambda x: x, state.params)
        embed = params["embed"]["embedding"]
        params["embed"]["embedding"] = embed * jnp.float32(np.nan)
        return dataclasses.replace(state, params=params)

    monkeypatch.setattr(train, "init_state", spoil)
    with pytest.raises(FloatingPointError, match="nan") as caught:
        train.main(command(tmp_path / "run", tmp_path / "cache", **(RUN | {"debug": "true"})))
    assert "debug: in step 1, phase rollout" in caught.value.__notes__


def test_a_whole_run_in_debug_mode_says_the_same(tmp_path):
    """The command line: it starts itself again with every function's shapes checked."""
    distil = {"teacher.sft.steps": 1, "objective": "kdrl", "micro_batch": 4, "mini_batches": 2}
    settings = RUN | distil | {"debug": "true"}
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}
    environment.pop("KDRL_DEBUG", None)
    metrics = {}
    for debug in ("true", "false"):
        argv = command(tmp_path / debug, tmp_path / "cache", **(settings | {"debug": debug}))
        run = [sys.executable, "-m", "kdrl_jax.train", *argv]
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        from test_train import rows

        metrics[debug] = rows(tmp_path / debug)
    assert [row["step"] for row in metrics["true"]] == [1]
    for name, value in metrics["false"][0].items():
        assert metrics["true"][0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
