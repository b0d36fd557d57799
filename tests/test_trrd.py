"""TRRD: enumeration on five tokens, its endpoints, and what the teacher may and may not do.

Mutations of objectives/trrd.py, each applied alone, and a test that then failed:

    α and 1 − α swapped
        test_value_against_loops
    no clamp
        test_value_against_loops
    log-ratio to the teacher negated
        test_value_against_loops
    straight through ignored
        test_expected_gradient
    straight through always
        test_expected_gradient
    nan of the teacher let through
        test_value_against_loops
    ρ in place of r
        test_value_against_loops
    importance weights ignored
        test_alpha_one_is_grpo_to_the_bit
    sign of the policy term
        test_value_against_loops
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    LENGTHS,
    close,
    finite_difference,
    loss_gradient,
    score,
    sequence_probs,
    sequences,
    table,
    token_values,
)

from kdrl_jax.objectives import kdrl_loss, trrd_loss

EPS = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
SHAPE = (6, 8)


def random_batch(rng, shape=SHAPE):
    """Log-probs and batch: a third of it padding, ratios and distances on both sides of all clips.

    Advantages are 0 here and there, and some tokens are without a teacher's opinion.
    """
    log_probs = -rng.exponential(1.0, shape)
    weights = rng.uniform(0.1, 1.0, shape) * (rng.uniform(size=shape) > 0.3)
    teacher = log_probs + rng.normal(size=shape) * 1.5
    teacher[rng.uniform(size=shape) < 0.1] = np.nan
    return log_probs, {
        "old_log_probs": log_probs + rng.normal(size=shape) * 0.3,
        "teacher_log_probs": teacher,
        "advantages": rng.normal(size=shape) * (rng.uniform(size=shape) > 0.2),
        "weights": weights / weights.sum(),
        "kd_weights": None,
    }


def namespace(batch):
    return types.SimpleNamespace(
        **{k: None if v is None else jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    )


def call(log_probs, batch, loss=trrd_loss, **options):
    return loss(jnp.asarray(log_probs, jnp.float32), namespace(batch), **(EPS | options))


def gradient(log_probs, batch, **options):
    f = jax.grad(lambda x: call(x, batch, **options)[0])
    return np.asarray(f(jnp.asarray(log_probs, jnp.float32)))


def token_term(log_p, old, teacher, advantage, alpha, clamp, low=0.2, high=0.28):
    """(min(rÂ, clip(r)Â), r, |ℓ| > clamp, clipped) of one token in float64."""
    ell = 0.0 if np.isnan(teacher) else log_p - teacher
    r = np.exp(alpha * (log_p - old) + (1 - alpha) * min(max(ell, -clamp), clamp))
    bounded = min(max(r, 1 - low), 1 + high)
    clipped = (advantage > 0 and r > 1 + high) or (advantage < 0 and r < 1 - low)
    return min(r * advantage, bounded * advantage), r, abs(ell) > clamp, clipped


@pytest.mark.parametrize("clamp_gradient", ["clamp", "straight_through"])
@pytest.mark.parametrize(("alpha", "clamp"), [(0.5, 1.0), (0.0, 0.7), (0.8, 2.0)])
def test_value_against_loops(rng, alpha, clamp, clamp_gradient):
    log_probs, batch = random_batch(rng)
    loss, metrics = call(log_probs, batch, alpha=alpha, clamp=clamp, clamp_gradient=clamp_gradient)
    expected = dict.fromkeys(
        ["loss", "policy/clip_frac", "trrd/ratio_mean", "trrd/clamped_frac", "kl/teacher"], 0.0
    ) | {"policy/ratio_mean": 0.0, "weights/sum": 0.0}
    for i in np.argwhere(batch["weights"] > 0):
        w, adv, old, teacher = (
            batch[k][tuple(i)]
            for k in ("weights", "advantages", "old_log_probs", "teacher_log_probs")
        )
        log_p = log_probs[tuple(i)]
        term, r, clamped, clipped = token_term(log_p, old, teacher, adv, alpha, clamp)
        expected["loss"] -= w * term
        expected["policy/clip_frac"] += w * clipped
        expected["trrd/ratio_mean"] += w * r
        expected["trrd/clamped_frac"] += w * clamped
        expected["kl/teacher"] += 0.0 if np.isnan(teacher) else w * (log_p - teacher)
        expected["policy/ratio_mean"] += w * np.exp(log_p - old)
        expected["weights/sum"] += w
    assert 0.05 < expected["trrd/clamped_frac"] < 0.95
    assert expected["policy/clip_frac"] > 0.05
    assert set(metrics) == {*expected, "loss/policy", "kl/teacher_k2", "kl/teacher_k3"}
    np.testing.assert_array_equal(loss, metrics["loss/policy"])
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_literal():
    """ρ = 2 and ℓ = ln 4 held at ½: r = √2·e^¼, clipped at 1.3; then ρ = 1, ℓ = −ln 4, Â = −1."""
    half = float(np.log(0.5))
    batch = types.SimpleNamespace(
        old_log_probs=jnp.array([2 * half, half]),
        teacher_log_probs=jnp.array([3 * half, -half]),
        advantages=jnp.array([1.0, -1.0]),
        weights=jnp.array([0.5, 0.5]),
    )
    log_probs = jnp.array([half, half])
    options = {"alpha": 0.5, "clamp": 0.5, "clip_eps_low": 0.5, "clip_eps_high": 0.3}
    loss, metrics = trrd_loss(log_probs, batch, **options)
    np.testing.assert_allclose(loss, -0.5 * 1.3 + 0.5 * np.exp(-0.25), rtol=1e-6)
    assert metrics["policy/clip_frac"] == 0.5
    assert metrics["trrd/clamped_frac"] == 1.0


# --- enumeration -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("clamp_gradient", ["clamp", "straight_through"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_expected_gradient(alpha, clamp_gradient, off_policy, length, rng):
    """Over every sequence, against a closed form that finite differences of J confirm.

    Straight through is the gradient of J with clamp(ℓ₀) + ℓ − ℓ₀ in place of clamp(ℓ), at ℓ₀ = ℓ.
    """
    student, teacher, clamp = table(0, length), table(1, length), 0.8
    old = student + table(3, length, scale=0.3) if off_policy else student
    weights = sequence_probs(old, length)
    advantages = rng.normal(size=sequences(length)[0].shape)
    old_values, teacher_values = token_values(old, length), token_values(teacher, length)
    at = token_values(student, length)

    def parts(x):
        ell, ell_at = token_values(x, length) - teacher_values, at - teacher_values
        bounded = np.clip(ell, -clamp, clamp)
        if clamp_gradient == "straight_through":
            bounded = np.clip(ell_at, -clamp, clamp) + ell - ell_at
        r = np.exp(alpha * (token_values(x, length) - old_values) + (1 - alpha) * bounded)
        return ell, r

    def objective(x):
        _, r = parts(x)
        bounded = np.clip(r, 0.8, 1.28)
        return (weights * np.minimum(r * advantages, bounded * advantages)).sum()

    ell, r = parts(student)
    moving = np.abs(ell) < clamp
    stopped = ((advantages > 0) & (r > 1.28)) | ((advantages < 0) & (r < 0.8))
    if length == 2 and (off_policy or alpha < 1):
        assert stopped.any()
        assert (moving & ~stopped).any()
        assert (~moving & ~stopped).any()
    share = alpha + (1 - alpha) * (moving | (clamp_gradient == "straight_through"))
    expected = score(student, length, np.where(stopped, 0.0, weights * advantages * r * share))
    np.testing.assert_allclose(expected, finite_difference(objective, student), atol=1e-8)
    found = loss_gradient(
        student,
        length,
        teacher=teacher,
        old=old if off_policy else None,
        weights=weights,
        advantages=advantages,
        loss=trrd_loss,
        alpha=alpha,
        clamp=clamp,
        clamp_gradient=clamp_gradient,
        **EPS,
    )
    close(-found, expected)


def test_another_teacher_gives_another_gradient():
    student, advantages = table(0, 2), np.linspace(-1, 1, 50).reshape(25, 2)
    one, other = (
        loss_gradient(
            student, 2, teacher=table(s, 2), weights=sequence_probs(student, 2),
            advantages=advantages, loss=trrd_loss, alpha=0.5, **EPS,
        )
        for s in (1, 4)
    )  # fmt: skip
    assert np.abs(one - other).max() > 1e-3


# --- endpoints and signs ------------------------------------------------------------------------


def extras(rng, log_probs):
    """Options and batch entries that use every other term as well."""
    entries = {
        "sampler_log_probs": log_probs + rng.normal(size=SHAPE) * 0.1,
        "reference_log_probs": log_probs + rng.normal(size=SHAPE) * 0.5,
    }
    entropy = jnp.asarray(rng.uniform(0, 2, SHAPE), jnp.float32)
    options = {"tis_cap": 1.05, "reference_coef": 0.1, "entropy": entropy, "entropy_coef": 0.01}
    return entries, options


@pytest.mark.parametrize(
    ("clamp_gradient", "on_policy", "more", "traced"),
    [
        ("clamp", False, False, False),
        ("clamp", True, False, False),
        ("clamp", False, True, True),
        ("straight_through", False, True, False),
        ("straight_through", True, True, False),
        ("straight_through", False, False, True),
    ],
)
def test_alpha_one_is_grpo_to_the_bit(rng, clamp_gradient, on_policy, more, traced):
    """Loss, every shared metric and the gradient of each token; with a teacher far away or broken.

    Operation by operation to the bit; two compiled programs, which need not fuse alike, to an ulp.
    """
    log_probs, batch = random_batch(rng)
    batch["teacher_log_probs"][0] = -1e30
    batch["teacher_log_probs"][1] = -np.inf
    batch["kd_weights"] = np.zeros(SHAPE)
    entries, options = extras(rng, log_probs) if more else ({}, {})
    batch |= entries | ({"old_log_probs": None} if on_policy else {})

    def run(loss, alpha=None, **own):
        own |= {} if alpha is None else {"alpha": alpha}
        f = functools.partial(call, batch=batch, loss=loss, **options, **own)
        return jax.value_and_grad(f, has_aux=True)(jnp.asarray(log_probs, jnp.float32))

    def trrd(alpha):
        return run(trrd_loss, alpha, clamp_gradient=clamp_gradient)

    (loss, metrics), grads = jax.jit(trrd)(1.0) if traced else trrd(1.0)
    (grpo, grpo_metrics), grpo_grads = run(kdrl_loss, beta=0.0)
    if not on_policy:
        assert metrics["policy/clip_frac"] > 0.05
    if traced:
        equal = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    else:
        equal = np.testing.assert_array_equal
    equal(loss, grpo)
    equal(grads, grpo_grads)
    assert np.abs(grads).max() > 0.01
    shared = set(grpo_metrics) - {"loss/kd", "kd/active_frac", "kd/masked_frac"}
    shared -= {"kl/distilled_sum", "kl/distilled_k2_sum", "kl/masked_sum"}
    assert shared == set(metrics) - {"trrd/ratio_mean", "trrd/clamped_frac"}
    for name in shared:
        equal(metrics[name], grpo_metrics[name])


@pytest.mark.parametrize("clamp_gradient", ["clamp", "straight_through"])
def test_the_teacher_never_turns_a_token_around(rng, clamp_gradient):
    """20,000 random tokens: ∂J/∂log π_θ is 0 or has the sign of Â; its size does change."""
    shape = (20_000,)
    log_probs, batch = random_batch(rng, shape)
    batch["weights"] = np.ones(shape)
    found, other = [], batch | {"teacher_log_probs": log_probs + rng.normal(size=shape) * 3}
    for alpha in (0.0, 0.6):
        for b in (batch, other):
            up = -gradient(log_probs, b, alpha=alpha, clamp_gradient=clamp_gradient)
            np.testing.assert_array_equal(np.sign(up)[up != 0], np.sign(b["advantages"])[up != 0])
            assert (up != 0).mean() > 0.1
            found.append(up)
    assert all(np.abs(x - y).max() > 0.1 for x, y in zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("clamp_gradient", ["clamp", "straight_through"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_no_advantage_no_gradient(rng, clamp_gradient, alpha):
    """A group that is all wrong teaches exactly nothing, however far the teacher: unlike KDRL."""
    log_probs, batch = random_batch(rng)
    batch["advantages"] = np.zeros(SHAPE)
    batch["teacher_log_probs"][0] = -1e4
    found = gradient(log_probs, batch, alpha=alpha, clamp_gradient=clamp_gradient)
    np.testing.assert_array_equal(found, 0.0)
    distilled = batch | {"kd_weights": np.where(np.isnan(batch["teacher_log_probs"]), 0, 1.0)}
    assert gradient(log_probs, distilled, loss=kdrl_loss, beta=0.1).any()


def test_alpha_zero_knows_no_old_student(rng):
    """log r is the clamped log-ratio to the teacher alone: the old student changes nothing."""
    log_probs, batch = random_batch(rng)
    moved = batch | {"old_log_probs": np.asarray(batch["old_log_probs"]) + 0.3}
    found, other = (gradient(log_probs, b, alpha=0.0) for b in (batch, moved))
    np.testing.assert_array_equal(found, other)
    assert np.abs(found).max() > 0.01
    assert np.abs(
        gradient(log_probs, batch, alpha=0.5) - gradient(log_probs, moved, alpha=0.5)
    ).any()
    far = batch | {"teacher_log_probs": log_probs - 2.0}  # beyond the clamp: no gradient at all
    np.testing.assert_array_equal(gradient(log_probs, far, alpha=0.0), 0.0)


@pytest.mark.parametrize("far", [3.0, -3.0])
def test_the_clamp_takes_the_teachers_part_alone(far):
    """Unclipped, |ℓ| > 1: ∂J/∂log π_θ is α·r·Â; straight through r·Â; inside the clamp r·Â."""
    for ell, clamp_gradient, share in [
        (far, "clamp", 0.7),
        (far, "straight_through", 1.0),
        (far / 10, "clamp", 1.0),
        (far / 10, "straight_through", 1.0),
    ]:
        batch = types.SimpleNamespace(
            old_log_probs=jnp.array([-1.2, -0.8]),
            teacher_log_probs=jnp.array([-1.0 - ell] * 2),
            advantages=jnp.array([2.0, -3.0]),
            weights=jnp.array([0.25, 0.5]),
        )

        def objective(x, batch=batch, clamp_gradient=clamp_gradient):
            return -trrd_loss(
                x, batch, alpha=0.7, clip_eps_low=None, clip_eps_high=None,
                clamp_gradient=clamp_gradient,
            )[0]  # fmt: skip

        found = jax.grad(objective)(jnp.array([-1.0, -1.0]))
        r = np.exp(0.7 * np.array([0.2, -0.2]) + 0.3 * np.clip(ell, -1, 1))
        np.testing.assert_allclose(found, [0.25, 0.5] * r * [2.0, -3.0] * share, rtol=1e-5)


def test_a_teacher_without_opinion(rng):
    """nan: that part of log r is 0, without gradient; the token still learns from its reward."""
    log_probs, batch = random_batch(rng)
    batch["teacher_log_probs"][:] = np.nan
    options = {"alpha": 0.4, "clip_eps_low": None, "clip_eps_high": None}
    found = gradient(log_probs, batch, **options)
    r = np.exp(0.4 * (log_probs - batch["old_log_probs"]))
    np.testing.assert_allclose(found, -batch["weights"] * batch["advantages"] * r * 0.4, rtol=1e-4)
    metrics = call(log_probs, batch, **options)[1]
    assert metrics["trrd/clamped_frac"] == 0
    assert metrics["kl/teacher"] == 0


# --- what it shares with kdrl_loss ---------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clamp_gradient", ["clamp", "straight_through"])
def test_masked_tokens_do_not_exist(rng, clamp_gradient, poison):
    log_probs, batch = random_batch(rng)
    entries, options = extras(rng, log_probs)
    batch |= entries
    none = batch["weights"] == 0

    def everything(log_probs, batch):
        f = functools.partial(
            call, batch=batch, alpha=0.5, clamp_gradient=clamp_gradient, **options
        )
        return jax.value_and_grad(f, has_aux=True)(jnp.asarray(log_probs, jnp.float32))

    dirty = {
        k: np.where(none, poison, v) for k, v in batch.items() if k != "weights" and v is not None
    }
    found = everything(np.where(none, poison, log_probs), batch | dirty)
    jax.tree.map(np.testing.assert_array_equal, found, everything(log_probs, batch))
    np.testing.assert_array_equal(found[1][none], 0.0)


def test_faults_at_trained_tokens_are_seen(rng):
    log_probs, batch = random_batch(rng)
    i = tuple(np.argwhere(batch["weights"] > 0)[0])
    for name in ("old_log_probs", "advantages"):
        broken = batch | {name: batch[name].copy()}
        broken[name][i] = np.nan
        assert np.isnan(call(log_probs, broken, alpha=0.5)[0])


def test_splits_add_up_and_settings_are_arrays(rng):
    log_probs, batch = random_batch(rng)
    traces = []

    @jax.jit
    def f(log_probs, batch, alpha, clamp):
        traces.append(1)
        return call(log_probs, batch, alpha=alpha, clamp=clamp)[1]

    arrays = {k: v for k, v in batch.items() if v is not None}
    whole = f(log_probs, arrays, 0.5, 1.0)
    other = [float(f(log_probs, arrays, *v)["loss"]) for v in ((0.9, 1.0), (0.5, 0.2))]
    assert len(traces) == 1
    assert len({*other, float(whole["loss"])}) == 3
    parts = [
        f(log_probs[rows], {k: v[rows] for k, v in arrays.items()}, 0.5, 1.0)
        for rows in (slice(0, 3), slice(3, 6))
    ]
    for name, value in whole.items():
        total = sum(part[name] for part in parts)
        np.testing.assert_allclose(total, value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_gradient_flows_through_log_probs_alone(rng):
    log_probs, batch = random_batch(rng)
    batch["teacher_log_probs"] = np.nan_to_num(batch["teacher_log_probs"], nan=-1.0)
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items() if v is not None}

    def loss(batch, alpha, clamp):
        return call(log_probs, batch, alpha=alpha, clamp=clamp)[0]

    for x in jax.tree.leaves(jax.grad(loss, (0, 1, 2))(arrays, 0.5, 1.0)):
        np.testing.assert_array_equal(x, 0.0)


def test_errors(rng):
    log_probs, batch = random_batch(rng)
    with pytest.raises(ValueError, match=r"^teacher_log_probs: None found; trrd needs a teacher"):
        call(log_probs, batch | {"teacher_log_probs": None}, alpha=0.5)
    with pytest.raises(ValueError, match=r"^clamp_gradient: 'identity' is unknown; use one of cla"):
        call(log_probs, batch, alpha=0.5, clamp_gradient="identity")
    for name in ("alpha", "clamp"):
        with pytest.raises(ValueError, match=rf"^{name}: shape \(2,\) found; must be \(\)"):
            call(log_probs, batch, **({"alpha": 0.5} | {name: np.ones(2)}))
    with pytest.raises(ValueError, match=r"^teacher_log_probs: shape \(6, 1\)"):
        call(log_probs, batch | {"teacher_log_probs": np.ones((6, 1))}, alpha=0.5)
    with pytest.raises(ValueError, match=r"^sampler_log_probs: None found"):
        call(log_probs, batch, alpha=0.5, tis_cap=2.0)
