"""`kdrl_loss` token by token in float64 NumPy, and what must not change it; the policy's terms.

Expected gradients are proved in test_gradients.py, which also lists mutations.
"""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    forward_kl_gradient,
    log_softmax,
    loss_gradient,
    prefix_probs,
    sequence_probs,
    table,
)

from kdrl_jax.objectives import (
    clipped_surrogate,
    estimator,
    importance_ratio,
    kdrl_loss,
    mismatch_kl,
)
from kdrl_jax.objectives.divergences import k3
from kdrl_jax.types import TrainBatch

SHAPE = (4, 6)
EPS = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}


def random_batch(rng, shape=SHAPE):
    """Log-probs, batch and entropies; a third of the tokens is padding, more is not distilled."""
    log_probs = -rng.exponential(1.0, shape)
    weights = rng.uniform(0.1, 1.0, shape) * (rng.uniform(size=shape) > 0.3)
    batch = {
        "old_log_probs": log_probs + rng.normal(size=shape) * 0.3,
        "teacher_log_probs": -rng.exponential(1.0, shape),
        "advantages": rng.normal(size=shape),
        "weights": weights / weights.sum(),
        "kd_weights": weights / weights.sum() * (rng.uniform(size=shape) > 0.4),
    }
    return log_probs, batch, rng.uniform(0.0, 2.0, shape)


def with_more(rng, log_probs, batch):
    """The batch with sampler and reference, and a divergence from distributions."""
    more = {
        "sampler_log_probs": log_probs + rng.normal(size=log_probs.shape) * 0.3,
        "reference_log_probs": log_probs + rng.normal(size=log_probs.shape) * 0.5,
    }
    return batch | more, rng.exponential(1.0, log_probs.shape)


def call(log_probs, batch, **options):
    batch = {k: None if v is None else jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    options = {
        k: jnp.asarray(v, jnp.float32) if isinstance(v, np.ndarray) else v
        for k, v in options.items()
    }
    return kdrl_loss(jnp.asarray(log_probs, jnp.float32), types.SimpleNamespace(**batch), **options)


def loops(
    log_probs,
    batch,
    *,
    beta,
    kd_estimator,
    low,
    high,
    entropy,
    entropy_coef,
    kd_divergence=None,
    policy_coef=1.0,
    reference_coef=0.0,
    tis_cap=None,
):
    """Loss and metrics token by token in float64, by the formulas of the docstring."""
    m = collections.defaultdict(float)
    for i in np.ndindex(log_probs.shape):
        w, kd_w, adv = batch["weights"][i], batch["kd_weights"][i], batch["advantages"][i]
        rho = np.exp(log_probs[i] - batch["old_log_probs"][i])
        ell = log_probs[i] - batch["teacher_log_probs"][i]
        bound = min(max(rho, 1 - low), 1 + high)
        estimates = {"k1": ell, "k2": ell**2 / 2, "k3": np.exp(-ell) + ell - 1}
        tis = 1.0
        if tis_cap is not None:
            raw = np.exp(batch["old_log_probs"][i] - batch["sampler_log_probs"][i])
            tis = min(raw, tis_cap)
            m["tis/weight_mean"] += w * tis
            m["tis/capped_frac"] += w * (raw > tis_cap)
        if kd_divergence is None:
            m["loss/kd"] += beta * tis * kd_w * rho * estimates[kd_estimator]
        else:
            m["loss/kd"] += beta * tis * kd_w * kd_divergence[i]
        if "reference_log_probs" in batch:
            d = log_probs[i] - batch["reference_log_probs"][i]
            m["loss/reference"] += reference_coef * tis * w * rho * (np.exp(-d) + d - 1)
            m["kl/reference"] += w * (np.exp(-d) + d - 1)
        m["loss/policy"] -= policy_coef * tis * w * min(rho * adv, bound * adv)
        m["loss/entropy"] -= entropy_coef * w * entropy[i]
        m["entropy/mean"] += w * entropy[i]
        m["policy/ratio_mean"] += w * rho
        m["policy/clip_frac"] += w * ((adv > 0 and rho > 1 + high) or (adv < 0 and rho < 1 - low))
        m["weights/sum"] += w
        m["kd/active_frac"] += kd_w
        m["kl/distilled_sum"] += w * ell * (kd_w != 0)
        m["kl/distilled_k2_sum"] += w * 0.5 * ell**2 * (kd_w != 0)
        m["kl/masked_sum"] += w * ell * (kd_w == 0)
        m["kd/masked_frac"] += w * (kd_w == 0)
        for k, value in estimates.items():
            m[{"k1": "kl/teacher"}.get(k, f"kl/teacher_{k}")] += w * value
    m["loss"] = sum(x for name, x in m.items() if name.startswith("loss/"))
    return dict(m)


def compare(log_probs, batch, entropy, eps, **options):
    loss, metrics = call(log_probs, batch, entropy=entropy, **options, **eps)
    low, high = eps.get("clip_eps_low", 1.0), eps.get("clip_eps_high", np.inf)
    expected = loops(log_probs, batch, low=low, high=high, entropy=entropy, **options)
    assert set(metrics) == set(expected)
    np.testing.assert_array_equal(loss, metrics["loss"])
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    return expected


@pytest.mark.parametrize("kd_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("eps", [EPS, {}])
def test_loss_against_loops(rng, kd_estimator, eps):
    log_probs, batch, entropy = random_batch(rng)
    expected = compare(
        log_probs, batch, entropy, eps, beta=0.3, kd_estimator=kd_estimator, entropy_coef=0.01
    )
    assert (expected["policy/clip_frac"] > 0.05) == bool(eps)


@pytest.mark.parametrize("kd_estimator", ["k1", "k2", "topk", "full"])
@pytest.mark.parametrize("tis_cap", [None, 1.2])
def test_every_option_against_loops(rng, kd_estimator, tis_cap):
    """Reference, weight of the policy term, importance weights, divergence of distributions.

    Some tokens are distilled only.
    """
    log_probs, batch, entropy = random_batch(rng)
    batch, divergence = with_more(rng, log_probs, batch)
    batch["kd_weights"] = batch["kd_weights"] + 0.05 * (batch["weights"] == 0)
    given = {"kd_divergence": divergence} if kd_estimator in ("topk", "full") else {}
    options = {"beta": 0.3, "entropy_coef": 0.01, "policy_coef": 0.4, "reference_coef": 0.7}
    options |= {"kd_estimator": kd_estimator, "tis_cap": tis_cap} | given
    expected = compare(log_probs, batch, entropy, EPS, **options)
    assert tis_cap is None or 0.05 < expected["tis/capped_frac"] < 0.6


def test_loss_literal():
    """Two tokens by hand: ρ = 2 and Â = 1, ρ = ½ and Â = −1, both stopped; ℓ = ln 2 and 0."""
    half = float(np.log(0.5))
    batch = types.SimpleNamespace(
        old_log_probs=jnp.array([2 * half, half]),
        teacher_log_probs=jnp.array([2 * half, 2 * half]),
        advantages=jnp.array([1.0, -1.0]),
        weights=jnp.array([0.5, 0.5]),
        kd_weights=jnp.array([0.5, 0.0]),
    )
    log_probs = jnp.array([half, 2 * half])
    loss, metrics = kdrl_loss(log_probs, batch, beta=0.1, clip_eps_low=0.2, clip_eps_high=0.3)
    np.testing.assert_allclose(metrics["loss/policy"], -0.5 * 1.3 + 0.5 * 0.8, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/kd"], 0.1 * 0.5 * 2 * np.log(2) ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(loss, -0.25 + 0.05 * np.log(2) ** 2, rtol=1e-6)
    assert metrics["policy/clip_frac"] == 1.0
    np.testing.assert_allclose(metrics["kl/teacher"], 0.5 * np.log(2), rtol=1e-6)


def test_on_policy_is_old_log_probs_equal_to_log_probs(rng):
    log_probs, batch, _ = random_batch(rng)
    implicit = batch | {"old_log_probs": None}
    explicit = batch | {"old_log_probs": log_probs}
    results = [
        jax.value_and_grad(lambda x, b=b: call(x, b, beta=0.3, **EPS)[0])(jnp.asarray(log_probs))
        for b in (implicit, explicit)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    metrics = call(log_probs, implicit, beta=0.3, **EPS)[1]
    np.testing.assert_allclose(metrics["policy/ratio_mean"], 1.0, rtol=1e-6)
    assert metrics["policy/clip_frac"] == 0


@pytest.mark.parametrize("kd_estimator", ["k1", "k2", "k3"])
def test_without_teacher_and_beta_zero_are_grpo(rng, kd_estimator):
    """No teacher, β = 0 (known or traced) with a broken teacher, no kd_weights.

    Equal to an ulp: two programs that the compiler need not fuse alike.
    """
    close = functools.partial(np.testing.assert_allclose, rtol=5e-7, atol=0)
    log_probs, batch, _ = random_batch(rng)
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    broken = jnp.full(SHAPE, -jnp.inf).at[0].set(jnp.nan)

    def grpo(x):
        ratio = jnp.exp(x - batch["old_log_probs"])
        term, _ = clipped_surrogate(ratio, batch["advantages"], 0.2, 0.28)
        return -jnp.sum(batch["weights"] * term)

    x = jnp.asarray(log_probs, jnp.float32)
    expected = jax.jit(jax.value_and_grad(grpo))(x)

    @jax.jit
    def found(x, batch, beta):
        return jax.value_and_grad(
            lambda x: kdrl_loss(
                x, types.SimpleNamespace(**batch), beta=beta, kd_estimator=kd_estimator, **EPS
            )[0]
        )(x)

    zeros = jnp.zeros(SHAPE)
    cases = [
        (batch | {"teacher_log_probs": None, "kd_weights": None}, 0.3),
        (batch | {"reference_log_probs": broken, "sampler_log_probs": broken}, 0.0),
        (batch | {"teacher_log_probs": None}, 0.3),
        (batch | {"teacher_log_probs": broken}, 0.0),
        (batch | {"teacher_log_probs": broken, "kd_weights": zeros}, 0.3),
        (batch | {"teacher_log_probs": zeros, "kd_weights": zeros}, 0.3),
    ]
    for changed, beta in cases:
        jax.tree.map(close, found(x, changed, beta), expected)
    metrics = kdrl_loss(x, types.SimpleNamespace(**cases[0][0]), beta=0.3)[1]
    assert not any(name.startswith("kl/") for name in metrics)


@pytest.mark.parametrize("kd_estimator", ["topk", "full"])
def test_beta_zero_does_not_read_the_distribution(rng, kd_estimator):
    """A broken divergence, a broken teacher: GRPO to the bit, and no gradient into it."""
    log_probs, batch, _ = random_batch(rng)
    broken = np.where(rng.uniform(size=SHAPE) > 0.5, np.nan, np.inf)

    def run(x, divergence, batch, **options):
        return call(x, batch, kd_divergence=divergence, beta=0.0, **options, **EPS)[0]

    x = jnp.asarray(log_probs, jnp.float32)
    expected = jax.value_and_grad(run)(x, None, batch)
    loss, (gradient, into) = jax.value_and_grad(run, (0, 1))(
        x,
        jnp.asarray(broken, jnp.float32),
        batch | {"teacher_log_probs": broken},
        kd_estimator=kd_estimator,
    )
    jax.tree.map(np.testing.assert_array_equal, (loss, gradient), expected)
    np.testing.assert_array_equal(into, 0.0)


def test_without_a_teacher_there_is_no_distillation(rng):
    """Of any estimator: a run without teacher needs no other one."""
    log_probs, batch, _ = random_batch(rng)
    batch |= {"teacher_log_probs": None, "kd_weights": None}
    for name in ("k2", "topk"):
        assert call(log_probs, batch, beta=0.3, kd_estimator=name)[1]["loss/kd"] == 0


def test_policy_coefficient_is_of_the_policy_term_alone(rng):
    """Traced; 0 leaves the gradient of pure distillation, whatever the rewards."""
    log_probs, batch, _ = random_batch(rng)

    @jax.jit
    def gradient(x, advantages, policy_coef):
        b = batch | {"advantages": advantages}
        return jax.grad(lambda x: call(x, b, beta=0.3, policy_coef=policy_coef, **EPS)[0])(x)

    x = jnp.asarray(log_probs, jnp.float32)
    advantages = jnp.asarray(batch["advantages"], jnp.float32)
    distilled = gradient(x, jnp.zeros(SHAPE), 1.0)
    np.testing.assert_array_equal(gradient(x, advantages, 0.0), distilled)
    joint, half = (gradient(x, advantages, c) for c in (1.0, 0.5))
    assert np.abs(joint - distilled).max() > 0.01
    np.testing.assert_allclose(half, (joint + distilled) / 2, rtol=1e-5, atol=1e-7)


def test_truncated_weights_correct_the_sampler():
    """Five tokens drawn by a sampler that is not quite π_old: exactly π_old's gradient, uncapped.

    Capped, each token weighs min(π_old, cap·π_sampler). A cap of 0 is no switch: nothing weighs.
    """
    old, sampler, student = (log_softmax(table(seed, 1))[0] for seed in (0, 1, 2))
    advantages = np.array([1.0, -2.0, 0.5, 0.0, 3.0])

    def gradient(weights, **options):
        batch = {"old_log_probs": old, "sampler_log_probs": sampler, "weights": weights}
        batch |= {"advantages": advantages, "teacher_log_probs": None, "kd_weights": None}
        f = jax.grad(lambda x: call(x, batch, beta=0.0, **options)[0])
        return np.asarray(f(jnp.asarray(student, jnp.float32)))

    p_old, p_sampler = np.exp(old), np.exp(sampler)
    expected = -p_old * np.exp(student - old) * advantages
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    close(gradient(p_sampler, tis_cap=1e6), expected)
    assert np.abs(gradient(p_sampler) - expected).max() > 0.1
    raw = p_old / p_sampler
    assert (raw > 1.5).any()
    assert (raw < 1.5).any()
    close(gradient(p_sampler, tis_cap=1.5), expected * np.minimum(raw, 1.5) / raw)
    close(gradient(p_sampler, tis_cap=0.0), 0.0)


@pytest.mark.parametrize("off_policy", [False, True])
def test_reference_gradient(off_policy):
    """k3 as a loss: in expectation the gradient of KL(π_ref‖π_θ), off-policy by sg(ρ)."""
    student, reference = table(0, 2), table(1, 2)
    old = table(2, 2) if off_policy else student
    found = loss_gradient(
        student,
        2,
        teacher=student,
        reference=reference,
        old=old if off_policy else None,
        weights=sequence_probs(old, 2),
        beta=0.0,
        reference_coef=0.3,
    )
    expected = 0.3 * forward_kl_gradient(student, reference, prefix_probs(old))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kd_estimator", ["k1", "k2", "k3", "full"])
def test_masked_tokens_do_not_exist(rng, kd_estimator, poison):
    """Anything at weight 0, in any array: same loss, metrics and gradients, to the bit."""
    log_probs, batch, entropy = random_batch(rng)
    batch, divergence = with_more(rng, log_probs, batch)
    none, no_kd = batch["weights"] == 0, batch["kd_weights"] == 0
    assert (no_kd & ~none).any()
    options = EPS | {"entropy_coef": 0.01, "reference_coef": 0.2, "tis_cap": 1.2}

    def everything(log_probs, batch, entropy, divergence=divergence):
        def loss(x, h, d):
            given = {"kd_divergence": d} if kd_estimator == "full" else {}
            return call(x, batch, beta=0.3, kd_estimator=kd_estimator, entropy=h,
                        **given, **options)  # fmt: skip

        args = (jnp.asarray(x, jnp.float32) for x in (log_probs, entropy, divergence))
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args)

    clean = everything(log_probs, batch, entropy)
    dirty = {k: np.where(none, poison, v) for k, v in batch.items() if "weights" not in k}
    found = everything(
        np.where(none, poison, log_probs),
        batch | dirty,
        np.where(none, poison, entropy),
        np.where(no_kd, poison, divergence),
    )
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    gradient, _, into_divergence = map(np.asarray, found[1])
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[none], 0.0)
    np.testing.assert_array_equal(into_divergence[no_kd], 0.0)
    assert into_divergence.any() == (kd_estimator == "full")

    # Trained on but not distilled: a teacher without an opinion leaves the loss alone, and is
    # left out of kl/teacher.
    silent = np.where(no_kd, np.nan, batch["teacher_log_probs"])
    (loss, metrics), gradients = everything(
        log_probs, batch | {"teacher_log_probs": silent}, entropy
    )
    jax.tree.map(np.testing.assert_array_equal, (loss, gradients), (clean[0][0], clean[1]))
    ell = np.where(no_kd, 0, log_probs - batch["teacher_log_probs"])
    np.testing.assert_allclose(metrics["kl/teacher"], (batch["weights"] * ell).sum(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl/distilled_sum"], metrics["kl/teacher"], rtol=1e-4)
    assert metrics["kl/masked_sum"] == metrics["kd/masked_frac"] == 0


@pytest.mark.parametrize("name", ["log_probs", "old", "teacher", "advantages"])
def test_faults_at_trained_tokens_are_seen(rng, name):
    log_probs, batch, _ = random_batch(rng)
    i = tuple(np.argwhere(batch["kd_weights"] > 0)[0])
    arrays = {"log_probs": log_probs, "old": batch["old_log_probs"]}
    arrays |= {"teacher": batch["teacher_log_probs"], "advantages": batch["advantages"]}
    arrays[name][i] = np.nan
    assert np.isnan(call(log_probs, batch, beta=0.3, **EPS)[0])


def test_splits_add_up(rng):
    """Loss, gradient and every metric of a batch are sums over any micro-batches of it."""
    log_probs, batch, entropy = random_batch(rng, (12, 5))
    batch, _ = with_more(rng, log_probs, batch)
    options = EPS | {"beta": 0.3, "entropy_coef": 0.01, "reference_coef": 0.2, "tis_cap": 1.2}

    @jax.jit
    def sums(log_probs, batch, entropy):
        return jax.value_and_grad(
            lambda x: call(x, batch, entropy=entropy, **options), has_aux=True
        )(log_probs)

    def everything(rows):
        args = (log_probs, batch, entropy)
        return sums(*jax.tree.map(lambda x: jnp.asarray(x[rows], jnp.float32), args))

    (_, metrics), gradient = everything(np.arange(12))
    order = rng.permutation(12)
    for sizes in ([1, 5, 1, 5], [1] * 12):
        parts = np.split(order, np.cumsum(sizes)[:-1])
        results = [everything(rows) for rows in parts]
        total = jax.tree.map(lambda *x: np.sum(x), *[m for (_, m), _ in results])
        assert set(total) == set(metrics)
        for name in metrics:
            np.testing.assert_allclose(
                total[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name
            )
        for rows, (_, part) in zip(parts, results, strict=True):
            np.testing.assert_allclose(part, gradient[rows], rtol=1e-6, atol=1e-8)


def test_packing_and_padding_change_nothing(rng):
    """The same tokens as one row, as a cube, or scattered among padding."""
    log_probs, batch, _ = random_batch(rng)
    _, expected = call(log_probs, batch, beta=0.3, **EPS)

    places = rng.permutation(40)[:24]

    def scattered(x, fill):
        out = fill.copy()
        out[places] = x.ravel()
        return out.reshape(8, 5)

    layouts = [
        (np.ravel, np.ravel),
        (lambda x: x.reshape(2, 3, 4), lambda x: x.reshape(2, 3, 4)),
        (lambda x: scattered(x, rng.normal(size=40)), lambda x: scattered(x, np.zeros(40))),
    ]
    for lay, lay_weights in layouts:
        laid = {k: (lay_weights if "weights" in k else lay)(v) for k, v in batch.items()}
        _, found = call(lay(log_probs), laid, beta=0.3, **EPS)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_schedule_compiles_once(rng):
    """β, ε and all coefficients are arrays: new values, same program, new loss."""
    log_probs, batch, entropy = random_batch(rng)
    batch, _ = with_more(rng, log_probs, batch)
    traces = []

    @jax.jit
    def loss(settings):
        traces.append(1)
        return call(log_probs, batch, entropy=entropy, **settings)[0]

    first = EPS | {"beta": 0.3, "entropy_coef": 0.01, "policy_coef": 1.0}
    first |= {"reference_coef": 0.1, "tis_cap": 1.1}
    changes = {"beta": 0.0, "clip_eps_low": 0.05, "clip_eps_high": 0.05, "entropy_coef": 0.0}
    changes |= {"policy_coef": 0.0, "reference_coef": 0.0, "tis_cap": 2.0}
    values = [first, *(first | {name: value} for name, value in changes.items())]
    found = [float(loss(v)) for v in values]
    assert len(traces) == 1
    assert len(set(found)) == len(found)
    for value, settings in zip(found, values, strict=True):
        direct = call(log_probs, batch, entropy=entropy, **settings)[0]
        np.testing.assert_allclose(value, direct, rtol=1e-5)


def test_gradient_flows_through_log_probs_and_entropy_alone(rng):
    log_probs, batch, entropy = random_batch(rng)
    batch, _ = with_more(rng, log_probs, batch)
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    names = ("beta", "entropy_coef", "policy_coef", "reference_coef", "tis_cap")

    def loss(batch, settings, entropy):
        return call(log_probs, batch, entropy=entropy, **settings, **EPS)[0]

    settings = dict(zip(names, (0.3, 0.01, 0.5, 0.2, 1.1), strict=True))
    *others, gradient = jax.grad(loss, (0, 1, 2))(
        batch, settings, jnp.asarray(entropy, jnp.float32)
    )
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), others)
    np.testing.assert_allclose(gradient, -0.01 * batch["weights"], rtol=1e-6)


def test_takes_a_train_batch_and_low_precision(rng):
    log_probs, batch, _ = random_batch(rng)
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    empty = jnp.zeros(SHAPE, jnp.int32)
    record = TrainBatch(
        tokens=empty, positions=empty, segment_ids=empty,
        sampler_log_probs=arrays["old_log_probs"], **arrays,
    )  # fmt: skip
    loss, _ = kdrl_loss(jnp.asarray(log_probs, jnp.float32), record, beta=0.3)
    np.testing.assert_array_equal(loss, call(log_probs, batch, beta=0.3)[0])
    coarse, metrics = kdrl_loss(jnp.asarray(log_probs, jnp.bfloat16), record, beta=0.3)
    assert {x.dtype for x in metrics.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(coarse, loss, rtol=0.1)


@pytest.mark.parametrize(
    "name",
    [
        "old_log_probs",
        "teacher_log_probs",
        "reference_log_probs",
        "sampler_log_probs",
        "advantages",
        "weights",
        "kd_weights",
    ],
)
def test_errors_name_the_array(rng, name):
    log_probs, batch, _ = random_batch(rng)
    batch, _ = with_more(rng, log_probs, batch)
    with pytest.raises(ValueError, match=rf"^{name}: shape \(4, 1\) found; must be \(4, 6\)"):
        call(log_probs, batch | {name: batch[name][:, :1]}, beta=0.1, tis_cap=2.0)


def test_other_errors(rng):
    log_probs, batch, entropy = random_batch(rng)
    with pytest.raises(ValueError, match=r"^entropy: shape \(4,\)"):
        call(log_probs, batch, beta=0.1, entropy=entropy[:, 0], entropy_coef=0.1)
    for coef in (0.1, np.ones(())):
        with pytest.raises(ValueError, match=r"^entropy: None found"):
            call(log_probs, batch, beta=0.1, entropy_coef=coef)
    with pytest.raises(ValueError, match=r"^beta: shape"):
        call(log_probs, batch, beta=np.ones(SHAPE))
    with pytest.raises(ValueError, match=r"^weights: shape"):
        call(log_probs, batch | {"weights": None}, beta=0.1)
    with pytest.raises(ValueError, match=r"^log_probs: dtype int32"):
        kdrl_loss(jnp.zeros(2, jnp.int32), types.SimpleNamespace(
            **dict.fromkeys(batch, jnp.zeros(2))), beta=0.0)  # fmt: skip
    with pytest.raises(ValueError, match=r"^kd_estimator: 'mse' is unknown; use one of k1, k2, k3"):
        call(log_probs, batch, beta=0.1, kd_estimator="mse")
    with pytest.raises(ValueError, match=r"^kd_estimator: 'k1_loss'"):
        estimator("k1_loss")
    for name in ("beta", "policy_coef", "reference_coef", "tis_cap"):
        with pytest.raises(ValueError, match=rf"{name}: shape \(2,\) found; must be \(\)"):
            call(log_probs, batch, **({"beta": 0.1} | {name: np.ones(2)}))
    with pytest.raises(ValueError, match=r"^reference_log_probs: None found; must be given for th"):
        call(log_probs, batch, beta=0.1, reference_coef=0.1)
    with pytest.raises(ValueError, match=r"^sampler_log_probs: None found; must be given for"):
        call(log_probs, batch, beta=0.1, tis_cap=2.0)


@pytest.mark.parametrize("name", ["topk", "full"])
def test_estimators_that_need_more_than_the_teacher_gives(rng, name):
    log_probs, batch, _ = random_batch(rng)
    with pytest.raises(ValueError, match=rf"'{name}' needs the teacher's distribution, more than"):
        call(log_probs, batch, beta=0.1, kd_estimator=name)
    with pytest.raises(ValueError, match=rf"'{name}' needs the teacher's distribution, more than"):
        estimator(name)
    for other in ("k1", "k2", "k3"):
        with pytest.raises(ValueError, match=r"^kd_divergence: given with kd_estimator '" + other):
            call(log_probs, batch, beta=0.1, kd_estimator=other, kd_divergence=np.ones(SHAPE))
    with pytest.raises(ValueError, match=r"^kd_divergence: shape \(4,\)"):
        call(log_probs, batch, beta=0.1, kd_estimator=name, kd_divergence=np.ones(4))


# --- numerics ----------------------------------------------------------------------------------


def test_k3_near_zero():
    """expm1 keeps k3 at its value, ½ℓ² to first order, where e^x − 1 has only noise."""
    size = np.geomspace(1e-8, 1e-3, 200).astype(np.float32)
    ell = np.concatenate([size, -size])
    exact = np.expm1(-ell.astype(np.float64)) + ell
    found = np.asarray(estimator("k3")(jnp.asarray(ell), jnp.ones(400)))
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-10)
    assert found.min() > -1e-12
    noisy = np.exp(-ell) + ell - np.float32(1)
    assert np.abs(noisy - exact).max() > 3e-8
    assert noisy.min() < -1e-8


def test_k3_clamp_is_that_of_verl():
    """Value and gradient of clamp(e^{−ℓ} + ℓ − 1, −10, 10): no gradient below −2.61, above 11."""
    ell = np.array([-30.0, -2.62, -2.60, -1.0, 0.5, 10.9, 11.1, 40.0], np.float32)
    wide = ell.astype(np.float64)
    expected = np.minimum(np.exp(-wide) + wide - 1, 10.0)
    term, gradient = jax.vmap(jax.value_and_grad(lambda x: k3(x, jnp.ones(()), clamp=10.0)))(ell)
    np.testing.assert_allclose(term, expected, rtol=1e-5)
    slope = np.where((wide > -2.61) & (wide < 11), 1 - np.exp(-wide), 0.0)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)
    np.testing.assert_array_equal(k3(ell, 1.0, clamp=None), k3(ell, 1.0))
    assert np.isnan(k3(jnp.float32(jnp.nan), 1.0, clamp=10.0))  # a fault is seen


def test_far_apart_stays_finite():
    """A ratio or a k3 that would overflow float32 is held at e^20."""
    far = jnp.array([-200.0, -0.1])
    ratio = importance_ratio(far[::-1], far)
    np.testing.assert_allclose(ratio, [np.exp(20.0), np.exp(-20.0)], rtol=1e-5)
    batch = types.SimpleNamespace(
        old_log_probs=far[::-1],
        teacher_log_probs=far[::-1],
        advantages=jnp.array([0.0, 1.0]),
        weights=jnp.full(2, 0.5),
        kd_weights=jnp.full(2, 0.5),
    )
    for name in ("k1", "k2", "k3"):
        loss = jax.value_and_grad(
            lambda x, n=name: kdrl_loss(x, batch, beta=0.1, kd_estimator=n, **EPS), has_aux=True
        )
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss(far)))


def test_mismatch_kl(rng):
    log_probs = -rng.exponential(1.0, SHAPE)
    sampler = log_probs + rng.normal(size=SHAPE) * 0.1
    weights = rng.uniform(size=SHAPE) * (rng.uniform(size=SHAPE) > 0.3)
    d = log_probs - sampler
    expected = (weights * (np.exp(d) - 1 - d)).sum()
    sampler[weights == 0] = np.nan
    args = [jnp.asarray(x, jnp.float32) for x in (log_probs, sampler, weights)]
    np.testing.assert_allclose(mismatch_kl(*args), expected, rtol=1e-4)
    assert mismatch_kl(args[0], args[0], args[2]) == 0
    with pytest.raises(ValueError, match=r"^sampler_log_probs: shape"):
        mismatch_kl(args[0], args[1][:2], args[2])
