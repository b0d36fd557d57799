"""The programs of a step for devices that need not be there, from shapes alone.

They are lowered by the objects that training itself uses, with shapes where those have arrays, at
the largest prompt bucket and the largest window: what is compiled is what a run would run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdrl_jax.data import prompt_lengths
from kdrl_jax.models import ModelConfig, quantize
from kdrl_jax.planning.outline import NotingScorer, OutlineEngine, OutlineLearner
from kdrl_jax.planning.shapes import (
    alike,
    device_bytes,
    ints,
    number,
    results,
    to_mesh,
)
from kdrl_jax.sharding import param_shardings, placed, placed_batch
from kdrl_jax.training.batch import Packing, Rows, rollout_rows
from kdrl_jax.training.learner import Weights
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.roles import decoder_of
from kdrl_jax.training.state import abstract_state, optimizer_of
from kdrl_jax.training.validation import Sizes
from kdrl_jax.types import Rollouts


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a step.

    Attributes:
      name: 'update', 'score teacher', 'prefill', 'decode', …
      phase: of `kdrl_jax.training.memory.Plan`, in which it runs.
      lower: makes the program.
      turns: of its outermost loop, where only the arrays would tell.
      beside: bytes of each device, by name, that hold something else while it runs. To know
        them, smaller programs may have to be compiled.
    """

    name: str
    phase: str
    lower: Callable[[], jax.stages.Lowered]
    turns: int
    beside: Callable[[], Mapping[str, float]]


def lowered_programs(
    config: ConfigDict,
    sizes: Sizes,
    shapes: Mapping[str, ModelConfig],
    meshes: Meshes,
    ids: int,
) -> list[Program]:
    """The programs of a step, in the order in which it runs them; none of a rollout server's.

    Args:
      shapes: of "student" and, where the method has one, "teacher".
      meshes: over devices that need not be there, the same for all of them.
      ids: of the tokenizer.
    """
    run = _Run(config, sizes, shapes, meshes, ids)
    drawing = [] if config.rollout.server.url else run.rollout()
    return [*drawing, *run.scoring(), run.update()]


class _Run:
    """Everything that lives in a run's devices, as shapes."""

    def __init__(
        self,
        config: ConfigDict,
        sizes: Sizes,
        shapes: Mapping[str, ModelConfig],
        meshes: Meshes,
        ids: int,
    ):
        mesh, teacher_mesh = meshes.student, meshes.teacher
        self.config, self.sizes, self.mesh, self._ids = config, sizes, mesh, ids
        self._meshes = meshes
        self.student = decoder_of(config.student, shapes["student"], sizes.lora)
        optimizer = optimizer_of(config.optimizer, config.steps * sizes.updates)
        self.state = abstract_state(self.student, optimizer, mesh)
        self.teacher = self.reference = None
        if "teacher" in shapes:
            model = decoder_of(config.teacher, shapes["teacher"])
            # As `build_role` makes them: of the compute dtype throughout, then in 8 bits.
            shapes_of = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), model.shapes()
            )
            params = placed(shapes_of, param_shardings(teacher_mesh, shapes_of))
            if config.teacher.dtype == "int8":
                params = results(quantize.lower(params))
            self.teacher = Weights(model, params, teacher_mesh)
        frozen = self.student.base
        cast = jax.eval_shape(frozen.cast, frozen.shapes())
        cast = placed(cast, param_shardings(mesh, cast))
        base = cast if self.student.lora else None
        if config.reference_coef:
            self.reference = Weights(frozen, cast, mesh)
        self.learner = OutlineLearner(
            config,
            sizes,
            self.student,
            optimizer,
            mesh,
            teacher=self.teacher,
            reference=self.reference,
            base=base,
            valid_vocab=ids,
            mask_final_eos=False,
            new_scorer=NotingScorer,
        )
        self.policy = self.learner.policy(self.state.params)
        self.rollouts = _rollouts(config, mesh)
        self.rows = self._rows()
        heat = number(mesh, jnp.float32)
        self.scores = self.learner.score(self.state.params, self.rows, 1.0, heat)
        self.step = {
            "rollouts": device_bytes(self.rollouts),
            "rows": device_bytes(self.rows),
            "scores": device_bytes(self.scores),
        }

    def _rows(self) -> Rows:
        if self.sizes.micro_batches == 1:
            return results(rollout_rows.lower(self.rollouts))
        p, g, t = self.rollouts.tokens.shape
        rows, columns = p * g, self.rollouts.prompt_tokens.shape[1] + t
        packing = Packing(ints(rows, columns - 1), ints(rows, t), ints())
        tokens = ints(rows, columns)
        return placed_batch(self.mesh, Rows(tokens, tokens, tokens, packing))

    def resident(self, *without: str, updating: bool = False) -> dict[str, float]:
        """Bytes of what lives from step to step, but for what a program has among its inputs."""
        c, found = self.config, {"weights": device_bytes(self.policy)}
        if updating or not c.optimizer.offload:
            found["moments"] = device_bytes(self.state.opt_state)
        if self.teacher and not c.teacher.offload:
            found["teacher"] = device_bytes(self.teacher.params)
        if self.reference and not self.student.lora:  # else it is the base
            found["reference"] = device_bytes(self.reference.params)
        if self.learner._teacher_head is not None:
            found["teacher's head"] = device_bytes(self.learner._teacher_head)
        return {name: size for name, size in found.items() if name not in without}

    def rollout(self) -> Iterator[Program]:
        """Weights laid out for decoding, prompts, larger caches, and a chunk of tokens."""
        c = self.config
        model = dataclasses.replace(self.student, dtype=self.sizes.rollout_dtype)
        role, params, mesh = "weights", self.policy, self._meshes.rollout
        if self.sizes.method.sampler == "teacher" and self.teacher:
            role, model, params = "teacher", self.teacher.model, self.teacher.params
        there = to_mesh(mesh, params)
        engine = OutlineEngine(model, mesh, config=c, ids=self._ids)
        problems = c.rollout.prompts_per_step + c.rollout.carry
        engine.seat(there, problems, c.rollout.group_size)
        kept = {**self.resident(), **self.step}
        if c.teacher.offload and role == "teacher":
            kept["teacher"] = device_bytes(params)
        if not alike(params, there):
            role = "weights as rollouts have them"
            kept[role] = device_bytes(there)
        others = {name: size for name, size in kept.items() if name != role}

        def of_prompts() -> dict[str, float]:
            return {**kept, "prompts' cache": engine.prompt_bytes}

        def of_copy(beside: dict[str, float]) -> dict[str, float]:
            return {**beside, "rollout's copy of weights": engine.copy_bytes}

        def of_prefill() -> dict[str, float]:
            cache = engine.cache_bytes(engine.window_of_prefill)
            return {**of_copy(others), "KV cache": cache}

        yield Program("weights", "rollout", engine.lower_unstack, 1, lambda: others)
        yield Program("prefill", "rollout", engine.lower_prefill, 1, of_prefill)
        if len(engine.windows) > 1:
            grow = ("grow", "rollout", engine.lower_grow, 1)
            yield Program(*grow, lambda: of_copy(of_prompts()))
        yield Program("decode", "rollout", engine.lower_decode, engine.steps, of_prompts)

    def scoring(self) -> Iterator[Program]:
        """What is asked of models that are not being trained."""
        for role, params, lower, turns in self.learner.noted():
            beside = {**self.resident(), **self.step}
            of_base = role == "reference" and self.student.lora
            own = "weights" if role == "student" or of_base else role
            name = "old student" if role == "student" else role
            if own in beside:  # what is offloaded is not
                beside[own] -= device_bytes(params)
            of_scoring: Callable[[], dict[str, float]] = functools.partial(dict, beside)
            yield Program(f"score {name}", "score", lower, turns, of_scoring)

    def update(self) -> Program:
        """The fused step."""
        used = self.rows.packing.used if self.rows.packing is not None else None

        batch = functools.cache(lambda: self.learner.batch(self.rows, self.rollouts, self.scores))

        def lower() -> jax.stages.Lowered:
            return self.learner.lower_update(self.state, batch()[1], self.scores, used)

        def beside() -> dict[str, float]:
            inputs = ("weights", "moments", "teacher's head")
            others = {**self.resident(*inputs, updating=True), **self.step}
            return {**others, "batch": device_bytes(batch()[0])}

        return Program("update", "update", lower, self.sizes.micro_batches, beside)


def _rollouts(config: ConfigDict, mesh: Mesh) -> Rollouts:
    ro = config.rollout
    p, g, t = ro.prompts_per_step, ro.group_size, ro.max_new_tokens
    floats = jax.ShapeDtypeStruct((p, g, t), jnp.float32)
    longest = prompt_lengths(config.data.prompt_buckets, config.data.max_prompt_tokens)[-1]
    prompts = (ints(p, longest), ints(p))
    found = Rollouts(*prompts, ints(p, g, t), floats, ints(p, g), ints(p, g))
    return placed_batch(mesh, found)
