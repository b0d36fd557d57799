"""The programs of a step for devices that need not be there, from shapes alone.

They are lowered by the objects that training itself uses, with shapes where those have arrays, at
the largest prompt bucket and the largest window: what is compiled is what a run would run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from kdrl_jax.models import Decoder, ModelConfig, quantize
from kdrl_jax.rollout import RolloutEngine
from kdrl_jax.rollout.decode import Slots
from kdrl_jax.rollout.schedule import choose_window
from kdrl_jax.sharding import batch_parts, param_shardings, placed, placed_batch, replicated
from kdrl_jax.training.batch import Packing, Rows, rollout_rows
from kdrl_jax.training.learner import Learner, Weights, take_part
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.roles import decoder_of
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.state import abstract_state, make_optimizer, make_schedule
from kdrl_jax.training.step import Hyper
from kdrl_jax.training.validation import Sizes
from kdrl_jax.types import Params, Rollouts, SamplingParams

STOP_IDS = 2
"""Ids that end a completion, of most tokenizers; a few numbers more or less."""


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


def device_bytes(tree: Any) -> float:
    """Bytes of a device that arrays of these shapes and shardings take."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


class _Noting(Scorer):
    """A scorer that notes the programs it is asked for, and returns shapes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.noted: list[tuple[Params, Callable[[], jax.stages.Lowered], int]] = []

    def _run(
        self,
        score: Any,
        params: Params,
        rows: Rows,
        more: tuple[Any, ...],
        length: int,
        temperature: Any,
        **options: int,
    ) -> Any:
        moved = placed_batch(self.mesh, (rows._replace(packing=None), *more))
        numbers = [_number(self.mesh, dtype) for dtype in (jnp.int32, jnp.float32)]

        @functools.cache
        def lower() -> jax.stages.Lowered:
            with jax.set_mesh(self.mesh):
                return score.lower(params, moved, *numbers, t=length, **options)

        self.noted.append((params, lower, rows.tokens.shape[0] // self._rows))
        found = lower().out_info
        return placed(found, jax.tree.map(lambda _: self._home, found))


class _Outline(Learner):
    """A learner with shapes for weights."""

    def _whole_head(self, teacher: Weights) -> Any:
        head = jax.eval_shape(teacher.model.head, teacher.params)
        return placed(head, replicated(self._mesh))

    def lower_update(self, state: Any, part: Any, scores: Any, used: Any) -> jax.stages.Lowered:
        """The program of an update."""
        head = self._teacher_head if scores.teacher_hidden is not None else None
        hyper = Hyper(*(_number(self._mesh, jnp.float32) for _ in Hyper._fields))
        return self._update.lower(state, part, hyper, head, used)

    def batch(self, rows: Rows, rollouts: Any, scores: Any) -> tuple[Any, Any]:
        """Shapes of a step's batch and of one mini-batch."""
        rewards = _floats(self._mesh, *rollouts.lengths.shape)
        beta = _number(self._mesh, jnp.float32)
        # Training leaves their layout to the compiler, so it is asked.
        whole = _results(self._fill_slots.lower(rows, rollouts, rewards, scores, beta))
        return whole, _results(take_part.lower(whole, 0))

    def noted(self) -> Iterator[tuple[str, Any, Callable[[], jax.stages.Lowered], int]]:
        """Each scoring program with the role of its weights."""
        for role, scorer in (("student", self._of_student), ("teacher", self._of_teacher)):
            for found in scorer.noted if isinstance(scorer, _Noting) else ():
                yield role, *found


def lowered_programs(
    config: ConfigDict,
    sizes: Sizes,
    shapes: Mapping[str, ModelConfig],
    meshes: Meshes,
    ids: int,
) -> list[Program]:
    """The programs of a step, in the order in which it runs them.

    Args:
      shapes: of "student" and, where the method has one, "teacher".
      meshes: over devices that need not be there, the same for all of them.
      ids: of the tokenizer.
    """
    run = _Run(config, sizes, shapes, meshes, ids)
    return [*run.rollout(), *run.scoring(), run.update()]


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
        self.student = decoder_of(config.student, shapes["student"])
        o = config.optimizer
        schedule = make_schedule(o.learning_rate, o.warmup_steps, o.schedule, config.steps)
        keys = ("b1", "b2", "eps", "weight_decay", "clip_norm")
        optimizer = make_optimizer(schedule, **{key: o[key] for key in keys})
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
                params = _results(quantize.lower(params))
            self.teacher = Weights(model, params, teacher_mesh)
        if config.reference_coef:
            cast = jax.eval_shape(self.student.cast, self.state.params)
            cast = placed(cast, param_shardings(mesh, cast))
            self.reference = Weights(self.student, cast, mesh)
        self.learner = _Outline(
            config,
            sizes,
            self.student,
            optimizer,
            mesh,
            teacher=self.teacher,
            reference=self.reference,
            valid_vocab=ids,
            mask_final_eos=False,
            new_scorer=_Noting,
        )
        self.rollouts = _rollouts(config, mesh)
        self.rows = self._rows()
        heat = _number(mesh, jnp.float32)
        self.scores = self.learner.score(self.state.params, self.rows, 1.0, heat)
        self.step = {
            "rollouts": device_bytes(self.rollouts),
            "rows": device_bytes(self.rows),
            "scores": device_bytes(self.scores),
        }

    def _rows(self) -> Rows:
        if self.sizes.micro_batches == 1:
            return _results(rollout_rows.lower(self.rollouts))
        p, g, t = self.rollouts.tokens.shape
        rows, columns = p * g, self.rollouts.prompt_tokens.shape[1] + t
        packing = Packing(_ints(rows, columns - 1), _ints(rows, t), _ints())
        tokens = _ints(rows, columns)
        return placed_batch(self.mesh, Rows(tokens, tokens, tokens, packing))

    def resident(self, *without: str, updating: bool = False) -> dict[str, float]:
        """Bytes of what lives from step to step, but for what a program has among its inputs."""
        c, found = self.config, {"weights": device_bytes(self.state.params)}
        if updating or not c.optimizer.offload:
            found["moments"] = device_bytes(self.state.opt_state)
        if self.teacher and not c.teacher.offload:
            found["teacher"] = device_bytes(self.teacher.params)
        if self.reference:
            found["reference"] = device_bytes(self.reference.params)
        if self.learner._teacher_head is not None:
            found["teacher's head"] = device_bytes(self.learner._teacher_head)
        return {name: size for name, size in found.items() if name not in without}

    def rollout(self) -> Iterator[Program]:
        """Weights laid out for decoding, prompts, larger caches, and a chunk of tokens."""
        c = self.config
        model = dataclasses.replace(self.student, dtype=self.sizes.rollout_dtype)
        role, params, mesh = "weights", self.state.params, self._meshes.rollout
        if self.sizes.method.sampler == "teacher" and self.teacher:
            role, model, params = "teacher", self.teacher.model, self.teacher.params
        there = _to_mesh(mesh, params)
        engine = OutlineEngine(model, mesh, config=c, ids=self._ids)
        problems = c.rollout.prompts_per_step + c.rollout.carry
        engine.seat(there, problems, c.rollout.group_size)
        kept = {**self.resident(), **self.step}
        if c.teacher.offload and role == "teacher":
            kept["teacher"] = device_bytes(params)
        if not _alike(params, there):
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
            own = "teacher"
            if role == "student":
                own = "weights" if params is self.state.params else "reference"
            name = "old student" if own == "weights" else own
            beside = {**self.resident(own), **self.step}
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


class OutlineEngine(RolloutEngine):
    """The rollout engine's programs at their largest, for shapes."""

    def __init__(self, model: Decoder, mesh: Mesh, *, config: ConfigDict, ids: int):
        super().__init__(
            model,
            valid_vocab=ids,
            prompt_buckets=config.data.prompt_buckets,
            max_new_tokens=config.rollout.max_new_tokens,
            slots=config.rollout.slots,
            mesh=mesh,
        )
        self.steps, self.windows = self._chunk, self._windows
        self._slots: dict[tuple[int, int], Slots] = {}

    def seat(self, params: Params, problems: int, group: int) -> None:
        """As `Call` does for so many requests of these weights."""
        total = problems * group
        self.params = params
        self.seats = min(self.slots or total, total)
        self.prompts = min(problems, -(-self.seats // group))
        first = choose_window(self.windows, self.prompt_buckets[-1] + self.steps)
        self.window_of_prefill = self.windows[-1] if total > self.seats else first

    def lower_unstack(self) -> jax.stages.Lowered:
        """The weights as decoding reads them."""
        with jax.set_mesh(self.mesh):
            return self._unstack.lower(self.params)

    @functools.cached_property
    def weights(self) -> Any:
        """What comes out of that, and where it lies: only the compiler knows."""
        return _results(self.lower_unstack())

    @functools.cached_property
    def copy_bytes(self) -> float:
        """Of the weights for decoding."""
        return device_bytes(self.weights)

    def lower_prefill(self) -> jax.stages.Lowered:
        """Prompts of the largest bucket."""
        tokens = _ints(self.prompts, self.prompt_buckets[-1])
        rows = placed_batch(self.mesh, (tokens, _ints(self.prompts)))
        with jax.set_mesh(self.mesh):
            return self._prefill.lower(self.params, *rows)

    @property
    def prompt_bytes(self) -> float:
        """Keys and values of the prompts of one prefill."""
        return self._cache_bytes(self.prompts, self.prompt_buckets[-1])

    def cache_bytes(self, window: int) -> float:
        """Keys and values of all slots."""
        return self._cache_bytes(self.seats, window)

    def _cache_bytes(self, rows: int, window: int) -> float:
        return device_bytes(self._slots_of(rows, window).cache)

    def _slots_of(self, rows: int, window: int) -> Slots:
        if (rows, window) not in self._slots:
            with jax.set_mesh(self.mesh):
                self._slots[rows, window] = _results(self._empty.lower(rows, window))
        return self._slots[rows, window]

    def lower_grow(self) -> jax.stages.Lowered:
        """The largest window but one to the largest."""
        slots = self._slots_of(self.seats, self.windows[-2])
        parts = batch_parts(self.mesh)
        parts = 1 if self.seats % parts else parts
        rows = placed(_ints(parts, self.seats // parts), replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            return self._fit.lower(slots, rows, window=self.windows[-1])

    def lower_decode(self) -> jax.stages.Lowered:
        """A chunk of tokens at the largest window."""
        whole = functools.partial(_number, self.mesh)
        sampling = SamplingParams(
            *(whole(jnp.float32), whole(jnp.float32), whole(jnp.int32), whole(jnp.float32)),
            max_new_tokens=placed(_ints(self.seats, 1), replicated(self.mesh)),
            stop_ids=placed(_ints(STOP_IDS), replicated(self.mesh)),
        )
        slots = self._slots_of(self.seats, self.windows[-1])
        with jax.set_mesh(self.mesh):
            return self._decode.lower(self.weights, slots, sampling, whole(jnp.int32))


def _results(lowered: jax.stages.Lowered) -> Any:
    """Shapes and shardings of what a program returns."""
    return placed(lowered.out_info, lowered.compile().output_shardings)


def _to_mesh(mesh: Mesh, tree: Any) -> Any:
    """As `kdrl_jax.sharding.to_mesh`, for shapes."""
    return placed(tree, jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), tree))


def _alike(tree: Any, other: Any) -> bool:
    """Whether all arrays lie alike."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)


def _rollouts(config: ConfigDict, mesh: Mesh) -> Rollouts:
    ro = config.rollout
    p, g, t = ro.prompts_per_step, ro.group_size, ro.max_new_tokens
    floats = jax.ShapeDtypeStruct((p, g, t), jnp.float32)
    prompts = (_ints(p, config.data.prompt_buckets[-1]), _ints(p))
    found = Rollouts(*prompts, _ints(p, g, t), floats, _ints(p, g), _ints(p, g))
    return placed_batch(mesh, found)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(mesh: Mesh, *shape: int) -> jax.ShapeDtypeStruct:
    return placed_batch(mesh, jax.ShapeDtypeStruct(shape, np.float32))


def _number(mesh: Mesh, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))
