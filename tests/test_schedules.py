"""Schedules: literals, a loop for the adaptive one, resumption, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax.objectives import (
    SCHEDULES,
    AdaptiveEntropy,
    Trend,
    alpha_schedule,
    beta_schedule,
    phase_schedule,
)
from kdrl_jax.types import UserError


def test_beta_of_the_paper():
    """5e-3 → 1e-3 with δ = 5e-5: 80 steps down, then flat."""
    schedule = beta_schedule("linear", 5e-3, 1e-3, 5e-5)
    for step, value in [(0, 5e-3), (1, 4.95e-3), (79, 1.05e-3), (80, 1e-3), (1000, 1e-3)]:
        assert schedule(step) == pytest.approx(value)
        np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), value, rtol=1e-5)
    assert beta_schedule("constant", 2e-3)(10**6) == 2e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_python_step_gives_a_python_float(name):
    """With and without a trend; and no array is made, for the loop forbids transfers."""
    schedule = beta_schedule(name, 1, 0, 0, phases=((0, 1), (5, 0)))
    with jax.transfer_guard("disallow"):
        for trend in (None, Trend(), Trend().observe(0.5, 0.2)):
            for step in (0, 7):
                assert type(schedule(step, trend)) is float
        assert type(schedule(3)) is float


# --- adaptive ------------------------------------------------------------------------------------


def history(rng, steps=60):
    """KL that falls from 0.4, rewards that rise and then fall."""
    t = np.arange(steps)
    kl = 0.1 + 0.3 * np.exp(-t / 15) + rng.normal(size=steps) * 0.02
    return kl, 0.6 - 0.02 * np.abs(t - 25) + rng.normal(size=steps) * 0.01


def betas(kl, reward, schedule, trend=None):
    trend, found = trend or Trend(), []
    for step, pair in enumerate(zip(kl, reward, strict=True)):
        found.append(schedule(step, trend))
        trend = trend.observe(*pair)
    return np.array(found), trend


def test_adaptive_against_a_loop(rng):
    """The docstring's formulas in closed form: moving averages as weighted sums of the past."""
    kl, reward = history(rng)
    init, low, delta = 0.2, 0.01, 0.1
    found, _ = betas(kl, reward, beta_schedule("adaptive", init, low, delta))

    def average(x, rate):
        n = len(x)
        weights = rate * (1 - rate) ** np.arange(n - 1, -1, -1)
        weights[0] = (1 - rate) ** (n - 1)
        return weights @ x

    expected, stalled = [init], 0
    for n in range(1, len(kl)):
        if n > 1:
            stalled += average(reward[:n], 0.2) <= average(reward[:n], 0.05)
        left = min(1.0, average(kl[:n], 0.2) / kl[0])
        expected.append(max(low, init * left * (1 - delta) ** stalled))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert 10 < stalled < 40
    assert found[-1] == low
    assert (found[:20] > low).all()


def test_adaptive_never_exceeds_the_distance_left(rng):
    kl, reward = history(rng)
    trend, schedule = Trend(), beta_schedule("adaptive", 0.3, 0.0, 0.02)
    for step, pair in enumerate(zip(kl, reward, strict=True)):
        trend = trend.observe(*pair)
        beta = schedule(step + 1, trend)
        assert 0 < beta <= 0.3 * min(1.0, trend.kl / trend.kl_first)


def test_adaptive_follows_the_reward():
    """While it rises β keeps to the distance; each step without progress takes a share off."""
    schedule = beta_schedule("adaptive", 1.0, 0.0, 0.25)
    rising, trend = betas([0.5] * 10, np.arange(10), schedule)
    np.testing.assert_array_equal(rising, 1.0)
    flat, _ = betas([0.5] * 10, [0.0] * 10, schedule)
    np.testing.assert_allclose(flat, [1, 1, *0.75 ** np.arange(1, 9)])
    falling, _ = betas([0.5] * 3, [-50.0] * 3, schedule, trend)
    np.testing.assert_allclose(falling, 0.75 ** np.arange(3))


def test_adaptive_stays_at_init_when_the_distance_grows():
    growing, _ = betas([0.1, 0.2, 0.5, 0.9], range(4), beta_schedule("adaptive", 0.7, 0.1, 0.5))
    np.testing.assert_array_equal(growing, 0.7)


@pytest.mark.parametrize("first", [0.0, -0.01])
def test_adaptive_with_no_distance_at_first(first):
    """A first estimate of KL at or below 0 (the two are one model, or noise) sets no ceiling."""
    schedule = beta_schedule("adaptive", 1.0, 0.1, 0.5)
    assert schedule(1, Trend().observe(first, 0.0)) == 1.0
    assert schedule(1, Trend().observe(0.2, 0.0).observe(-9.0, 1.0)) == 0.1


def test_a_resumed_trend_continues_exactly(rng):
    """Through JSON after every step: the same β to the bit."""
    kl, reward = history(rng)
    schedule = beta_schedule("adaptive", 0.2, 0.0, 0.1)
    whole, end = betas(kl, reward, schedule)
    trend, found = Trend(), []
    for step, pair in enumerate(zip(kl, reward, strict=True)):
        found.append(schedule(step, trend))
        trend = Trend(*json.loads(json.dumps(list(trend.observe(*map(np.float32, pair))))))
        assert all(type(x) is float for x in trend)
    again, end_again = betas(np.float32(kl), np.float32(reward), schedule)
    np.testing.assert_array_equal(found, again)
    assert trend == end_again
    np.testing.assert_allclose(trend, end, rtol=1e-5)
    np.testing.assert_allclose(whole, again, rtol=1e-5)


# --- phases --------------------------------------------------------------------------------------


def test_alpha_moves_in_a_line():
    alpha = alpha_schedule(0.25, 1.0, 30)
    found = [alpha(step) for step in (0, 10, 20, 30, 1000)]
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1.0, 1.0])
    assert {alpha_schedule(0.5, 1.0, 0)(step) for step in (0, 7, 10**6)} == {0.5}
    assert type(alpha(3, Trend())) is float


def test_adaptive_entropy_against_a_loop():
    """Skywork-OR1's rule; the trend goes through JSON, as through a checkpoint."""
    control = AdaptiveEntropy(start=1e-4, target=0.2, delta=1e-4, max=3e-4)
    trend, c, found, expected = Trend(), 1e-4, [control.coefficient(Trend())], [1e-4]
    for entropy in (0.1, 0.1, 0.1, 0.3, 0.2, 0.3, 0.3, 0.3, 0.3, 0.1):
        trend = Trend(
            *json.loads(json.dumps(list(control.observe(trend.observe(1.0, 0.5), entropy))))
        )
        found.append(control.coefficient(trend))
        c += 1e-4 if entropy < 0.2 else -1e-4 if entropy > 0.2 else 0.0
        c = min(max(c, 0.0), 3e-4)
        expected.append(c if entropy <= 0.2 else 0.0)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert max(found) == pytest.approx(3e-4)
    constant = AdaptiveEntropy(start=1e-3, target=0.0, delta=1e-4, max=5e-3)
    assert constant.observe(trend, 0.1) is trend
    assert constant.coefficient(Trend()) == 1e-3


def test_phases():
    """Distil first, then reinforce: β and the weight of the policy term change places."""
    beta = beta_schedule("phases", phases=((0, 1e-2), (100, 0.0)))
    policy = phase_schedule([[0, 0.0], [100, 1]], 1.0)  # as JSON gives it
    for step, b, p in [(0, 1e-2, 0), (99, 1e-2, 0), (100, 0, 1), (10**6, 0, 1)]:
        assert beta(step) == b
        assert policy(step) == p
        assert type(policy(step, Trend())) is float
    assert phase_schedule((), 0.5)(7) == 0.5
    assert phase_schedule(())(0) == 1.0
    three = phase_schedule(((0, 1), (2, 3), (3, 2)))
    assert [three(step) for step in range(5)] == [1, 1, 3, 2, 2]


# --- errors --------------------------------------------------------------------------------------


def test_beta_errors_all_at_once():
    with pytest.raises(UserError) as e:
        beta_schedule("cosine", -1.0, float("nan"), -2.0)
    assert [p.split(":")[0] for p in e.value.problems] == [
        "beta.schedule",
        "beta.init",
        "beta.min",
        "beta.delta",
    ]
    assert "use one of constant, linear, adaptive, phases" in e.value.problems[0]
    assert beta_schedule("constant", 0.1, 0.2)(0) == 0.1


@pytest.mark.parametrize("name", ["linear", "adaptive"])
def test_a_floor_above_the_start(name):
    with pytest.raises(UserError) as e:
        beta_schedule(name, 0.1, 0.2, 0.0)
    assert e.value.problems == [
        "beta.min: 0.2 is above beta.init=0.1; β only falls, so use at most that"
    ]


def test_adaptive_takes_a_share():
    with pytest.raises(UserError, match=r"^beta.delta: 1.5 is a share of β for adaptive; use at m"):
        beta_schedule("adaptive", 1.0, 0.0, 1.5)
    beta_schedule("linear", 1.0, 0.0, 1.5)


@pytest.mark.parametrize(
    ("phases", "problems"),
    [
        (((5, 1.0),), ["the first phase is from step 5; it must be from 0"]),
        (((0, 1.0), (9, 1.0), (9, 2.0)), ["step 9 comes after 9; steps must rise"]),
        (((0, 1.0), (9, 1.0), (8, 2.0)), ["step 8 comes after 9; steps must rise"]),
        (((0, -1.0),), ["value -1.0 is not 0 or more; use a number ≥ 0"]),
        (((0, "1"),), ["value '1' is not 0 or more; use a number ≥ 0"]),
        (((0, float("inf")),), ["value inf is not 0 or more; use a number ≥ 0"]),
        (((0.5, 1.0),), ["step 0.5 is not a whole number; use one ≥ 0"]),
        ((0, 1.0), ["0 is not a pair; use (step, value)", "1.0 is not a pair; use (step, value)"]),
        ("0:1", ["'0:1' is not a sequence; use ((0, value), (step, value), …)"]),
        (((3, -1.0), (0, 1.0)), ["the first phase is from step 3; it must be from 0",
                                 "value -1.0 is not 0 or more; use a number ≥ 0"]),
    ],
)  # fmt: skip
def test_malformed_phases(phases, problems):
    for key, f in [
        ("policy_phases", lambda: phase_schedule(phases, 1.0)),
        ("beta.phases", lambda: beta_schedule("phases", phases=phases)),
    ]:
        with pytest.raises(UserError) as e:
            f()
        assert e.value.problems == [f"{key}: {problem}" for problem in problems]


def test_phases_need_one():
    with pytest.raises(UserError, match=r"^beta.phases: \(\) found; give"):
        beta_schedule("phases", 0.1)
