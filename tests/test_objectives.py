"""Advantages, weights, rewards and methods, against literals and loops in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax.objectives import (
    AGGREGATIONS,
    METHODS,
    Method,
    group_advantages,
    kd_weights,
    overlong_penalty,
    shaped_rewards,
    token_weights,
)

# --- advantages --------------------------------------------------------------------------------


def test_advantages_literal():
    rewards = jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    expected = [[3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)], [1.0, 1.0, -1.0, -1.0]]
    for f in (group_advantages, jax.jit(group_advantages)):
        np.testing.assert_allclose(f(rewards), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_advantages_against_loops(rng, scale, baseline):
    rewards = rng.normal(size=(5, 4))
    expected = np.zeros_like(rewards)
    for p, group in enumerate(rewards):
        for i, r in enumerate(group):
            others = group if baseline == "mean" else np.delete(group, i)
            values = {"group": group, "batch": rewards, "none": None}[scale]
            sigma = 1.0 if values is None else np.sqrt(np.mean((values - values.mean()) ** 2))
            expected[p, i] = (r - others.mean()) / sigma
    found = group_advantages(rewards, scale=scale, baseline=baseline)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_teach_exactly_nothing(scale, baseline):
    """0.1 and 0.7 are not their own float32 means over 3, 7 or 11."""
    for size in (2, 3, 7, 11):
        rewards = np.stack([np.full(size, 0.1), np.full(size, 0.7), np.arange(size)])
        found = group_advantages(rewards, scale=scale, baseline=baseline)
        np.testing.assert_array_equal(found[:2], 0.0)
        assert np.asarray(found[2]).any()


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_reinforce_has_no_baseline(rng, scale):
    rewards = np.concatenate([rng.normal(size=(3, 4)), np.ones((1, 4))])
    found = group_advantages(rewards, scale=scale, baseline="none")
    sigma = rewards.std() if scale == "batch" else 1.0
    np.testing.assert_allclose(found, rewards / sigma, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^scale: 'group' found with baseline 'none'"):
        group_advantages(rewards, baseline="none")


def test_advantages_group_of_one():
    np.testing.assert_array_equal(group_advantages(np.array([[1], [0]])), 0.0)
    with pytest.raises(ValueError, match=r"rewards_P_G: G = 1"):
        group_advantages(np.ones((2, 1)), baseline="leave_one_out")


def test_advantages_errors():
    with pytest.raises(ValueError, match=r"^rewards_P_G: shape"):
        group_advantages(np.ones(4))
    with pytest.raises(ValueError, match=r"^scale: 'std'"):
        group_advantages(np.ones((2, 2)), scale="std")
    with pytest.raises(ValueError, match=r"^baseline: 'rloo'"):
        group_advantages(np.ones((2, 2)), baseline="rloo")


# --- weights -----------------------------------------------------------------------------------

# Rows 0 and 2 are of problem 7 (3 and 1 tokens), rows 1 and 3 of problem −4 (2 and none).
LENGTHS = np.array([3, 2, 1, 0])
GROUPS = np.array([7, -4, 7, -4])
MASK = np.arange(4) < LENGTHS[:, None]


@pytest.mark.parametrize(
    ("mode", "per_row"),
    [
        ("group-token-mean", [1 / 8, 1 / 4, 1 / 8, 0]),
        ("token-mean", [1 / 6, 1 / 6, 1 / 6, 0]),
        ("seq-mean-token-mean", [1 / 9, 1 / 6, 1 / 3, 0]),
        ("seq-mean-token-sum-norm", [1 / 30, 1 / 30, 1 / 30, 0]),
    ],
)
def test_weights_literal(mode, per_row):
    f = jax.jit(lambda mask, ids, n: token_weights(mask, ids, mode, max_length=n))
    expected = np.where(MASK, np.array(per_row)[:, None], 0)
    np.testing.assert_allclose(f(MASK, GROUPS, 10.0), expected, rtol=1e-6)
    np.testing.assert_allclose(
        token_weights(MASK.astype(np.int32), GROUPS, mode, max_length=10), expected, rtol=1e-6
    )


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_weights_against_loops(rng, mode):
    """The aggregate of random terms, by the definitions; groups of any size, in any order."""
    lengths = rng.integers(1, 7, 20)
    mask = np.arange(6) < lengths[:, None]
    ids = rng.integers(-3, 4, 20) * 1000
    x = rng.normal(size=mask.shape)
    rows = [x[i, :n] for i, n in enumerate(lengths)]
    expected = {
        "group-token-mean": np.mean(
            [np.concatenate([rows[i] for i in np.flatnonzero(ids == g)]).mean() for g in set(ids)]
        ),
        "token-mean": np.concatenate(rows).mean(),
        "seq-mean-token-mean": np.mean([r.mean() for r in rows]),
        "seq-mean-token-sum-norm": np.mean([r.sum() / 6 for r in rows]),
    }[mode]
    weights = np.asarray(token_weights(mask, ids, mode, max_length=6))
    np.testing.assert_allclose((weights * x).sum(), expected, rtol=1e-5)
    np.testing.assert_array_equal(weights[~mask], 0)
    order = rng.permutation(20)
    shuffled = token_weights(mask[order], ids[order], mode, max_length=6)
    np.testing.assert_allclose(shuffled, weights[order], rtol=1e-6)


def test_group_mean_is_not_token_mean():
    group, token = (token_weights(MASK, GROUPS, m) for m in ("group-token-mean", "token-mean"))
    assert np.abs(np.asarray(group - token)).max() > 0.04


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_rows_that_fill_a_batch_up_change_nothing(mode):
    """Empty rows, of a group of their own or of none: the weights of the others stay."""
    mask = np.concatenate([MASK, np.zeros((3, 4), bool)])
    filled = token_weights(mask, np.append(GROUPS, [99, 100, 7]), mode, max_length=4)
    np.testing.assert_array_equal(filled[:4], token_weights(MASK, GROUPS, mode, max_length=4))
    np.testing.assert_array_equal(filled[4:], 0)
    nothing = token_weights(np.zeros((2, 4), bool), np.array([0, 1]), mode, max_length=4)
    np.testing.assert_array_equal(nothing, 0)


def test_weights_errors():
    with pytest.raises(ValueError, match=r"^group_ids: shape \(3,\)"):
        token_weights(MASK, GROUPS[:3])
    with pytest.raises(ValueError, match=r"^completion_mask: shape \(4,\)"):
        token_weights(GROUPS, GROUPS)
    with pytest.raises(ValueError, match=r"^mode: 'mean' is unknown; use one of group-token-mean"):
        token_weights(MASK, GROUPS, "mean")
    with pytest.raises(ValueError, match=r"^max_length: missing"):
        token_weights(MASK, GROUPS, "seq-mean-token-sum-norm")


@pytest.mark.parametrize(
    ("mask", "kept"),
    [("none", [1, 1, 1, 1, 1]), ("response", [0, 1, 1, 1, 0]), ("group", [0, 1, 0, 1, 0])],
)
def test_kd_weights_literal(mask, kept):
    """Problem 7: solved once; problem −4: never; problem 3: always."""
    rewards, ids = np.array([1.0, 0.0, 0.0, 0.0, 0.5]), np.array([7, -4, 7, -4, 3])
    weights = np.arange(1.0, 11.0).reshape(5, 2)
    f = jax.jit(lambda *a: kd_weights(*a, mask))
    np.testing.assert_array_equal(f(weights, rewards, ids), weights * np.array(kept)[:, None])


def test_kd_weights_errors():
    with pytest.raises(ValueError, match=r"^mask: 'wrong'"):
        kd_weights(np.ones((4, 2)), GROUPS, GROUPS, "wrong")
    with pytest.raises(ValueError, match=r"^rewards: shape"):
        kd_weights(np.ones((4, 2)), np.ones((4, 2)), GROUPS)


# --- rewards -----------------------------------------------------------------------------------


def test_shaped_rewards_against_loops(rng):
    """r − β·Σℓ over the tokens of the response that the teacher has an opinion on."""
    rewards, mask = rng.integers(0, 2, (2, 3)).astype(float), rng.uniform(size=(6, 5)) > 0.3
    student, teacher = rng.normal(size=(2, 6, 5))
    teacher[0, 1] = teacher[3, 2] = np.nan
    mask[3, 2] = True
    expected = rewards.copy()
    for i, t in np.argwhere(mask & ~np.isnan(teacher)):
        expected[divmod(i, 3)] -= 0.3 * (student[i, t] - teacher[i, t])
    student[~mask], teacher[~mask] = np.inf, -np.inf
    found = jax.jit(shaped_rewards)(rewards, student, teacher, mask, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(shaped_rewards(rewards, student, teacher, mask, 0.0), rewards)
    into = jax.grad(lambda x: shaped_rewards(rewards, x, teacher, mask, 0.3).sum())
    np.testing.assert_array_equal(into(jnp.asarray(student)), 0.0)


def test_shaping_undoes_equal_rewards():
    """An all-wrong group is told apart by its distance to the teacher: the nearer is better."""
    student = jnp.zeros((2, 3))
    teacher = jnp.array([[-0.1] * 3, [-2.0] * 3])
    shaped = shaped_rewards(jnp.zeros((1, 2)), student, teacher, jnp.ones((2, 3)), 0.1)
    np.testing.assert_allclose(shaped, [[-0.03, -0.6]], rtol=1e-6)
    np.testing.assert_allclose(group_advantages(shaped), [[1.0, -1.0]], rtol=1e-4)


def test_shaped_rewards_errors():
    ones = np.ones((6, 4))
    with pytest.raises(
        ValueError, match=r"^teacher_log_probs: shape \(6, 3\) found; must be \(6, 4"
    ):
        shaped_rewards(np.ones((2, 3)), ones, ones[:, :3], ones, 0.1)
    with pytest.raises(ValueError, match=r"^mask: shape \(6, 4\) found; must be \(4, 4\)"):
        shaped_rewards(np.ones((2, 2)), ones[:4], ones[:4], ones, 0.1)
    with pytest.raises(ValueError, match=r"^beta: shape"):
        shaped_rewards(np.ones((2, 3)), ones, ones, ones, np.ones(2))


def test_overlong_penalty_of_dapo():
    """Eq. 13 with L_max = 20480 and L_cache = 4096."""
    lengths = jnp.array([0, 16384, 16385, 18432, 20479, 20480, 30000])
    expected = [0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1]
    for f in (overlong_penalty, jax.jit(overlong_penalty)):
        np.testing.assert_allclose(f(lengths, 20480, 4096, 1.0), expected, rtol=1e-6)
        np.testing.assert_allclose(f(lengths, 20480, 4096, 0.5), np.array(expected) / 2, rtol=1e-6)
        np.testing.assert_array_equal(f(lengths, 20480, 0, 1.0), 0.0)
    assert overlong_penalty(lengths.reshape(7, 1), 10, 5).shape == (7, 1)
    with pytest.raises(ValueError, match=r"^buffer: shape"):
        overlong_penalty(lengths, 20480, np.ones(7), 1.0)


# --- methods -----------------------------------------------------------------------------------


def test_methods_are_those_of_the_papers():
    """Six names; a slot that the teacher fills needs its log-probs, and it fills one."""
    assert set(METHODS) == {"grpo", "kd_rkl", "kdrl", "reward_shaping", "trrd", "sft"}
    for name, m in METHODS.items():
        uses = [m.kd, m.shaped, m.ratio == "trrd"]
        assert sum(uses) == m.scores, name
        assert not (m.policy and m.supervised), name
        assert (m.sampler == "teacher") == m.supervised, name
    assert not METHODS["kd_rkl"].policy
    assert METHODS["grpo"] == Method()
    assert len(set(METHODS.values())) == len(METHODS)
