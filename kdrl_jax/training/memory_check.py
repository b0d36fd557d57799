"""Whether a run fits its devices, said before it starts; and what would, there and when it fails.

What does not fit is answered with the settings that do: fewer slots for rollouts, a smaller
micro-batch, another remat and smaller chunks of logits for scoring and update.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from kdrl_jax.models import ModelConfig
from kdrl_jax.sharding import batch_parts
from kdrl_jax.training.display import Display
from kdrl_jax.training.memory import GIB, Levers, Planner, human
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.validation import Sizes
from kdrl_jax.types import UserError

SAMPLING, LEARNING = ("rollout", "eval"), ("score", "update")
"""Phases by what mends them."""

KEYS = {
    "slots": "rollout.slots",
    "micro_batch": "micro_batch",
    "remat": "student.remat",
    "logprob_chunk": "logprob_chunk",
    "max_new_tokens": "rollout.max_new_tokens",
}
REMATS = ("none", "dots", "full")
"""By what they keep, the most first."""
SMALL_CHUNK = 128
"""Tokens; `logprob_chunk` below it starves the products."""
HEADROOM = 0.8
"""Of the estimate that proved too low: what advice after a failure aims at."""


def device_limit(memory_gib: float) -> float | None:
    """Bytes that a run may use of each device.

    Args:
      memory_gib: of the config; 0: what the devices report, on CPU their share of the machine.

    Returns:
      None: nobody knows.
    """
    if memory_gib:
        return memory_gib * GIB
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return _host_memory() / len(devices)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((x for x in limits if x), default=None)


def _host_memory() -> float:
    """Bytes of this machine, or of the control group the process is in, if that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2, version 1
        try:
            text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max": no limit
            found = min(found, int(text))
    return float(found)


class MemoryCheck:
    """The plan of a run and the limit it must keep.

    Args:
      shapes: of "student" and, where the method has one, "teacher".
      limit: bytes of a device, for devices that are not at hand and no CPUs; default: those here.
    """

    def __init__(
        self,
        config: ConfigDict,
        sizes: Sizes,
        shapes: Mapping[str, ModelConfig],
        meshes: Meshes,
        *,
        limit: float | None = None,
    ):
        on_cpu = limit is None and jax.devices()[0].platform == "cpu"
        self._planner = Planner(config, sizes, shapes, meshes, on_cpu)
        self._now = dataclasses.replace(Levers.of(config), micro_batch=sizes.micro_batch)
        self._slots_ways = batch_parts(meshes.rollout)
        self._rows_ways = max(batch_parts(meshes.student), batch_parts(meshes.teacher))
        self._rows = sizes.rollouts // config.mini_batches
        self.plan = self._planner.plan(self._now)
        self.limit = device_limit(config.memory_gib) if limit is None else limit

    def require(self, display: Display) -> MemoryCheck:
        """Say what the run will need; returns itself.

        Raises:
          UserError: phases need more than the limit; a line for those that the same keys mend,
            with what would fit.
        """
        of = "" if self.limit is None else f" of {human(self.limit)}"
        display.say(f"memory{of} a device, estimated: {self.plan.line()}")
        if problems := self.problems():
            display.say(self.plan.table())
            raise UserError(*problems)
        return self

    def problems(self) -> list[str]:
        """A line for those phases that need more than the limit and that the same keys mend."""
        limit = self.limit
        if limit is None or self.plan.peak <= limit:
            return []
        override = "an estimate: memory_gib sets another limit"
        resident = sum(self._planner.resident().values())
        if resident > limit:
            return [
                f"mesh.fsdp: weights, optimizer and frozen models alone take {human(resident)} of "
                f"a device's {human(limit)}; {self._elsewhere()} ({override})"
            ]
        problems = []
        for group in (SAMPLING, LEARNING):
            too_large = [p for p in group if p in self.plan.phases and self.plan.need(p) > limit]
            if too_large:
                needs = ", ".join(f"{p} needs {human(self.plan.need(p))}" for p in too_large)
                worst = max(too_large, key=self.plan.need)
                problems.append(
                    f"{self._names(group)}: {needs} of a device's {human(limit)}, "
                    f"{self._largest(worst)}; {self.advice(group, limit)} ({override})"
                )
        return problems

    def explain(self, error: BaseException, phase: str, step: int, saved: int | None) -> UserError:
        """What to tell a user whose devices ran out of memory.

        Args:
          phase: of `Plan.phases`, in which it happened.
          step: in which it happened.
          saved: step of the newest checkpoint.
        """
        limit = "unknown" if self.limit is None else human(self.limit)
        group = (phase,) if phase in self.plan.phases else LEARNING
        need = max(self.plan.need(p) for p in group if p in self.plan.phases)
        start = (
            "no checkpoint has been made, so the same command begins again"
            if saved is None
            else f"the checkpoint of step {saved} is whole, and the same command with these keys "
            "changed continues from it"
        )
        return UserError(
            f"{self._names(group)}: step {step}, {phase}: a device ran out of memory "
            f"({str(error).splitlines()[0][:200]}); the plan was {human(need)}, the limit is "
            f"{limit}; {self.advice(group, HEADROOM * need)}; {start}"
        )

    def advice(self, group: tuple[str, ...], limit: float) -> str:
        """Changes that bring phases below `limit` bytes, those that change results last.

        Args:
          group: some of SAMPLING, or of LEARNING.
        """
        sampling = group[0] in SAMPLING
        found = self._sampling(group, limit) if sampling else self._learning(group, limit)
        if found:
            return f"what fits: {'; or '.join(map(self._changes, found))}"
        # As little as the rest allows; then the budget is what is left.
        least = dataclasses.replace(self._now, slots=self._slots_ways)
        if not sampling:
            chunk = min(self._now.logprob_chunk, SMALL_CHUNK)
            least = dataclasses.replace(
                self._now, micro_batch=self._rows_ways, remat=REMATS[-1], logprob_chunk=chunk
            )
        for budget in _shrinking(self._now.max_new_tokens, 16):
            shorter = dataclasses.replace(least, max_new_tokens=budget)
            if self._fits(group, shorter, limit):
                return (
                    f"nothing that leaves results alone fits; {self._changes(shorter)} would; or "
                    f"{self._elsewhere()}"
                )
        return f"nothing smaller fits; {self._elsewhere()}"

    def _sampling(self, group: tuple[str, ...], limit: float) -> list[Levers]:
        """The most slots that fit."""
        for slots in _shrinking(self._now.slots, self._slots_ways):
            levers = dataclasses.replace(self._now, slots=slots)
            if self._fits(group, levers, limit):
                return [levers]
        return []

    def _learning(self, group: tuple[str, ...], limit: float) -> list[Levers]:
        """The largest micro-batch that fits: as things are, with less remat, with smaller chunks.

        Each one after the first is there because it allows a larger micro-batch.
        """
        chunk = self._now.logprob_chunk
        small = [c for c in (chunk // 4, chunk // 16) if c >= SMALL_CHUNK]
        # Only the update keeps anything that remat could drop.
        remats = (
            REMATS[REMATS.index(self._now.remat) :] if "update" in group else (self._now.remat,)
        )
        found: list[Levers] = []
        for remat, size in [(r, c) for c in (chunk, *small) for r in remats]:
            for rows in self._micro_batches():
                if found and rows <= found[-1].micro_batch:
                    break
                levers = dataclasses.replace(
                    self._now, remat=remat, logprob_chunk=size, micro_batch=rows
                )
                if levers != self._now and self._fits(group, levers, limit):
                    found.append(levers)
                    break
        return found[:3]

    def _micro_batches(self) -> Iterator[int]:
        """From the present one down: what divides an update's rows and the mesh can split."""
        for rows in range(self._now.micro_batch, 0, -1):
            if self._rows % rows == 0 and rows % self._rows_ways == 0:
                yield rows

    def _fits(self, group: tuple[str, ...], levers: Levers, limit: float) -> bool:
        plan = self._planner.plan(levers)
        return all(plan.need(phase) <= limit for phase in group if phase in plan.phases)

    def _names(self, group: tuple[str, ...]) -> str:
        """The keys that the memory of phases depends on most, with their values."""
        names = ("slots", "max_new_tokens") if group[0] in SAMPLING else ("micro_batch", "remat")
        return ", ".join(f"{KEYS[name]}={getattr(self._now, name)}" for name in names)

    def _largest(self, phase: str) -> str:
        parts = self.plan.phases[phase]
        name = max(parts, key=lambda part: parts[part])
        return f"{human(parts[name])} of it {name}"

    def _changes(self, levers: Levers) -> str:
        """'micro_batch=8, student.remat=full'."""
        return ", ".join(
            f"{KEYS[name]}={value}"
            for name, value in dataclasses.asdict(levers).items()
            if value != getattr(self._now, name)
        )

    def _elsewhere(self) -> str:
        return (
            f"use more devices (mesh.fsdp={self._planner.student.fsdp} shares out weights and "
            f"optimizer, mesh.tensor={self._planner.student.tensor} also what a phase adds) or a "
            "smaller model"
        )


def out_of_memory(error: BaseException | None) -> bool:
    """Whether XLA could not allocate what it needed."""
    if isinstance(error, ValueError):  # a program that has run before fails with it at dispatch
        return "RESOURCE_EXHAUSTED" in str(error)
    signs = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(s in str(error) for s in signs)


def _shrinking(most: int, ways: int) -> list[int]:
    """Multiples of `ways` near three quarters of `most`, half of it, three eighths, …"""
    parts = [part / 2**halvings for halvings in range(most.bit_length()) for part in (1.0, 0.75)]
    sizes = {int(most * part) // ways * ways for part in parts}
    return sorted((size for size in sizes if 0 < size < most), reverse=True)
