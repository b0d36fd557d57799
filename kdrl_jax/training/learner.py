"""From graded rollouts to the next state: scores, the filled slots, one update or several."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kdrl_jax.models import Decoder
from kdrl_jax.models.lora import join
from kdrl_jax.objectives import (
    AdaptiveEntropy,
    Trend,
    alpha_schedule,
    beta_schedule,
    phase_schedule,
)
from kdrl_jax.sharding import in_memory, put, put_batch, replicated
from kdrl_jax.training.batch import Rows, build_batch, rollout_rows
from kdrl_jax.training.checks import Checks
from kdrl_jax.training.packing import pack_rows
from kdrl_jax.training.probe import TeacherProbe, shuffled_slots
from kdrl_jax.training.samples import TokenTraces, asked_of, traced_slots
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.step import (
    Hyper,
    Metrics,
    Objective,
    make_hyper,
    make_loss,
    make_update,
)
from kdrl_jax.training.validation import Sizes
from kdrl_jax.types import Params, Rollouts, Scores, TrainState


class Weights:
    """A frozen model: its decoder, its weights and the mesh they are on.

    Args:
      offload: keep the weights in the hosts' memory between uses.
    """

    def __init__(self, model: Decoder, params: Params, mesh: Mesh, *, offload: bool = False):
        self.model, self.mesh, self._offload = model, mesh, offload
        self._params = in_memory("pinned_host", params) if offload else params

    @property
    def params(self) -> Params:
        """The weights in device memory, as long as somebody holds them."""
        return in_memory("device", self._params) if self._offload else self._params


class Learner:
    """What an objective needs beside rollouts and rewards, and the updates it makes of them.

    Args:
      teacher: None where nothing is scored by it.
      reference: the initial student; None without a reference KL.
      base: the frozen weights that a student with adapters adds them to; else None.
      valid_vocab: ids that the tokenizer knows.
      mask_final_eos: see `build_batch`.
      checks: compares what goes into each update, and what comes of it.
      new_scorer: of what kind its scorers are; a plan has some that only say what they would run.
    """

    def __init__(
        self,
        config: ConfigDict,
        sizes: Sizes,
        student: Decoder,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        *,
        teacher: Weights | None,
        reference: Weights | None,
        base: Params | None = None,
        valid_vocab: int,
        mask_final_eos: bool,
        new_scorer: type[Scorer] = Scorer,
        checks: Checks | None = None,
    ):
        self._checks = checks
        self._config, self._sizes, self._mesh = config, sizes, mesh
        self._teacher, self._reference, self._base = teacher, reference, base
        method = sizes.method
        head = {"valid_vocab": valid_vocab, "chunk": config.logprob_chunk}

        def scorer(model: Decoder, where: Mesh) -> Scorer:
            sizes_of = {"rows": sizes.micro_batch, "mini_batches": config.mini_batches}
            return new_scorer(model, where, mesh, **sizes_of, **head)

        self._of_student = scorer(student, mesh)
        self._of_reference = reference and scorer(reference.model, mesh)
        self._of_teacher = teacher and scorer(teacher.model, teacher.mesh)
        asked = teacher is not None and method.kd and config.kd_estimator == "full"
        self._teacher_head = self._whole_head(teacher) if teacher and asked else None
        fill_slots = functools.partial(
            build_batch,
            method=method,
            aggregation=config.aggregation,
            kd_mask=config.kd_mask,
            scale=config.advantage.scale,
            baseline=config.advantage.baseline,
            overlong=(config.reward.overlong_buffer, config.reward.overlong_penalty),
            mask_truncated=config.mask_truncated,
            mask_final_eos=mask_final_eos,
            max_new_tokens=config.rollout.max_new_tokens,
            mini_batches=config.mini_batches,
            carried=config.rollout.carry > 0,
        )
        self._fill_slots = jax.jit(fill_slots)
        self._fill_shuffled = jax.jit(shuffled_slots(fill_slots, config.kd_topk.support))
        whole = replicated(mesh)  # for the process that writes them
        self._trace = jax.jit(traced_slots(fill_slots), static_argnums=6, out_shardings=whole)
        objective = Objective(
            ratio=method.ratio,
            kd_estimator=config.kd_estimator,
            support=config.kd_topk.support,
            log_floor=config.kd_topk.log_floor,
            k3_clamp=config.k3_clamp or None,
            clamp_gradient=config.trrd.clamp_gradient,
            tis=config.tis_cap > 0,
            own_rollouts=method.sampler == "student",
        )
        parts = sizes.micro_batches
        self._update = make_update(
            student,
            optimizer,
            mesh,
            objective=objective,
            micro_batches=parts,
            donate=checks is None,
            **head,
        )
        self._probe = TeacherProbe(make_loss(student, objective=objective, **head), mesh, parts)
        self._beta = beta_schedule(**config.beta.to_dict())
        self._alpha = alpha_schedule(
            config.trrd.alpha, config.trrd.alpha_end, config.trrd.alpha_steps
        )
        self._entropy = AdaptiveEntropy(config.entropy_coef, **config.adaptive_entropy)
        self._policy_coef = phase_schedule(config.policy_phases, 1.0)

    def _whole_head(self, teacher: Weights) -> Array:
        """The teacher's head, replicated: the loss reads it whole, some of the ids at a time."""
        head = jax.jit(teacher.model.head)(teacher.params)
        return put(head, replicated(self._mesh))

    def policy(self, params: Params) -> Params:
        """The student's whole weights, of those that a `TrainState` has."""
        return params if self._base is None else join(self._base, params)

    def beta(self, step: int, trend: Trend) -> float:
        """β of a step; 0 where the objective has none."""
        method = self._sizes.method
        return float(self._beta(step, trend)) if method.kd or method.shaped else 0.0

    def hyper(self, step: int, trend: Trend) -> Hyper:
        """The numbers of a step, on the devices."""
        c = self._config
        return make_hyper(
            self._mesh,
            beta=self.beta(step, trend),
            policy_coef=float(self._policy_coef(step, trend)),
            temperature=self._sizes.logprob_temperature,
            alpha=float(self._alpha(step, trend)),
            clamp=c.trrd.clamp,
            entropy_coef=self._entropy.coefficient(trend),
            **{key: c[key] for key in ("clip_eps_low", "clip_eps_high")},
            **{key: c[key] for key in ("reference_coef", "tis_cap")},
        )

    def scheduled(self, step: int, trend: Trend) -> dict[str, float]:
        """Returns the metrics that a schedule has set: "beta", and what else is not constant."""
        found = {"beta": self.beta(step, trend)}
        if self._config.trrd.alpha_steps and self._sizes.method.ratio == "trrd":
            found["alpha"] = float(self._alpha(step, trend))
        if self._config.policy_phases:
            found["policy_coef"] = float(self._policy_coef(step, trend))
        if self._entropy.target:
            found["entropy/coef"] = self._entropy.coefficient(trend)
        return found

    def rows(self, rollouts: Rollouts, placed: Rollouts) -> Rows:
        """What models are to read of a step's rollouts, on the devices.

        Packed where an update takes several micro-batches: with a single one all rows are
        computed anyway.

        Args:
          rollouts: host arrays.
          placed: the same on the devices.
        """
        c = self._config
        if self._sizes.micro_batches == 1:
            return rollout_rows(placed)
        rows = self._sizes.micro_batch
        packed = pack_rows(rollouts, mini_batches=c.mini_batches, micro_batch=rows)
        return put_batch(self._mesh, packed)

    def score(self, params: Params, rows: Rows, beta: float, heat: Float[Array, ""]) -> Scores:
        """What the step's loss will compare with; does not wait for it.

        The teacher is not asked while β is 0, nor the old student where each rollout batch makes
        one update: it is then the student itself.

        Args:
          params: of the student's state, before the step's first update.
          heat: the temperature of the log-probs.
        """
        method, params = self._sizes.method, self.policy(params)
        # Packed rows have completions anywhere, padded ones in their last columns.
        length = self._config.rollout.max_new_tokens
        if rows.packing is not None:
            length = rows.tokens.shape[1] - 1
        old = support = of_support = hidden = reference = scored = None
        asked = method.ratio == "trrd" or beta > 0
        teacher = self._teacher if method.scores and asked else None
        estimator = self._config.kd_estimator if method.kd and teacher else ""
        k = self._config.kd_topk.k
        if estimator == "topk" and self._config.kd_topk.support == "student":
            old, support, _ = self._of_student.top_support(params, rows, k, length, heat)
        # Of partial rollouts, the old student is the one that drew them.
        compared = self._sizes.updates > 1 and not self._config.rollout.carry
        if compared and old is None:
            old = self._of_student.log_probs(params, rows, length, heat)
        if self._reference and self._of_reference:
            initial = self._reference.params
            reference = self._of_reference.log_probs(initial, rows, length, heat)
        if teacher and self._of_teacher:
            ask, weights = self._of_teacher, teacher.params
            if support is not None:
                scored, of_support = ask.at_support(weights, rows, support, length, heat)
            elif estimator == "topk":
                scored, support, of_support = ask.top_support(weights, rows, k, length, heat)
            elif estimator == "full":
                scored, hidden = ask.hidden(weights, rows, length, heat)
            else:
                scored = ask.log_probs(weights, rows, length, heat)
        return Scores(
            old_log_probs=old if compared else None,
            reference_log_probs=reference,
            teacher_log_probs=scored,
            support=support,
            support_log_probs=of_support,
            teacher_hidden=hidden,
        )

    def learn(
        self,
        state: TrainState,
        rows: Rows,
        rollouts: Rollouts,
        rewards: np.ndarray,
        scores: Scores,
        hyper: Hyper,
        *,
        correct: np.ndarray | None = None,
        probe: bool = False,
    ) -> tuple[TrainState, Metrics]:
        """`epochs` passes of `mini_batches` updates; metrics are their mean, still to come.

        Args:
          state: donated.
          rewards: `[P, G]`, on the host.
          correct: the verifier's 1 and 0 `[P, G]`, where `reward.functions` make the rewards
            something else; None: the rewards.
          probe: measure "health/teacher_effect" first: the norm by which the gradient changes when
            the teacher's values are shuffled, over that of the first update's gradient.
        """
        c = self._config
        rewards_there, correct_there = put_batch(self._mesh, (rewards, correct))
        graded = (rows, rollouts, rewards_there, scores, hyper.beta, correct_there)
        before = state.params
        with jax.debug_nans(False):  # NaN says here that the teacher has no opinion
            batch = self._fill_slots(*graded)
        if self._checks:
            self._checks.batch(batch, rows, rollouts)
        head = self._teacher_head if scores.teacher_hidden is not None else None
        used = rows.packing.used if rows.packing is not None else None
        found: list[Metrics] = []
        effect = None
        if probe:  # before the state is donated
            with jax.debug_nans(False):
                other = self._fill_shuffled(*graded)
                parts = [(take_part(batch, i), take_part(other, i)) for i in range(c.mini_batches)]
            more = (hyper, head, used, self._base)
            norms = [self._probe(state.params, *part, *more) for part in parts]
            effect = functools.reduce(jnp.maximum, norms)
            del other, parts
        if c.optimizer.offload:
            opt_state = in_memory("device", state.opt_state)
            state = dataclasses.replace(state, opt_state=opt_state)
        for _ in range(c.epochs):
            for index in range(c.mini_batches):
                with jax.debug_nans(False):
                    part = take_part(batch, index)
                state, metrics = self._update(state, part, hyper, head, used, self._base)
                found.append(metrics)
        if self._checks:
            frozen = self._teacher.params if self._teacher else None
            self._checks.updated(before, state.params, found, frozen)
        metrics = found[0] if len(found) == 1 else _mean(found)
        if effect is not None:
            metrics["health/teacher_effect"] = _share(effect, found[0]["gradient/norm"])
        return self.at_rest(state), metrics

    def traces(
        self,
        rows: Rows,
        rollouts: Rollouts,
        rewards: np.ndarray,
        scores: Scores,
        hyper: Hyper,
        correct: np.ndarray | None,
        count: int,
    ) -> TokenTraces | None:
        """What `learn` will tell the loss of the first `count` rollouts; does not wait for it.

        None for a count of 0. All processes must call, and all have the whole of it.
        """
        if not count:
            return None
        rewards_there, correct_there = put_batch(self._mesh, (rewards, correct))
        graded = (rows, rollouts, rewards_there, asked_of(scores), hyper.beta, correct_there)
        with jax.debug_nans(False):
            return self._trace(*graded, count)

    def at_rest(self, state: TrainState) -> TrainState:
        """A state as it is kept between updates: by option with its moments in host memory."""
        if not self._config.optimizer.offload:
            return state
        moments = in_memory("pinned_host", state.opt_state)
        return dataclasses.replace(state, opt_state=moments)


@functools.partial(jax.jit, static_argnums=1)
def take_part(batch: Any, index: int) -> Any:
    """Mini-batch `index` of a batch, or of some of its fields, with a leading axis."""
    return jax.tree.map(lambda x: x[index], batch)


@jax.jit
def _share(part: Array, whole: Array) -> Array:
    return part / jnp.maximum(whole, jnp.finfo(whole.dtype).tiny)


@jax.jit
def _mean(found: list[Metrics]) -> Any:
    return jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *found)
