"""One run on one machine: the estimate, the compiler's account, and what would fit."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax.config import CONFIGS, load_config
from kdrl_jax.planning.compiled import Compiled, compile_program
from kdrl_jax.planning.machines import Machine, devices_of, require_compiler
from kdrl_jax.planning.programs import lowered_programs
from kdrl_jax.planning.speed import Speed, Speeds
from kdrl_jax.tasks.registry import get_task
from kdrl_jax.training.display import Display
from kdrl_jax.training.locate import fetch_model, used_keys, with_folders
from kdrl_jax.training.memory import GIB, Plan, human
from kdrl_jax.training.memory_check import LEARNING, SAMPLING, MemoryCheck
from kdrl_jax.training.meshes import make_meshes
from kdrl_jax.training.micro_batch import settle_micro_batch
from kdrl_jax.training.problems import load_run_tokenizer
from kdrl_jax.training.roles import check_shapes, read_model_config
from kdrl_jax.training.validation import ROLES, Sizes, validate
from kdrl_jax.types import UserError

PROGRAMS = ("weights", "prefill", "grow", "decode", "score", "update")
"""What --compile names; 'score' is every program that scores."""
FAR = 0.2
"""By which share estimate and compiler may differ before the plan says so."""


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run needs of each device of a machine, and how fast it can be.

    Attributes:
      estimate: bytes by phase and part, from shapes.
      compiled: by program; empty where nothing was compiled, with `why`.
      limit: bytes of a device that may be used.
      problems: why it does not fit, with what would; empty: it fits.
      notes: what was chosen, where estimate and compiler differ, what the compiler does not tell.
      speed: by phase.
    """

    machine: Machine
    mesh: dict[str, int]
    teacher_mesh: dict[str, int]
    rollout_mesh: dict[str, int]
    estimate: Plan
    compiled: dict[str, Compiled]
    why: str
    limit: float
    problems: list[str]
    notes: list[str]
    speed: dict[str, Speed]
    micro_batch: int
    """Rows of a pass, over all devices."""
    learnt: float
    """Completion tokens of the longest step."""

    @property
    def fits(self) -> bool:
        """By the estimate and, where it was asked, by the compiler."""
        return not self.problems

    def compiled_need(self, phase: str) -> float | None:
        """Bytes of a phase's largest program by the compiler; None: not asked."""
        found = [x.need for x in self.compiled.values() if x.phase == phase]
        return max(found) if found else None

    def step_seconds(self, key: str) -> float | None:
        """Seconds of the longest step, the sum of its phases' `key`; None: one is not known."""
        seconds = [getattr(speed, key) for speed in self.speed.values()]
        return None if any(x is None for x in seconds) else sum(seconds)

    def to_json(self) -> dict[str, Any]:
        """Everything, in bytes and seconds."""
        return {
            "machine": self.machine.name,
            "chips": self.machine.count,
            "limit": self.limit,
            "mesh": self.mesh,
            "teacher_mesh": self.teacher_mesh,
            "rollout_mesh": self.rollout_mesh,
            "micro_batch": self.micro_batch,
            "fits": self.fits,
            "problems": self.problems,
            "notes": self.notes,
            "estimate": {phase: dict(parts) for phase, parts in self.estimate.phases.items()},
            "estimated_need": {x: self.estimate.need(x) for x in self.estimate.phases},
            "compiled_need": {x: self.compiled_need(x) for x in self.estimate.phases},
            "compiled": {name: x.to_json() for name, x in self.compiled.items()},
            "not_compiled": self.why,
            "speed": {
                name: dataclasses.asdict(x) | {"bound": x.bound, "limited_by": x.limited_by}
                for name, x in self.speed.items()
            },
        }


def make_run_plan(
    config: ConfigDict,
    machine: Machine,
    programs: tuple[str, ...] = PROGRAMS,
    *,
    required: bool = False,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> RunPlan:
    """Plan `config` on `machine`, compiling `programs` where that is possible.

    Args:
      required: refuse where they cannot be compiled, instead of leaving them out.
      report: called with a line of progress.

    Raises:
      UserError: the config cannot work on so many devices, the compiler does not fit jax, or
        `required`.
    """
    sizes = validate(config, sources=False)
    if programs:
        require_compiler(machine)
    config = with_known_shapes(config, report)
    devices, why = devices_of(machine) if programs else (None, "not asked for")
    meshes = make_meshes(config, devices, count=None if devices else machine.count)
    if meshes.apart and devices:
        why = "meshes on devices of their own are estimated alone"
    if required and why:
        raise UserError(f"--compile: {machine.name}: {why}; use --compile=none")
    ids = known_ids(config, sizes)
    shapes = check_shapes(config, sizes, ids, meshes, weights=False)
    limit = config.memory_gib * GIB or machine.limit
    sizes, line = settle_micro_batch(config, sizes, shapes, meshes, limit=limit)
    job = (config, sizes, shapes, meshes)
    check = MemoryCheck(*job, limit=limit)
    compiled: dict[str, Compiled] = {}
    if devices and not meshes.apart:
        report(f"{machine.name}: lowering the programs of a step")
        for program in lowered_programs(*job, ids):
            if program.name.split()[0] in programs:
                report(f"{machine.name}: compiling {program.name}")
                compiled[program.name] = compile_program(program)
    return RunPlan(
        machine=machine,
        mesh=dict(meshes.student.shape),
        teacher_mesh=dict(meshes.teacher.shape),
        rollout_mesh=dict(meshes.rollout.shape),
        estimate=check.plan,
        compiled=compiled,
        why=why,
        limit=limit,
        problems=check.problems() + _too_large(check, compiled, limit),
        notes=[
            *([line] if line else []),
            *_differences(check.plan, compiled),
            *_without_text(compiled),
        ],
        micro_batch=sizes.micro_batch,
        speed=Speeds(*job, machine, compiled).phases(),
        learnt=sizes.rollouts * config.rollout.max_new_tokens,
    )


def with_known_shapes(config: ConfigDict, report: Callable[[str], None]) -> ConfigDict:
    """Returns a copy of `config` with a folder, or no path at all, for each model of the hub.

    The model's config.json is downloaded, and no weights. Where the hub is out of reach the shape
    in the config counts, if the config has one for this model.

    Raises:
      UserError: there is no such model, or neither a way to it nor a shape.
    """
    display, folders, problems = Display(quiet=True), {}, []
    usual = load_config(CONFIGS / "base.py")
    for key, text in used_keys(config).items():
        try:
            folders[key] = str(
                fetch_model(key, text, display, offline=config.offline, weights=False)
            )
        except UserError as error:
            role = key.partition(".")[0]
            if key == "tokenizer" or config[role].shape == usual[role].shape:
                problems += error.problems
                continue
            reason = error.problems[0].partition(";")[0]
            report(f"{reason}: planned with {role}.shape")
            folders[key] = ""
    if problems:
        raise UserError(*problems)
    return with_folders(config, folders)


def known_ids(config: ConfigDict, sizes: Sizes) -> int:
    """Ids of the tokenizer, or nearly as many where only the models' shapes are known.

    Published vocabularies have rows to spare: one is left over, so that programs mask it.

    Raises:
      UserError: neither a shape nor a task says how many.
    """
    roles = ROLES if sizes.method.uses_teacher else ROLES[:1]
    rows = []
    for name in roles:
        role = config[name]
        if role.path:
            rows.append(read_model_config(role.path).vocab_size)
        elif role.shape.vocab_size:
            rows.append(role.shape.vocab_size)
        elif config.data.task and get_task(config.data.task).alphabet is not None:
            return load_run_tokenizer(config).size
        else:
            raise UserError(
                f"{name}.shape.vocab_size: 0, and {name}.path is empty; give the rows of the "
                "model's embedding (configs/shapes.py has published ones) or its folder"
            )
    return min(rows) - 1


def _too_large(check: MemoryCheck, compiled: dict[str, Compiled], limit: float) -> list[str]:
    """A line for each phase whose largest program does not fit by the compiler."""
    problems = []
    for group in (SAMPLING, LEARNING):
        for phase in group:
            bad = [x for x in compiled.values() if x.phase == phase and not x.fits(limit)]
            if not bad:
                continue
            worst = max(bad, key=lambda x: x.need)
            if worst.error and worst.limit is None:
                problems.append(f"{worst.program}: the compiler failed: {worst.error}")
                continue
            # What brings the estimate down as far as the compiler's figure must come down.
            aim = limit * min(1.0, check.plan.need(phase) / worst.need)
            problems.append(
                f"{worst.program}: by the compiler {human(worst.need)} of a device's "
                f"{human(limit)}; {check.advice((phase,), aim)}"
            )
    return problems


def _differences(plan: Plan, compiled: dict[str, Compiled]) -> list[str]:
    """A line for each phase in which estimate and compiler are far apart."""
    notes = []
    for phase in plan.phases:
        found = [x for x in compiled.values() if x.phase == phase]
        if not found:
            continue
        worst = max(found, key=lambda x: x.need)
        ratio = plan.need(phase) / worst.need
        if abs(ratio - 1) > FAR:
            notes.append(
                f"{phase}: the estimate is {ratio:.2f} of the compiler's account "
                f"({human(plan.need(phase))} and {human(worst.need)}, {worst.program})"
            )
    return notes


def _without_text(compiled: dict[str, Compiled]) -> list[str]:
    """A line for each reason why programs have no account."""
    reasons = dict.fromkeys(x.no_text for x in compiled.values() if x.no_text)
    return [
        f"{', '.join(name for name, x in compiled.items() if x.no_text == reason)}: collectives "
        f"and the compiler's time are not known; it gives no text of the program ({reason})"
        for reason in reasons
    ]
