"""How many bytes of a device each phase of a step takes at its worst moment: an estimate.

Every number follows from the shapes in the config: what lives through a step (weights, AdamW's
moments, frozen models), what a phase adds (caches, kept activations, logits, gradients), and how
the mesh splits it. `tests/test_memory.py` compares the sums with XLA's own account.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from kdrl_jax.data import prompt_lengths
from kdrl_jax.models import ModelConfig
from kdrl_jax.rollout.engine import chunk_size
from kdrl_jax.rollout.schedule import choose_window, window_sizes
from kdrl_jax.training.evaluation import eval_slots
from kdrl_jax.training.footprint import F32, Placed
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.scoring import scoring_chunk
from kdrl_jax.training.validation import Sizes

GIB = 2**30
SAMPLER_LOGITS = 5
"""[slots, V] float32 arrays of a draw: logits, scaled, exponentials, truncated, in blocks."""
LOSS_LOGITS = 2
"""Float32 arrays of a chunk's logits: themselves, and exponentials or their gradient."""

Parts = dict[str, float]
"""Bytes of a device by what they are for."""


def human(size: float) -> str:
    """'1.2 GiB' or '340 MiB'."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


@dataclasses.dataclass(frozen=True)
class Levers:
    """What may be changed to need less; only `max_new_tokens` changes results."""

    slots: int
    micro_batch: int
    remat: str
    logprob_chunk: int
    max_new_tokens: int

    @classmethod
    def of(cls, config: ConfigDict) -> Levers:
        """As `config` has them, but with the slots that 0 stands for."""
        ro = config.rollout
        rollouts = (ro.prompts_per_step + ro.carry) * ro.group_size
        return cls(
            min(ro.slots or rollouts, rollouts),
            config.micro_batch,
            config.student.remat,
            config.logprob_chunk,
            ro.max_new_tokens,
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of a device by phase and part, each phase at its worst moment."""

    phases: Mapping[str, Parts]

    def need(self, phase: str) -> float:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        """Bytes of the phase that needs most."""
        return max(map(self.need, self.phases))

    def line(self) -> str:
        """'rollout 1.2 GiB, update 3.4 GiB'."""
        return ", ".join(f"{phase} {human(self.need(phase))}" for phase in self.phases)

    def table(self) -> str:
        """A row for each part, a column for each phase."""
        names = list(dict.fromkeys(name for parts in self.phases.values() for name in parts))
        rows = [["of each device", *self.phases]]
        for name in names:
            cells = [parts.get(name) for parts in self.phases.values()]
            rows.append([name, *("" if x is None else human(x) for x in cells)])
        rows.append(["sum", *(human(self.need(phase)) for phase in self.phases)])
        return "\n".join(f"{row[0]:26}" + "".join(f"{x:>12}" for x in row[1:]) for row in rows)


class Planner:
    """The plan of a run as a function of its levers.

    Args:
      shapes: of "student" and, where the method has one, "teacher".
      on_cpu: see `Placed`.
    """

    def __init__(
        self,
        config: ConfigDict,
        sizes: Sizes,
        shapes: Mapping[str, ModelConfig],
        meshes: Meshes,
        on_cpu: bool,
    ):
        self.config, self.sizes = config, sizes
        self._buckets = prompt_lengths(config.data.prompt_buckets, config.data.max_prompt_tokens)
        student = shapes["student"]
        last = (on_cpu, sizes.lora)
        self.student = Placed.on(meshes.student, student, config.student.dtype, *last)
        self._sampler = Placed.on(meshes.rollout, student, sizes.rollout_dtype, *last)
        self._apart = meshes.apart
        self._packed = sizes.micro_batches > 1
        self.teacher = self._by_teacher = None
        if "teacher" in shapes:
            shape, dtype = shapes["teacher"], config.teacher.dtype
            self.teacher = Placed.on(meshes.teacher, shape, dtype, on_cpu)
            if sizes.method.sampler == "teacher":
                self._by_teacher = Placed.on(meshes.rollout, shape, dtype, on_cpu)
        estimator = config.kd_estimator if sizes.method.kd else ""
        self._support = config.kd_topk.k if estimator == "topk" else 0
        self._full = self.teacher if estimator == "full" else None
        self._probed = sizes.method.scores and config.health.teacher_every > 0

    def plan(self, levers: Levers) -> Plan:
        """Each phase at its worst moment. 'score' is there only if somebody is asked."""
        config = self.config
        phases = {
            "rollout": self._sampling(
                self._by_teacher or self._sampler,
                config.rollout.prompts_per_step + config.rollout.carry,
                config.rollout.group_size,
                levers,
            ),
            "score": self._scoring(levers),
            "update": self._updating(levers),
        }
        if config.rollout.server.url:  # draws with memory of its own
            del phases["rollout"]
        elif config.eval.every:
            asked = (config.eval.batch, config.eval.samples)
            phases["eval"] = self._sampling(self._sampler, *asked, self._evaluating(levers))
        return Plan({name: parts for name, parts in phases.items() if parts})

    def resident(self, where: str = "student") -> Parts:
        """What lives from the first step to the last, on the devices of a mesh."""
        if where in self._apart:
            return {"teacher": self.teacher.frozen()} if where == "teacher" and self.teacher else {}
        parts = {"weights": self.student.learner()}
        if not self.config.optimizer.offload:
            parts["moments"] = self.student.moments()
        if self.teacher and not self.config.teacher.offload and "teacher" not in self._apart:
            parts["teacher"] = self.teacher.frozen()
        if self.config.reference_coef and self.student.lora is None:  # else it is the base
            parts["reference"] = self.student.frozen()
        if self._full:  # replicated on the student's mesh
            parts["teacher's head"] = self._full.table(self._full.width) * self._full.tensor
        return parts

    def _evaluating(self, levers: Levers) -> Levers:
        """Returns the levers of the engine that evaluates: see `eval_slots`."""
        budget, drawn = self.config.eval.max_new_tokens, levers.max_new_tokens
        if budget <= drawn:
            return levers
        parts = self._sampler.batch
        slots = eval_slots(levers.slots, self._buckets[-1], drawn, budget, parts)
        return dataclasses.replace(levers, slots=slots, max_new_tokens=budget)

    def _row(self, levers: Levers) -> int:
        return self._buckets[-1] + levers.max_new_tokens

    def _scored(self, levers: Levers) -> int:
        """Columns of a row that have log-probs: in packed rows all but one."""
        return self._row(levers) - 1 if self._packed else levers.max_new_tokens

    def _sampling(self, model: Placed, problems: int, group: int, levers: Levers) -> Parts:
        """See `RolloutEngine`: a copy of the weights, the slots' caches, and what fills them."""
        buckets, c = self._buckets, model.shape
        by_teacher = model is self._by_teacher
        steps, total = chunk_size(levers.max_new_tokens), problems * group
        slots = min(levers.slots, total)
        windows = window_sizes(self._row(levers) + steps, buckets[0] + steps)
        first = choose_window(windows, buckets[-1] + steps)
        window, smaller = windows[-1], windows[-2] if len(windows) > 1 else 0
        at_once = min(problems, -(-slots // group))
        prompts = model.cache(at_once, buckets[-1])
        during = window if total > slots else first  # when prompts are prefilled
        # Products read bf16 as float32 on CPU: the loop over tokens has copies of all it reads.
        wide = F32 / model.width if model.on_cpu and model.width < F32 else 0.0
        heads = model.rows(slots) * c.num_heads / model.tensor
        drawing = {
            "KV cache": model.cache(slots, window) * (1 + wide),
            "prompts' cache": prompts,
            "new tokens' cache": model.cache(slots, steps),
            "logits": SAMPLER_LOGITS * model.rows(slots) * c.vocab_size * F32,
            "activations": heads * window * F32 + model.whole(model.width) * wide,
        }
        growing = {
            "KV cache": model.cache(slots, window) + model.cache(slots, smaller),
            "prompts' cache": prompts,
        }
        filling = {
            "KV cache": model.cache(slots, during),
            "prompts' cache": prompts,
            "activations": model.forward(model.rows(at_once), buckets[-1]),
        }
        admitting = {
            "KV cache": model.cache(slots, first) + model.cache(slots, buckets[-1]),
            "prompts' cache": prompts,
        }
        cast = model.width < (F32 if by_teacher else self.student.held)
        copying = {"activations": model.whole(model.width) if cast else 0.0}
        always = {"rollout's copy of weights": model.unstacked(), "batch": self._batch(levers)}
        home = self.teacher if by_teacher and self.teacher else self.student
        if by_teacher and self.config.teacher.offload:
            always["teacher"] = model.frozen()
        elif (home.fsdp, home.tensor) != (model.fsdp, model.tensor) or "rollout" in self._apart:
            stored = model.frozen() if by_teacher else model.learner()
            always["weights as rollouts have them"] = stored
        return self._worst("rollout", always, drawing, growing, filling, admitting, copying)

    def _scoring(self, levers: Levers) -> Parts:
        """See `Scorer`: one forward pass at a time, and logits in chunks."""
        chunk = scoring_chunk(levers.logprob_chunk, self.student.on_cpu)
        asked: list[tuple[Placed, int]] = []  # with the width of their weights
        support = self.config.kd_topk.support if self._support else ""
        if self.sizes.updates > 1 or support == "student":
            asked.append((self.student, self.student.held))
        if self.config.reference_coef:
            asked.append((self.student, self.student.width))
        if self.teacher and self.sizes.method.scores:
            asked.append((self.teacher, self.teacher.width))
        length, row = self._scored(levers), self._row(levers)
        moments: dict[str, list[Parts]] = {"student": [], "teacher": []}
        for model, stored in asked:
            of = moments["teacher" if model is self.teacher else "student"]
            rows = model.rows(levers.micro_batch)
            copies = LOSS_LOGITS + (1 if self._support else 0)
            head = model.table(model.acts) if stored != model.acts or model.fsdp > 1 else 0.0
            logits = copies * model.logits(rows, length, chunk)
            of += [{"activations": model.forward(rows, row)}, {"logits": logits + head}]
        always = {"batch": self._batch(levers)}
        if self.teacher and self.config.teacher.offload:
            always["teacher"] = self.teacher.frozen()
        found = [self._worst(where, always, *of) for where, of in moments.items() if of]
        return max(found, key=lambda parts: sum(parts.values()), default={})

    def _updating(self, levers: Levers) -> Parts:
        """See `make_update`: the loss, the backward pass, then AdamW. And `TeacherProbe`."""
        model, length, row = self.student, self._scored(levers), self._row(levers)
        rows = model.rows(levers.micro_batch)
        kept = rows * row / model.context * model.shape.num_layers * model.kept(levers.remat, row)
        several = self.sizes.rollouts // self.config.mini_batches > levers.micro_batch
        gradients = model.trained()
        sums = gradients if several else 0.0  # of the micro-batches before
        copies = LOSS_LOGITS + (3 if self._full else 0)
        logits = copies * model.logits(rows, length, levers.logprob_chunk)
        cast = model.acts != model.held or model.fsdp > 1
        head = model.table(model.acts) if cast else 0.0
        of_head = model.table(F32) if model.lora is None else 0.0
        of_loss = {
            "activations": kept + model.gathered(),
            "logits": logits + head,
            "gradients": sums + of_head,
        }
        of_layers = {
            "activations": kept + model.backward(rows, row) + model.gathered(),
            "gradients": sums + gradients,
        }
        of_adamw = {"gradients": 2 * gradients}  # and the updates made of them
        always = {"batch": self._batch(levers, updating=True)}
        of_probe: Parts = {}
        if self._probed:  # sums beside the gradients, whatever the micro-batches; fields shuffled
            shuffled = self._scores(length) + F32 * length
            copies_of_them = 1 + 2 / self.config.mini_batches
            rows_of_all = self.student.rows(self.sizes.rollouts)
            of_probe = {**of_layers, "gradients": (2 if several else 3) * gradients}
            of_probe["teacher's probe"] = rows_of_all * shuffled * copies_of_them
        if self.config.optimizer.offload:
            always["moments"] = model.moments()
        return self._worst("student", always, of_loss, of_layers, of_adamw, of_probe)

    def _batch(self, levers: Levers, updating: bool = False) -> float:
        """Rollouts, rows and scores; while updating also the batch, its part, and that split."""
        length, row = self._scored(levers), self._row(levers)
        scores = self._scores(length)
        found = 3 * F32 * row + 2 * F32 * length + scores
        if self._packed:  # which token is where
            found += F32 * (length + levers.max_new_tokens)
        if updating:
            found += (3 * F32 * row + 4 * F32 * length + scores) * (
                1 + 2 / self.config.mini_batches
            )
        return self.student.rows(self.sizes.rollouts) * found

    def _scores(self, length: int) -> float:
        """Bytes of a row's `Scores`."""
        scores = F32 * 3 * length + 2 * F32 * self._support * length
        if self._full:
            scores += self._full.width * self._full.shape.hidden_size * length
        return scores

    def _worst(self, where: str, always: Parts, *moments: Parts) -> Parts:
        worst = max(moments, key=lambda parts: sum(parts.values()))
        return {**self.resident(where), **always, **worst}
