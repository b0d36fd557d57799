"""The probe of the teacher's effect, and that it catches teachers that are not heard."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import (
    MODEL,
    ONE_DEVICE,
    P_,
    REWARDS,
    VALID,
    G,
    T,
    distribution_batch,
    objective_of,
    rollouts,
    slots,
    teacher_scores,
)

from kdrl_jax.objectives import METHODS
from kdrl_jax.sharding import make_mesh, put_batch
from kdrl_jax.training import step
from kdrl_jax.training.batch import build_batch, rollout_rows
from kdrl_jax.training.learner import take_part
from kdrl_jax.training.probe import HEARD, TeacherProbe, shuffled_slots
from kdrl_jax.training.state import init_params
from kdrl_jax.training.step import Objective, make_hyper, make_loss


def parts(scores, support="teacher", **overrides):
    """A batch, and its fields as another teacher would have them."""
    sampled, rewards, beta = rollouts(), jnp.asarray(REWARDS), jnp.float32(0.5)
    given = (rollout_rows(sampled), sampled, rewards, scores, beta)
    fill = functools.partial(build_batch, **slots(**overrides))
    both = jax.jit(fill)(*given), jax.jit(shuffled_slots(fill, support))(*given)
    return [take_part(x, 0) for x in both]


def hyper(mesh, beta=0.5):
    return make_hyper(mesh, beta=beta, temperature=0.8, entropy_coef=0.01, alpha=0.5)


@functools.cache
def params_on(mesh):
    return init_params(MODEL, jax.random.key(0), mesh)


def loss_of(objective=Objective()):  # noqa: B008 (immutable)
    return make_loss(MODEL, objective=objective, valid_vocab=VALID, chunk=4)


def measure(loss, batch, other, mesh=ONE_DEVICE, micro_batches=2, beta=0.5):
    """The probe's norm."""
    params = params_on(mesh)
    probe = TeacherProbe(loss, mesh, micro_batches)
    there = put_batch(mesh, (batch, other))
    return float(probe(params, *there, hyper(mesh, beta), None, None))


def plain(loss, batch, other, beta=0.5) -> float:
    """The same by two whole gradients."""
    gradient = jax.jit(jax.grad(lambda p, b: loss(p, b, hyper(ONE_DEVICE, beta), None)[0]))
    both = (batch, dataclasses.replace(batch, **other))
    grads = [gradient(params_on(ONE_DEVICE), b) for b in both]
    return float(optax.global_norm(jax.tree.map(jnp.subtract, *grads)))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_norm_is_that_of_the_difference_of_two_gradients(micro_batches):
    batch, other = parts(teacher_scores())
    wanted = plain(loss_of(), batch, other)
    assert wanted > 0.01
    assert measure(loss_of(), batch, other, micro_batches=micro_batches) == pytest.approx(
        wanted, rel=1e-5
    )


def test_the_mesh_changes_nothing():
    batch, other = parts(teacher_scores())
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    assert measure(loss_of(), batch, other, mesh) == pytest.approx(
        measure(loss_of(), batch, other), rel=1e-5
    )


@pytest.mark.parametrize("name", ["kdrl", "kd_rkl", "reward_shaping", "trrd"])
def test_every_method_with_a_teacher_hears_it(name):
    method = METHODS[name]
    batch, other = parts(teacher_scores(), method=method)
    assert measure(loss_of(Objective(ratio=method.ratio)), batch, other) > 1e-3


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_methods_without_one_do_not(name):
    batch, other = parts(teacher_scores(), method=METHODS[name])
    assert measure(loss_of(), batch, other) == 0


def test_what_the_student_said_stays():
    rng = np.random.default_rng(0)
    support = rng.integers(0, VALID, (P_ * G, T, 3)).astype(np.int32)
    scores = dataclasses.replace(
        teacher_scores(),
        support=support,
        support_log_probs=rng.normal(-3, 1, (P_ * G, T, 3)).astype(np.float32),
    )
    for owner in ("student", "teacher", "tail"):
        batch, other = parts(scores, owner)
        assert set(other) == set(HEARD)
        same = {
            name: bool((getattr(batch, name) == other[name]).all())
            for name in HEARD
            if other[name] is not None
        }
        assert same.pop("support") == (owner == "student")
        assert same == {
            "advantages": True,
            "teacher_log_probs": False,
            "support_log_probs": False,
        }


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_distributions_are_heard(kind):
    batch, _, _ = distribution_batch(kind)
    moved = {
        name: jnp.roll(getattr(batch, name), (1, 1), (0, 1))
        for name in ("teacher_log_probs", "support_log_probs")
    }
    other = {name: getattr(batch, name) for name in HEARD} | moved
    assert measure(loss_of(objective_of(kind)), batch, other) > 1e-3
    deaf = dataclasses.replace(batch, kd_weights=jnp.zeros_like(batch.kd_weights))
    assert measure(loss_of(objective_of(kind)), deaf, other) == 0


# --- faults --------------------------------------------------------------------------------------


def test_no_beta(monkeypatch):
    original = step.kdrl_loss
    monkeypatch.setattr(
        step, "kdrl_loss", lambda *args, **kwargs: original(*args, **kwargs | {"beta": 0.0})
    )
    assert measure(loss_of(), *parts(teacher_scores())) == 0


def test_an_empty_mask():
    batch, other = parts(teacher_scores())
    batch = dataclasses.replace(batch, kd_weights=jnp.zeros_like(batch.kd_weights))
    assert measure(loss_of(), batch, other) == 0


def test_the_student_in_the_teachers_place(monkeypatch):
    original = step.kdrl_loss

    def of_itself(log_probs, batch, **kwargs):
        own = jax.lax.stop_gradient(log_probs)
        return original(log_probs, dataclasses.replace(batch, teacher_log_probs=own), **kwargs)

    monkeypatch.setattr(step, "kdrl_loss", of_itself)
    assert measure(loss_of(), *parts(teacher_scores())) == 0


def test_a_gradient_that_is_stopped(monkeypatch):
    """The distillation term is computed and shown, and teaches nothing."""
    original = step.kdrl_loss

    def stopped(log_probs, batch, *, beta, **kwargs):
        _, metrics = original(log_probs, batch, beta=beta, **kwargs)
        still, _ = original(jax.lax.stop_gradient(log_probs), batch, beta=beta, **kwargs)
        silent, _ = original(jax.lax.stop_gradient(log_probs), batch, beta=0.0, **kwargs)
        policy, _ = original(log_probs, batch, beta=0.0, **kwargs)
        return policy + still - silent, metrics

    monkeypatch.setattr(step, "kdrl_loss", stopped)
    assert measure(loss_of(), *parts(teacher_scores())) == 0


def test_a_plain_k1_loss_is_heard_by_the_value_alone():
    """Its gradient is that of log π whatever the teacher says: the oldest way to lose a teacher."""
    batch, other = parts(teacher_scores())

    policy = loss_of()

    def k1(params, rows, numbers, *rest):
        loss, metrics = policy(params, rows, numbers._replace(beta=jnp.float32(0)), *rest)
        teacher = jnp.sum(rows.kd_weights * rows.teacher_log_probs)
        return loss + numbers.beta * (metrics["log_probs/mean"] - teacher), metrics

    assert measure(k1, batch, other) == 0


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_it_needs_no_more_than_an_update_and_two_sums(micro_batches):
    """By the compiler: temporaries, and arguments but for the moments, which live through both."""
    batch, other = parts(teacher_scores())
    optimizer = optax.sgd(1.0)
    state = step.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), MODEL.shapes(), optimizer.init(MODEL.shapes())
    )
    update = step.make_update(
        MODEL,
        optimizer,
        ONE_DEVICE,
        micro_batches=micro_batches,
        valid_vocab=VALID,
        chunk=4,
    )
    numbers = hyper(ONE_DEVICE)
    mine = TeacherProbe(loss_of(), ONE_DEVICE, micro_batches).lower(
        state.params, batch, other, numbers, None, None
    )
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    fields = sum(x.nbytes for x in jax.tree.leaves(other))

    def bytes_of(lowered):
        found = lowered.compile().memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes

    assert bytes_of(mine) <= bytes_of(update.lower(state, batch, numbers)) + 2.2 * size + 3 * fields
