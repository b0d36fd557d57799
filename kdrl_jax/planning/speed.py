"""How fast a step can be at best: bounds from data sheets, and the compiler's own estimate.

Every completion is taken to use its whole budget and every prompt its largest bucket, so figures
are of the longest step there can be. A bound is what no program can beat: FLOPs that the models
need at the peak, weights and caches at the memory's bandwidth, collectives at the links'. The
compiler's estimate is its cycles at the chip's clock, loops included; it leaves out collectives
that nothing hides and the attention kernels, which are added at the peak.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from kdrl_jax.data import prompt_lengths
from kdrl_jax.models import ModelConfig
from kdrl_jax.planning.compiled import Compiled
from kdrl_jax.planning.machines import Machine
from kdrl_jax.rollout import DecodeStats
from kdrl_jax.rollout.engine import chunk_size
from kdrl_jax.training.footprint import F32, Placed
from kdrl_jax.training.memory import Levers
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.performance import (
    Peak,
    decode_seconds,
    forward_flops,
    update_flops,
)
from kdrl_jax.training.validation import Sizes

BACKWARD = 2.5
"""FLOPs of attention's backward kernels over its forward's: five products for two."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of a phase of the longest step; None: not known.

    Attributes:
      tokens: what the phase is counted in: drawn, scored or trained on.
    """

    tokens: float
    compute: float
    memory: float | None
    links: float | None
    compiler: float | None = None

    @property
    def bound(self) -> float:
        """The least there can be."""
        return max(self.compute, self.memory or 0.0, self.links or 0.0)

    @property
    def limited_by(self) -> str:
        """Which of the three that is."""
        names = ("compute", "memory", "links")
        return max(names, key=lambda name: getattr(self, name) or 0.0)


class Speeds:
    """Bounds of a step's phases.

    Args:
      shapes: of "student" and, where the method has one, "teacher".
      found: what has been compiled, by name.
    """

    def __init__(
        self,
        config: ConfigDict,
        sizes: Sizes,
        shapes: Mapping[str, ModelConfig],
        meshes: Meshes,
        machine: Machine,
        found: Mapping[str, Compiled],
    ):
        self._config, self._sizes, self._machine, self._found = config, sizes, machine, found
        ro = config.rollout
        self._budget = ro.max_new_tokens
        self._prompt = prompt_lengths(config.data.prompt_buckets, config.data.max_prompt_tokens)[-1]
        student, rollout = shapes["student"], meshes.rollout
        trained = Placed.on(meshes.student, student, config.student.dtype, False)
        self._placed = {"student": trained}
        if "teacher" in shapes:
            where = (meshes.teacher, shapes["teacher"], config.teacher.dtype, False)
            self._placed["teacher"] = Placed.on(*where)
        sampler = (student, sizes.rollout_dtype)
        if sizes.method.sampler == "teacher" and "teacher" in shapes:
            sampler = (shapes["teacher"], config.teacher.dtype)
        self._sampler = Placed.on(rollout, *sampler, False)
        self._row = self._prompt + self._budget

    def phases(self) -> dict[str, Speed]:
        """By name: 'rollout', 'prefill', 'score NAME', 'update'."""
        phases = {}
        if not self._config.rollout.server.url:  # which draws on devices of its own
            phases = {"prefill": self._prefill(), "rollout": self._rollout()}
        phases |= {f"score {name}": self._score(name, role) for name, role in self._asked()}
        return phases | {"update": self._update()}

    def _asked(self) -> list[tuple[str, str]]:
        """(name, role) of the models that score."""
        c, sizes = self._config, self._sizes
        asked = [("old student", "student")] * (sizes.updates > 1 and not c.rollout.carry)
        asked += [("reference", "student")] * bool(c.reference_coef)
        asked += [("teacher", "teacher")] * ("teacher" in self._placed and sizes.method.scores)
        return asked

    def _rollout(self) -> Speed:
        model, total, budget = self._sampler, self._sizes.rollouts, self._budget
        slots = min(Levers.of(self._config).slots, total)
        steps = math.ceil(total / slots) * budget
        context = total * (self._prompt * budget + budget * (budget - 1) // 2)
        done = DecodeStats(steps, steps * slots, total * budget, context)
        peak, chunk = self._machine.peak, chunk_size(budget)
        found = self._found.get("decode")
        return Speed(
            tokens=total * budget,
            compute=decode_seconds(model, done, Peak(peak.flops, math.inf)),
            memory=decode_seconds(model, done, Peak(math.inf, peak.bandwidth)),
            links=self._links(found, steps / chunk),
            compiler=self._cycles(found, steps / chunk),
        )

    def _prefill(self) -> Speed:
        model, problems = self._sampler, self._config.rollout.prompts_per_step
        tokens = problems * self._prompt
        context = problems * self._prompt * (self._prompt + 1) / 2
        slots = min(Levers.of(self._config).slots, self._sizes.rollouts)
        at_once = min(problems, -(-slots // self._config.rollout.group_size))
        times = math.ceil(problems / at_once)
        found, attention = self._found.get("prefill"), self._attention(model, context)
        return Speed(
            tokens=tokens,
            compute=self._at_peak(forward_flops(model.shape, tokens, context, 0)),
            memory=times * model.whole(model.width) / self._machine.peak.bandwidth,
            links=self._links(found, times),
            compiler=self._cycles(found, times, attention),
        )

    def _score(self, name: str, role: str) -> Speed:
        model, passes = self._placed[role], self._sizes.rollouts // self._sizes.micro_batch
        tokens, context = self._tokens
        found, attention = self._found.get(f"score {name}"), self._attention(model, context)
        gathered = passes * model.whole(model.width) * (1 - 1 / model.fsdp)
        return Speed(
            tokens=tokens,
            compute=self._at_peak(forward_flops(model.shape, tokens, context, self._drawn)),
            memory=passes * model.whole(model.width) / self._machine.peak.bandwidth,
            links=self._links(found, 1, gathered),
            compiler=self._cycles(found, 1, attention),
        )

    def _update(self) -> Speed:
        model, c = self._placed["student"], self._config
        passes = c.epochs * self._sizes.rollouts // self._sizes.micro_batch
        tokens, context = self._tokens
        work = (model.shape, tokens, context, self._drawn)
        flops = c.epochs * update_flops(*work, adapters=self._sizes.lora is not None)
        again = c.student.remat != "none"
        attention = c.epochs * self._attention(model, context) * (1 + again + BACKWARD)
        # Weights forwards and backwards, and their gradients.
        weights = model.whole(model.width)
        gradients = model.whole(F32) if self._sizes.lora is None else 0.0
        moved = passes * (2 * weights + gradients) * (1 - 1 / model.fsdp)
        found = self._found.get("update")
        return Speed(
            tokens=c.epochs * tokens,
            compute=self._at_peak(flops),
            memory=passes * 2 * weights / self._machine.peak.bandwidth,
            links=self._links(found, self._sizes.updates, moved),
            compiler=self._cycles(found, self._sizes.updates, attention),
        )

    @property
    def _tokens(self) -> tuple[float, float]:
        """Of the longest step's rows, and how many each looks at, summed."""
        rows = self._sizes.rollouts
        return rows * self._row, rows * self._row * (self._row + 1) / 2

    @property
    def _drawn(self) -> float:
        return self._sizes.rollouts * self._budget

    def _at_peak(self, flops: float) -> float:
        return flops / (self._machine.count * self._machine.peak.flops)

    def _attention(self, model: Placed, context: float) -> float:
        """Seconds of the attention's forward kernels."""
        return self._at_peak(forward_flops(model.shape, 0, context, 0))

    def _links(self, found: Compiled | None, times: float, least: float | None = None):
        """From the compiled program, or from what must be moved at least, in bytes."""
        moved = found.account.size * times if found and found.account else least
        return None if moved is None else moved / self._machine.chip.link

    def _cycles(self, found: Compiled | None, times: float, kernels: float = 0.0) -> float | None:
        clock = self._machine.chip.clock
        if not (found and found.account and clock):
            return None
        return found.account.cycles * times / clock + kernels
