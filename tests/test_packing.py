"""Packed rows: where tokens go, and that nothing a step computes depends on it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdrl_jax.models import Decoder, ModelConfig
from kdrl_jax.objectives import METHODS
from kdrl_jax.sharding import make_mesh, put_batch, replicated
from kdrl_jax.training.batch import build_batch, rollout_rows
from kdrl_jax.training.learner import take_part
from kdrl_jax.training.packing import first_fit_decreasing, pack_rows
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.state import init_params, init_state
from kdrl_jax.training.step import Objective, make_hyper, make_update
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, Rollouts, Scores

P_, G, S, T = 8, 4, 5, 19
VALID = 29
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=24,
    rope_theta=10_000.0,
)
MODEL = Decoder(CONFIG)
ONE_DEVICE = make_mesh(devices=jax.devices()[:1])
MESHES = [ONE_DEVICE, make_mesh(2, 2, 2)]
HEAT = jnp.float32(0.8)


def rollouts(seed: int = 0, longest: int = T) -> Rollouts:
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, S + 1, P_)
    lengths = np.minimum(rng.geometric(0.15, (P_, G)), longest)
    return Rollouts(
        prompt_tokens=rng.integers(0, VALID, (P_, S)).astype(np.int32),
        prompt_lengths=prompt_lengths.astype(np.int32),
        tokens=rng.integers(0, VALID, (P_, G, T)).astype(np.int32),
        log_probs=rng.normal(-3, 0.3, (P_, G, T)).astype(np.float32),
        lengths=lengths.astype(np.int32),
        finish_reason=np.where(lengths < T, FINISH_EOS, FINISH_LENGTH).astype(np.int32),
    )


def rows_of(sampled: Rollouts, mesh, packed: bool, mini: int, micro: int):
    if not packed:
        return rollout_rows(put_batch(mesh, sampled))
    return put_batch(mesh, pack_rows(sampled, mini_batches=mini, micro_batch=micro))


# --- where tokens go ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_decreasing_overlaps_nothing_and_is_close_to_the_optimum(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 40, 60)
    rows, starts = first_fit_decreasing(lengths, 50)
    for row in range(rows.max() + 1):
        inside = sorted((starts[i], starts[i] + lengths[i]) for i in np.flatnonzero(rows == row))
        assert inside[0][0] == 0
        assert inside[-1][1] <= 50
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(inside))
    assert rows.max() + 1 <= 11 / 9 * np.ceil(lengths.sum() / 50) + 6 / 9


def test_first_fit_decreasing_by_hand() -> None:
    rows, starts = first_fit_decreasing([2, 7, 5, 3, 3], 10)
    assert rows.tolist() == [1, 0, 1, 0, 1]
    assert starts.tolist() == [8, 0, 0, 7, 5]


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="11 found; a row has 10 columns"):
        first_fit_decreasing([3, 11], 10)


@pytest.mark.parametrize(("mini", "micro"), [(1, 8), (2, 4), (4, 8), (1, 32)])
def test_every_token_is_in_one_row_of_its_mini_batch(mini: int, micro: int) -> None:
    sampled = rollouts(1)
    rows = pack_rows(sampled, mini_batches=mini, micro_batch=micro)
    packing = rows.packing
    assert rows.tokens.shape == (P_ * G, S + T)
    found = 0
    for b in range(P_ * G):
        p, g = divmod(b, G)
        n, m = int(sampled.prompt_lengths[p]), int(sampled.lengths[p, g])
        r, last = divmod(int(packing.places[b, 0]), S + T - 1)
        columns = slice(last - n + 1, last + 1 + m)
        expected = np.concatenate([sampled.prompt_tokens[p, S - n :], sampled.tokens[p, g, :m]])
        np.testing.assert_array_equal(rows.tokens[r, columns], expected)
        np.testing.assert_array_equal(rows.positions[r, columns], np.arange(n + m))
        assert len(set(rows.segment_ids[r, columns])) == 1
        assert (rows.segment_ids[r] == rows.segment_ids[r, last]).sum() == n + m
        np.testing.assert_array_equal(packing.sources[r, last : last + m], b * T + np.arange(m))
        np.testing.assert_array_equal(packing.places[b, :m], r * (S + T - 1) + last + np.arange(m))
        assert r % mini == p % mini
        assert r // mini % (P_ * G // mini // micro) < packing.used
        found += m
    assert (packing.sources >= 0).sum() == found
    assert sorted(np.unique(rows.segment_ids)) == list(range(rows.segment_ids.max() + 1))


def test_few_micro_batches_hold_short_completions() -> None:
    sampled = dataclasses.replace(
        rollouts(),
        prompt_lengths=np.full(P_, 5, np.int32),
        lengths=np.full((P_, G), 3, np.int32),
    )
    # 16 rollouts of 8 tokens in each mini-batch, 3 in a row of 24: 6 rows, 2 in a micro-batch.
    assert pack_rows(sampled, mini_batches=2, micro_batch=2).packing.used == 3


# --- nothing depends on it ------------------------------------------------------------------


@functools.cache
def weights(seed: int, mesh):
    return init_params(MODEL, jax.random.key(seed), mesh)


@functools.cache
def scorer_of(mesh, mini: int, micro: int) -> Scorer:
    return Scorer(MODEL, mesh, rows=micro, mini_batches=mini, valid_vocab=VALID, chunk=7)


def scores_of(kind: str, rows, mesh, mini: int, micro: int) -> Scores:
    other, mine, scorer = weights(5, mesh), weights(0, mesh), scorer_of(mesh, mini, micro)
    length = T if rows.packing is None else S + T - 1
    old = scorer.log_probs(mine, rows, length, HEAT)
    support = of_support = hidden = None
    if kind == "topk":
        teacher, support, of_support = scorer.top_support(other, rows, 5, length, HEAT)
    elif kind == "full":
        teacher, hidden = scorer.hidden(other, rows, length, HEAT)
    else:
        teacher = scorer.log_probs(other, rows, length, HEAT)
    return Scores(
        old_log_probs=old,
        reference_log_probs=teacher,
        teacher_log_probs=teacher,
        support=support,
        support_log_probs=of_support,
        teacher_hidden=hidden,
    )


def step(kind: str, packed: bool, mesh=ONE_DEVICE, mini: int = 2, micro: int = 4, **changes):
    """Weights after one SGD step on each mini-batch, and their metrics."""
    sampled = rollouts()
    method = METHODS[changes.pop("method", "kdrl")]
    settings = {
        "aggregation": "group-token-mean",
        "kd_mask": "response",
        "scale": "group",
        "baseline": "mean",
        "overlong": (4, 1.0),
        "mask_truncated": False,
        "mask_final_eos": False,
    } | changes
    rewards = jnp.asarray(np.random.default_rng(3).integers(0, 2, (P_, G)), jnp.float32)
    with jax.set_mesh(mesh):
        rows = rows_of(sampled, mesh, packed, mini, micro)
        scores = scores_of(kind, rows, mesh, mini, micro)
        filled = jax.jit(
            lambda rows, sampled, scores: build_batch(
                rows,
                sampled,
                rewards,
                scores,
                jnp.float32(0.3),
                method=method,
                max_new_tokens=T,
                mini_batches=mini,
                **settings,
            )
        )(rows, put_batch(mesh, sampled), scores)
    optimizer = optax.sgd(1.0)
    update = make_update(
        MODEL,
        optimizer,
        mesh,
        objective=Objective(
            ratio=method.ratio, kd_estimator={"plain": "k2"}.get(kind, kind), tis=True
        ),
        micro_batches=P_ * G // mini // micro,
        valid_vocab=VALID,
        chunk=7,
    )
    state = init_state(weights(0, mesh), optimizer, mesh)
    numbers = make_hyper(
        mesh, beta=0.3, temperature=0.8, entropy_coef=0.01, reference_coef=0.1, tis_cap=2.0
    )
    head = None
    if kind == "full":
        head = jax.device_put(MODEL.head(weights(5, mesh)), replicated(mesh))
    used = rows.packing.used if packed else None
    found = []
    for index in range(mini):
        state, metrics = update(state, take_part(filled, index), numbers, head, used)
        found.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state.params), found


def assert_same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)
    for x, y in zip(a[1], b[1], strict=True):
        assert x == pytest.approx(y, abs=2e-5, rel=2e-5)


@pytest.mark.parametrize("kind", ["plain", "topk", "full"])
def test_packing_changes_no_loss_no_gradient_and_no_metric(kind: str) -> None:
    assert_same(step(kind, True), step(kind, False))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "reward_shaping", "mask_final_eos": True},
        {"method": "trrd", "aggregation": "seq-mean-token-sum-norm"},
        {"method": "sft", "aggregation": "token-mean"},
        {"method": "kdrl", "mask_truncated": True, "mask_final_eos": True, "kd_mask": "none"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_packing_changes_nothing_for_other_settings(changes: dict) -> None:
    assert_same(step("plain", True, **changes), step("plain", False, **changes))


@pytest.mark.parametrize("kind", ["plain", "full"])
def test_packing_changes_nothing_on_a_mesh(kind: str) -> None:
    packed = step(kind, True, MESHES[1], mini=2, micro=8)
    assert_same(packed, step(kind, False, ONE_DEVICE, mini=2, micro=16))


@pytest.mark.parametrize("mesh", MESHES, ids=["1", "2x2x2"])
def test_scores_of_packed_rows_are_those_of_each_alone(mesh) -> None:
    sampled, params, scorer = rollouts(4), weights(5, mesh), scorer_of(mesh, 2, 8)
    rows = rows_of(sampled, mesh, True, 2, 8)
    got = scorer.log_probs(params, rows, S + T - 1, HEAT)
    got = np.asarray(jax.jit(rows.packing.collect)(got))
    alone = rows_of(sampled, mesh, False, 2, 8)
    expected = np.asarray(scorer.log_probs(params, alone, T, HEAT))
    real = np.arange(T)[None, :] < sampled.lengths.reshape(-1, 1)
    np.testing.assert_allclose(got[real], expected[real], atol=1e-5)


def test_empty_micro_batches_are_not_computed() -> None:
    """What is in rows beyond `used` would show: here it gives NaN."""
    rows = pack_rows(rollouts(2, longest=3), mini_batches=1, micro_batch=4)
    scorer, params = scorer_of(ONE_DEVICE, 1, 4), weights(5, ONE_DEVICE)
    embedding = params["embed"]["embedding"].at[31].set(jnp.nan)
    params = {**params, "embed": {"embedding": embedding}}
    empty = np.arange(P_ * G) % (P_ * G // 4) >= rows.packing.used
    assert empty.any()
    rows = rows._replace(tokens=np.where(empty[:, None], 31, rows.tokens))
    got = scorer.log_probs(params, rows, S + T - 1, HEAT)
    np.testing.assert_array_equal(np.asarray(got)[empty], 0)
