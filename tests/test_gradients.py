"""Expected gradients of the objectives by exact enumeration, on a vocabulary of five tokens.

One call of the loss over all sequences of `enumeration`, weighted by their probabilities, gives
the exact expectation; the oracles are closed forms, themselves checked against finite differences.
Estimators from distributions are in test_distributions.py, TRRD is in test_trrd.py; so are
their mutations.

Mutations of kdrl_jax/objectives, each applied alone by hand; the tests that then failed (one of
them named, of this file unless another is given):

    kdrl: sign of the policy term
        test_clipping_stops_the_gradient_on_its_own_side
    kdrl: sign of the distillation term
        test_joint_gradient_is_that_of_reward_minus_kl
    kdrl: log-ratio to the teacher negated
        test_joint_gradient_is_that_of_reward_minus_kl
    policy: importance ratio inverted
        test_clipping_stops_the_gradient_on_its_own_side
    policy: min of clipped and free turned into max
        test_clipping_stops_the_gradient_on_its_own_side
    policy: clip-low and clip-high swapped
        test_clipping_stops_the_gradient_on_its_own_side
    divergences: gradient through the ratio of k2
        test_joint_gradient_is_that_of_reward_minus_kl
    divergences: k2 without the off-policy ratio
        test_joint_gradient_is_that_of_reward_minus_kl
    divergences: sign of the exponent in k3
        test_off_policy
    divergences: k1 as a plain loss
        test_another_teacher_gives_another_gradient
    kdrl: weights ignored in the policy term
        test_clipping_stops_the_gradient_on_its_own_side
    kdrl: weights in place of kd_weights
        test_masks_split_the_two_terms
    kdrl: kd_weights in place of weights
        test_masks_split_the_two_terms
    kdrl: teacher read where beta is 0
        test_kdrl_loss.py::test_without_teacher_and_beta_zero_are_grpo
    weights: response mask inverted
        test_objectives.py::test_kd_weights_literal
    weights: group mask asks for all right, not any
        test_objectives.py::test_kd_weights_literal
    weights: padding gets weight
        test_objectives.py::test_rows_that_fill_a_batch_up_change_nothing
    kdrl: sign of the entropy bonus
        test_kdrl_loss.py::test_gradient_flows_through_log_probs_and_entropy_alone
    advantages: sign
        test_objectives.py::test_advantages_against_loops
    advantages: groups of equal rewards not zeroed
        test_objectives.py::test_equal_rewards_teach_exactly_nothing
    logprobs: sign of the entropy gradient
        test_logprobs.py::test_gradients
    logprobs: valid_vocab ignored
        test_logprobs.py::test_gradients
    _terms: importance weight not truncated
        test_kdrl_loss.py::test_every_option_against_loops
    _terms: importance weight inverted
        test_kdrl_loss.py::test_every_option_against_loops
    _terms: importance weights in the entropy bonus
        test_kdrl_loss.py::test_every_option_against_loops
    _terms: reference log-ratio negated
        test_kdrl_loss.py::test_every_option_against_loops
    _terms: reference term without ρ
        test_kdrl_loss.py::test_every_option_against_loops
    _terms: reference read where its coefficient is 0
        test_kdrl_loss.py::test_without_teacher_and_beta_zero_are_grpo
    _terms: importance weights not in the reference term
        test_kdrl_loss.py::test_every_option_against_loops
    kdrl: policy_coef on the distillation term
        test_kdrl_loss.py::test_every_option_against_loops
    kdrl: policy_coef ignored
        test_kdrl_loss.py::test_every_option_against_loops
    kdrl: ratio on the given divergence
        test_kdrl_loss.py::test_every_option_against_loops
    _terms: given divergence without gradient
        test_kdrl_loss.py::test_masked_tokens_do_not_exist
    kdrl: divergence read where β is 0
        test_kdrl_loss.py::test_beta_zero_does_not_read_the_distribution
    kdrl: importance weights not in the distillation term
        test_kdrl_loss.py::test_every_option_against_loops
    logprobs: repeated ids set, not added
        test_logprobs.py::test_support_values_and_gradients
    logprobs: softmax part of the support's gradient missing
        test_logprobs.py::test_support_values_and_gradients
    logprobs: unknown ids of the support not masked
        test_logprobs.py::test_support_ids_outside_the_vocabulary
    logprobs: top tokens not normalised
        test_logprobs.py::test_top_tokens_against_sorting
    logprobs: gradient through top tokens
        test_logprobs.py::test_top_tokens_against_sorting
    schedules: first step counts as stalled
        test_schedules.py::test_adaptive_against_a_loop
    schedules: fast and slow swapped
        test_schedules.py::test_adaptive_against_a_loop
    schedules: equal averages are progress
        test_schedules.py::test_adaptive_follows_the_reward
    schedules: distance ignored
        test_schedules.py::test_adaptive_against_a_loop
    schedules: phase begins one step late
        test_schedules.py::test_phases
    schedules: floor above the start let pass for adaptive
        test_schedules.py::test_a_floor_above_the_start
    rewards: sign of the shaping
        test_objectives.py::test_shaped_rewards_against_loops
    rewards: nan of the teacher in the shaping
        test_objectives.py::test_shaped_rewards_against_loops
    rewards: padding in the shaping
        test_objectives.py::test_shaped_rewards_against_loops
    rewards: overlong penalty without its bound
        test_objectives.py::test_overlong_penalty_of_dapo
    _terms: importance weights on trained tokens only
        test_kdrl_loss.py::test_every_option_against_loops
    schedules: no cap at init
        test_schedules.py::test_adaptive_stays_at_init_when_the_distance_grows

Two more are equivalent and fail nothing: masking the log-ratio after the subtraction in place of
before it, and freezing the old log-probs at only one of the two places that do.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    LENGTHS,
    VOCAB,
    close,
    finite_difference,
    forward_kl,
    forward_kl_gradient,
    log_softmax,
    loss_gradient,
    prefix_probs,
    reverse_kl,
    reverse_kl_gradient,
    score,
    sequence_probs,
    sequences,
    table,
    token_values,
)

from kdrl_jax.objectives import kdrl_loss


@pytest.mark.parametrize("length", LENGTHS)
def test_oracles_agree_with_finite_differences(length):
    student, teacher = table(0, length), table(1, length)
    reach = prefix_probs(table(2, length))
    for kl, gradient in ((reverse_kl, reverse_kl_gradient), (forward_kl, forward_kl_gradient)):
        expected = finite_difference(lambda x, kl=kl: kl(x, teacher, reach), student)
        np.testing.assert_allclose(gradient(student, teacher, reach), expected, atol=1e-8)


# --- distillation alone ---------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("explicit_old", [False, True])
@pytest.mark.parametrize(
    ("estimator", "oracle"),
    [
        ("k1", reverse_kl_gradient),
        ("k2", reverse_kl_gradient),
        ("k3", forward_kl_gradient),
    ],
)
def test_on_policy(estimator, oracle, explicit_old, length):
    student, teacher = table(0, length), table(1, length)
    found = loss_gradient(
        student,
        length,
        teacher=teacher,
        old=student if explicit_old else None,
        weights=sequence_probs(student, length),
        beta=1.0,
        kd_estimator=estimator,
    )
    close(found, oracle(student, teacher, prefix_probs(student)))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("estimator", "oracle"),
    [
        ("k1", reverse_kl_gradient),
        ("k2", reverse_kl_gradient),
        ("k3", forward_kl_gradient),
    ],
)
def test_off_policy(estimator, oracle, length):
    """Samples of an older policy, weighted by ρ: unbiased for the prefixes that were sampled."""
    student, teacher, old = table(0, length), table(1, length), table(2, length)
    found = loss_gradient(
        student,
        length,
        teacher=teacher,
        old=old,
        weights=sequence_probs(old, length),
        beta=1.0,
        kd_estimator=estimator,
    )
    close(found, oracle(student, teacher, prefix_probs(old)))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_k3_clamp(off_policy, length):
    """The gradient of the tokens whose term is below the bound: Σ π·(1 − e^{−ℓ})·u over these."""
    student, teacher = table(0, length, 2.0), table(1, length, 2.0)
    old = table(2, length) if off_policy else student
    arguments = {"teacher": teacher, "weights": sequence_probs(old, length), "beta": 1.0}
    arguments |= {"kd_estimator": "k3"} | ({"old": old} if off_policy else {})
    found = loss_gradient(student, length, k3_clamp=0.5, **arguments)
    ell = token_values(student, length) - token_values(teacher, length)
    term = np.exp(-ell) + ell - 1
    assert 0.1 < (term < 0.5).mean() < 0.9
    ratio = np.exp(token_values(student, length) - token_values(old, length))
    slope = ratio * np.where(term < 0.5, 1 - np.exp(-ell), 0.0)
    close(found, score(student, length, sequence_probs(old, length) * slope))
    whole = loss_gradient(student, length, **arguments)
    assert np.abs(found - whole).max() > 0.01


def test_off_policy_wrong_forms_are_wrong():
    """½ℓ² without ρ, and with the gradient through ρ, are both biased for the reverse KL."""
    student, teacher, old = table(0, 1), table(1, 1), table(2, 1)
    sampled = jnp.asarray(np.exp(log_softmax(old))[0], jnp.float32)
    log_old = jnp.asarray(log_softmax(old)[0], jnp.float32)
    log_teacher = jnp.asarray(log_softmax(teacher)[0], jnp.float32)

    def bare(logits):
        return jnp.sum(sampled * 0.5 * (jax.nn.log_softmax(logits) - log_teacher) ** 2)

    def through_ratio(logits):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(sampled * jnp.exp(log_p - log_old) * 0.5 * (log_p - log_teacher) ** 2)

    truth = reverse_kl_gradient(student, teacher, np.ones(1))[0]
    for wrong in (bare, through_ratio):
        gradient = np.asarray(jax.grad(wrong)(jnp.asarray(student[0], jnp.float32)))
        assert np.abs(gradient - truth).max() > 0.2 * np.abs(truth).max()


def test_k1_as_a_loss_has_no_gradient_and_is_refused():
    student, teacher = table(0, 1), table(1, 1)
    p = jnp.asarray(np.exp(log_softmax(student))[0], jnp.float32)
    log_teacher = jnp.asarray(log_softmax(teacher)[0], jnp.float32)
    gradient = jax.grad(lambda z: jnp.sum(p * (jax.nn.log_softmax(z) - log_teacher)))(
        jnp.asarray(student[0], jnp.float32)
    )
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    with pytest.raises(ValueError, match=r"k1_loss.*no effect"):
        loss_gradient(student, 1, teacher=teacher, weights=p[:, None], beta=1.0,
                      kd_estimator="k1_loss")  # fmt: skip


def test_the_log_ratio_as_a_joint_loss_does_not_depend_on_the_teacher():
    """AReaL's joint branch of August 2026: GRPO + c·mean(log π_θ − log π_T), the latter detached.

    Its gradient is the same for every teacher, sequence by sequence; and in expectation, on-policy,
    it is GRPO's alone. KDRL's is not.
    """
    length = 2
    student = table(0, length)
    _, rows = sequences(length)
    tokens, _ = sequences(length)
    sampled = jnp.asarray(sequence_probs(student, length), jnp.float32)
    advantages = jnp.asarray(np.random.default_rng(3).normal(size=tokens.shape), jnp.float32)

    def gradient(teacher, coefficient, weights):
        of_teacher = jnp.asarray(token_values(teacher, length), jnp.float32)

        def joint(logits):
            log_p = jax.nn.log_softmax(logits)[rows, tokens]
            policy = -jnp.exp(log_p - jax.lax.stop_gradient(log_p)) * advantages
            return jnp.sum(weights * (policy + coefficient * (log_p - of_teacher)))

        return np.asarray(jax.grad(joint)(jnp.asarray(student, jnp.float32)))

    near, far = table(1, length), table(2, length, 4.0)
    some = sampled * (np.random.default_rng(4).uniform(size=sampled.shape) > 0.5)
    np.testing.assert_array_equal(gradient(near, 0.3, some), gradient(far, 0.3, some))
    np.testing.assert_allclose(
        gradient(near, 0.3, sampled), gradient(near, 0.0, sampled), atol=1e-6
    )
    ours = [
        loss_gradient(student, length, teacher=teacher, weights=sampled, beta=0.3)
        for teacher in (near, far)
    ]
    assert np.abs(ours[0] - ours[1]).max() > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_what_the_token_level_form_leaves_out(estimator):
    """∇KL of whole sequences also moves the first token for the KL it leads to; ours does not."""
    student, teacher = table(0, 2), table(1, 2)
    full = finite_difference(lambda x: reverse_kl(x, teacher, prefix_probs(x)), student)
    found = loss_gradient(
        student,
        2,
        teacher=teacher,
        weights=sequence_probs(student, 2),
        beta=1.0,
        kd_estimator=estimator,
    )
    log_p, log_t = log_softmax(student), log_softmax(teacher)
    later = (np.exp(log_p) * (log_p - log_t)).sum(-1)[1:]  # KL after each first token
    first = np.exp(log_p[0])
    left_out = np.zeros_like(student)
    left_out[0] = first * (later - (first * later).sum())
    assert np.abs(left_out).max() > 0.01
    np.testing.assert_allclose(full - found, left_out, atol=3e-6)


# --- the joint objective --------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_joint_identity_eq_27(estimator, length, rng):
    """−∇L = Σ w·(Â − β·ℓ)·∇log π_θ sample by sample: any weights, not just in expectation."""
    student, teacher, beta = table(0, length), table(1, length), 0.3
    tokens, _ = sequences(length)
    weights = rng.uniform(0.1, 1.0, tokens.shape) * (rng.uniform(size=tokens.shape) > 0.3)
    advantages = rng.normal(size=tokens.shape)
    ell = token_values(student, length) - token_values(teacher, length)
    found = loss_gradient(
        student,
        length,
        teacher=teacher,
        weights=weights,
        advantages=advantages,
        beta=beta,
        kd_estimator=estimator,
        clip_eps_low=0.2,
        clip_eps_high=0.28,
    )
    close(-found, score(student, length, weights * (advantages - beta * ell)))


@pytest.mark.parametrize("estimator", ["k1", "k2"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_joint_gradient_is_that_of_reward_minus_kl(estimator, off_policy):
    """One token: −E∇L = ∇(E_θ[r] − β·KL(π_θ‖π_T)), the right side by finite differences."""
    student, teacher, beta = table(0, 1), table(1, 1), 0.4
    old = table(2, 1) if off_policy else student
    rewards = np.array([0.0, 1.0, 0.0, 0.0, 1.0])

    def objective(x):
        return np.exp(log_softmax(x))[0] @ rewards - beta * reverse_kl(x, teacher, np.ones(1))

    found = loss_gradient(
        student,
        1,
        teacher=teacher,
        old=old if off_policy else None,
        weights=sequence_probs(old, 1),
        advantages=rewards[:, None],
        beta=beta,
        kd_estimator=estimator,
    )
    close(-found, finite_difference(objective, student))


def test_masks_split_the_two_terms(rng):
    """kd_weights steer the distillation term alone, weights the policy term alone."""
    length, beta = 2, 0.7
    student, teacher, old = table(0, 2), table(1, 2), table(2, 2)
    tokens, _ = sequences(length)
    weights = rng.uniform(0.1, 1.0, tokens.shape) * (rng.uniform(size=tokens.shape) > 0.5)
    distilled = rng.uniform(0.1, 1.0, tokens.shape) * (rng.uniform(size=tokens.shape) > 0.5)
    assert ((weights == 0) & (distilled > 0)).any()
    assert ((weights > 0) & (distilled == 0)).any()
    advantages = rng.normal(size=tokens.shape)
    log_p = token_values(student, length)
    ratio = np.exp(log_p - token_values(old, length))
    ell = log_p - token_values(teacher, length)
    found = loss_gradient(
        student,
        length,
        teacher=teacher,
        old=old,
        weights=weights,
        kd_weights=distilled,
        advantages=advantages,
        beta=beta,
    )
    close(-found, score(student, length, ratio * (weights * advantages - beta * distilled * ell)))


@pytest.mark.parametrize("low", [None, 0.2])
@pytest.mark.parametrize("high", [None, 0.28])
def test_clipping_stops_the_gradient_on_its_own_side(low, high, rng):
    """A token is stopped if Â > 0 and ρ > 1 + ε_high, or Â < 0 and ρ < 1 − ε_low; else never."""
    student, old = table(0, 2), table(0, 2) + table(3, 2, scale=0.3)
    tokens, _ = sequences(2)
    weights, advantages = rng.uniform(0.1, 1.0, tokens.shape), rng.normal(size=tokens.shape)
    ratio = np.exp(token_values(student, 2) - token_values(old, 2))
    stopped = np.zeros(tokens.shape, bool)
    if high is not None:
        stopped |= (advantages > 0) & (ratio > 1 + high)
        assert ((advantages > 0) & (ratio > 1 + high)).any()
    if low is not None:
        stopped |= (advantages < 0) & (ratio < 1 - low)
        assert ((advantages < 0) & (ratio < 1 - low)).any()
    assert ((advantages < 0) & (ratio > 1.28)).any()
    assert ((advantages > 0) & (ratio < 0.8)).any()
    found = loss_gradient(
        student,
        2,
        teacher=old,
        old=old,
        weights=weights,
        advantages=advantages,
        beta=0.0,
        clip_eps_low=low,
        clip_eps_high=high,
    )
    close(-found, score(student, 2, np.where(stopped, 0.0, weights * advantages * ratio)))


# --- the teacher matters, and in the right direction ------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_another_teacher_gives_another_gradient(estimator):
    student = table(0, 2)
    weights = sequence_probs(student, 2)
    one, other = (
        loss_gradient(
            student, 2, teacher=table(s, 2), weights=weights, beta=0.1, kd_estimator=estimator
        )
        for s in (1, 4)
    )
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_steps_move_the_student_to_the_teacher(estimator):
    student, teacher = table(0, 1), table(1, 1)
    log_teacher = jnp.asarray(log_softmax(teacher)[0], jnp.float32)

    def loss(logits):
        log_p = jax.nn.log_softmax(logits)
        p = jax.lax.stop_gradient(jnp.exp(log_p))
        batch = types.SimpleNamespace(
            old_log_probs=None,
            teacher_log_probs=log_teacher,
            advantages=jnp.zeros(VOCAB),
            weights=p,
            kd_weights=p,
        )
        return kdrl_loss(log_p, batch, beta=1.0, kd_estimator=estimator)[0]

    step = jax.jit(lambda logits: logits - 0.5 * jax.grad(loss)(logits))
    logits, kls = jnp.asarray(student[0], jnp.float32), []
    for _ in range(60):
        kls.append(reverse_kl(np.asarray(logits)[None], teacher, np.ones(1)))
        logits = step(logits)
    assert kls[1] < kls[0]
    assert kls[-1] < 0.01 * kls[0]
