"""Refusing, before anything is allocated and all at once, a config that cannot work.

Names are looked up where they are defined: objectives, estimators, schedules, tasks. Nothing here
touches a device: a mistake costs a second, not a queue slot.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax.config import CONFIGS, flatten, load_config, to_json
from kdrl_jax.config_values import unknown_key
from kdrl_jax.data.filters import parse_filters
from kdrl_jax.models.lora import LoRA
from kdrl_jax.models.qwen import REMAT
from kdrl_jax.objectives import (
    AGGREGATIONS,
    METHODS,
    SCHEDULES,
    SUPPORTS,
    Method,
    beta_schedule,
    phase_schedule,
)
from kdrl_jax.rewards import FORMS
from kdrl_jax.tasks.registry import get_task, task_args
from kdrl_jax.training.adapters import lora_of, lora_problems
from kdrl_jax.training.baseline import Baseline
from kdrl_jax.training.health import THRESHOLDS, WATCHES
from kdrl_jax.training.locate import MODEL_KEYS, find_model
from kdrl_jax.training.own_code import own_code_problems
from kdrl_jax.training.safety import safety_problems, server_problems, without_secrets
from kdrl_jax.training.size_problems import held_out_problems, size_problems
from kdrl_jax.training.wandb_run import wandb_problems
from kdrl_jax.types import UserError

ROLES = ("student", "teacher")

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": tuple(METHODS),
    "kd_estimator": ("k1", "k2", "k3", "topk", "full"),
    "kd_topk.support": SUPPORTS,
    "kd_mask": ("none", "response", "group"),
    "beta.schedule": tuple(SCHEDULES),
    "trrd.clamp_gradient": ("clamp", "straight_through"),
    "aggregation": tuple(AGGREGATIONS),
    "advantage.scale": ("group", "batch", "none"),
    "advantage.baseline": ("mean", "leave_one_out", "none"),
    "optimizer.schedule": ("constant", "cosine"),
    "data.on_bad": ("raise", "drop"),
    "reward.answer": (*FORMS, "task"),
    "student.dtype": ("float32", "bfloat16"),
    "teacher.dtype": ("float32", "bfloat16", "int8"),
    "rollout.dtype": ("", "float32", "bfloat16"),
    "rollout.server.kind": ("vllm", "sglang"),
    **{f"{role}.remat": tuple(REMAT) for role in ROLES},
    **{f"{role}.shape.model_type": ("qwen2", "qwen3", "llama") for role in ROLES},
}

SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size")
_AT_LEAST_ONE = (
    *("steps", "rollout.prompts_per_step", "rollout.group_size", "rollout.max_new_tokens"),
    *("logprob_chunk", "reward.workers", "eval.problems", "eval.samples"),
    *("eval.batch", "checkpoint.every", "checkpoint.keep", "data.max_prompt_tokens", "data.size"),
    *("mini_batches", "epochs", "kd_topk.k", "rollout.server.concurrency", "health.window"),
    *(f"{role}.sft.{key}" for role in ROLES for key in ("batch_size", "problems")),
    *(f"{role}.shape.{key}" for role in ROLES for key in SHAPE),
)
_NOT_NEGATIVE = (
    *("seed", "rollout.top_k", "rollout.min_p", "clip_eps_low", "clip_eps_high", "eval.every"),
    *("entropy_coef", "optimizer.weight_decay", "optimizer.warmup_steps", "samples.every"),
    *("samples.count", "eval.temperature", "eval.max_new_tokens", "data.seed", "micro_batch"),
    *("reference_coef", "tis_cap", "memory_gib"),
    *("rollout.refill", "rollout.slots", "rollout.carry", "student.lora.rank"),
    *("reward.overlong_buffer", "reward.overlong_penalty", "trrd.alpha"),
    *("sft_problems", "trrd.alpha_end", "trrd.alpha_steps", "k3_clamp", "adaptive_entropy.target"),
    *("adaptive_entropy.delta", "adaptive_entropy.max"),
    "reward.verdict_weight",
    *(f"{role}.sft.{key}" for role in ROLES for key in ("steps", "seed")),
    *(f"{role}.shape.vocab_size" for role in ROLES),
    *("optimizer.b1", "optimizer.b2", "health.teacher_every", *THRESHOLDS),
)
_POSITIVE = (
    *("rollout.temperature", "rollout.top_p", "eval.top_p", "optimizer.learning_rate"),
    *("optimizer.clip_norm", "optimizer.eps", "reward.timeout_s", "student.sft.learning_rate"),
    "trrd.clamp",
    "student.lora.alpha",
    *("teacher.sft.learning_rate", "process_timeout_s", "rollout.server.timeout_s"),
)

_AT_MOST_ONE = ("rollout.top_p", "rollout.min_p", "eval.top_p", "trrd.alpha", "trrd.alpha_end")

# Keys that may change between a run and its resumption; all others shape the result.
RESUMABLE_CHANGES = (
    *("steps", "checkpoint.", "samples.", "cache_dir", "micro_batch", "process_timeout_s"),
    *("mesh.", "teacher_mesh.", "rollout_mesh.", "health.", "rollout.slots", "rollout.server."),
    *("reward.workers", "logprob_chunk", "memory_gib", "optimizer.offload", "teacher.offload"),
    *("offline", "debug", "wandb."),
    *(f"{role}.remat" for role in ROLES),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What follows from a config."""

    method: Method
    rollouts: int
    """B = prompts_per_step · group_size, the rows of a step."""
    micro_batch: int
    """Rows of a pass, over all devices; 0: open, see `training.micro_batch`."""
    micro_batches: int
    """Forward and backward passes of one update; 0: open."""
    updates: int
    """Optimizer updates of one step: mini_batches · epochs."""
    logprob_temperature: float
    rollout_dtype: str
    """Of the student's rollouts and evaluations."""
    lora: LoRA | None = None
    """Of the student's adapters; None: all its weights are trained."""


def validate(
    config: ConfigDict, reference: ConfigDict | None = None, *, sources: bool = True
) -> Sizes:
    """Check every key and combination that can be checked without files or devices.

    Args:
      config: what `load_config` returned.
      reference: a config with every key; default `configs/base.py`.
      sources: whether what a run reads must be there: data, tasks, models. A plan does without.

    Raises:
      UserError: with one line per problem.
    """
    flat = flatten(config)
    if reference is None:
        reference = load_config(CONFIGS / "base.py")
    known = flatten(reference)
    problems = list(_key_problems(flat, known))
    # Where a key is missing or mistyped the default stands in, so that the rest is checked too.
    usable = {k: flat[k] if type(flat.get(k)) is type(v) else v for k, v in known.items()}
    problems += [*_value_problems(usable), *_combination_problems(usable, sources)]
    if problems:
        raise UserError(*without_secrets(problems, flat))
    temperature = flat["logprob_temperature"]
    rollouts = flat["rollout.prompts_per_step"] * flat["rollout.group_size"]
    rows = flat["micro_batch"]
    return Sizes(
        method=METHODS[flat["objective"]],
        rollouts=rollouts,
        micro_batch=rows,
        micro_batches=rollouts // flat["mini_batches"] // rows if rows else 0,
        updates=flat["mini_batches"] * flat["epochs"],
        logprob_temperature=(
            flat["rollout.temperature"] if temperature == "rollout" else float(temperature)
        ),
        rollout_dtype=flat["rollout.dtype"] or flat["student.dtype"],
        lora=lora_of(flat),
    )


def _key_problems(flat: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    for key in sorted(flat.keys() - known.keys()):
        yield unknown_key(key, flat[key], known)
    for key in sorted(known.keys() - flat.keys()):
        yield f"{key}: missing; derive the config from configs/base.py, which has it"
    for key in sorted(known.keys() & flat.keys()):
        if type(flat[key]) is not type(known[key]):
            kind = type(known[key]).__name__
            yield f"{key}: {flat[key]!r} must be {kind}, like {known[key]!r}"


def _value_problems(flat: dict[str, Any]) -> Iterator[str]:
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            near = difflib.get_close_matches(str(flat[key]), choices, n=1, cutoff=0.0)
            yield f"{key}: {flat[key]!r} is none of {', '.join(map(repr, choices))}" + (
                f"; the nearest is {near[0]!r}" if near else ""
            )
    checks: list[tuple[Sequence[str], Callable[[Any], bool], str]] = [
        (_AT_LEAST_ONE, lambda v: v >= 1, "must be at least 1"),
        (_NOT_NEGATIVE, lambda v: v >= 0, "must not be negative"),
        (_POSITIVE, lambda v: v > 0, "must be positive"),
        (_AT_MOST_ONE, lambda v: v <= 1, "must be at most 1"),
        (("kd_topk.log_floor",), lambda v: v < 0, "must be below 0; it is a log-prob in nats"),
        (("seed",), lambda v: v < 2**32, "must be below 2**32"),
        (("optimizer.b1", "optimizer.b2"), lambda v: v < 1, "must be below 1"),
    ]
    for keys, holds, rule in checks:
        for key in keys:
            if not holds(flat[key]):
                yield f"{key}: {flat[key]!r} {rule}"
    for name in [x for x in flat["health.stop"] if x not in ("all", *WATCHES)]:
        yield f"health.stop: {name!r} is none of 'all', {', '.join(map(repr, WATCHES))}"
    temperature = flat["logprob_temperature"]
    if temperature != "rollout":
        try:
            good = float(temperature) > 0
        except ValueError:
            good = False
        if not good:
            yield f"logprob_temperature: {temperature!r} must be 'rollout' or a positive number"


def _problems_of(check: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """What `check` refuses by a UserError."""
    try:
        check(*args, **kwargs)
    except UserError as error:
        return error.problems
    return []


def _combination_problems(flat: dict[str, Any], sources: bool) -> Iterator[str]:
    beta = {key: flat[f"beta.{key}"] for key in ("schedule", "init", "min", "delta", "phases")}
    if beta["schedule"] in SCHEDULES:
        yield from _problems_of(beta_schedule, **beta)
    yield from _problems_of(phase_schedule, flat["policy_phases"])
    if flat["objective"] in METHODS:
        yield from _method_problems(flat, METHODS[flat["objective"]])
        if flat["rollout.server.url"]:
            yield from server_problems(flat, METHODS[flat["objective"]])
    yield from wandb_problems(flat)
    if sources:
        yield from _problems_of(Baseline, flat["health.baseline"])
    yield from safety_problems(flat)
    yield from size_problems(flat)
    yield from lora_problems(flat, sources)
    if sources:
        yield from _source_problems(flat)


def _source_problems(flat: dict[str, Any]) -> Iterator[str]:
    """What a run reads and is not there."""
    objective = flat["objective"]
    taught = objective in METHODS and METHODS[objective].uses_teacher
    if taught and not (flat["teacher.path"] or flat["teacher.sft.steps"]):
        yield (
            f"teacher.path: empty, and objective={objective!r} needs a teacher; give a folder or "
            "a model of the hub, set teacher.sft.steps to make one, or use objective='grpo'"
        )
    yield from _task_problems(flat)
    yield from own_code_problems(flat)
    for key in ("data.path", "data.eval_path"):
        local = flat[key] and "://" not in flat[key] and not any(c in flat[key] for c in "*?[")
        if local and not Path(flat[key]).exists():
            named = re.fullmatch(r"[\w.-]+/[\w.-]+", flat[key])
            yield f"{key}: no file {flat[key]}" + (
                f"; a data set of the hub is hf://{flat[key]}" if named else ""
            )
    for key in MODEL_KEYS:
        if flat[key] and (key != "teacher.path" or taught):
            yield from _problems_of(find_model, key, flat[key])


def _method_problems(flat: dict[str, Any], method: Method) -> Iterator[str]:
    objective = flat["objective"]
    alone = flat["advantage.baseline"] == "none"
    if method.policy and flat["rollout.group_size"] == 1 and not alone:
        yield (
            f"rollout.group_size: 1 gives objective={objective!r} only zero advantages, as "
            "they compare the rewards of a group; use 2 or more, or objective='kd_rkl'"
        )
    if flat["rollout.refill"] and not method.policy:
        reason = (
            "learns from a fixed set of answers"
            if method.supervised
            else ("learns from every group whatever its rewards")
        )
        yield (
            f"rollout.refill: {flat['rollout.refill']}, but objective={objective!r} {reason}; "
            "set it to 0"
        )
    if flat["rollout.carry"] and (method.supervised or flat["rollout.refill"]):
        other = f"objective={objective!r}" if method.supervised else "rollout.refill"
        yield (
            f"rollout.carry: {flat['rollout.carry']} does not go with {other}, which looks for "
            "groups of another kind; set one of them to 0"
        )
    if not method.kd and flat["kd_estimator"] in ("topk", "full"):
        yield (
            f"kd_estimator: {flat['kd_estimator']!r} has no effect with objective={objective!r}, "
            "which has no distillation term; leave it at 'k2' or use objective='kdrl'"
        )
    truncated = [
        f"rollout.{key}={flat[f'rollout.{key}']}"
        for key, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0))
        if flat[f"rollout.{key}"] != off
    ]
    same_heat = flat["logprob_temperature"] in ("rollout", str(flat["rollout.temperature"]))
    if flat["tis_cap"] and truncated:
        yield (
            f"tis_cap: {flat['tis_cap']} with {', '.join(truncated)}; importance weights need the "
            "probabilities that tokens were drawn with, so sample untruncated or set tis_cap=0"
        )
    compared = {"tis_cap": bool(flat["tis_cap"]), "objective": method.shaped}
    compared["rollout.carry"] = bool(flat["rollout.carry"])
    for key in [k for k, used in compared.items() if used and not same_heat]:
        yield (
            f"{key}: {flat[key]!r} compares with the sampler's log-probs, which are at "
            f"rollout.temperature, not at logprob_temperature={flat['logprob_temperature']!r}; "
            "use 'rollout'"
        )


def _task_problems(flat: dict[str, Any]) -> Iterator[str]:
    name = flat["data.task"]
    if bool(name) == bool(flat["data.path"]):
        yield (f"data.task: {name!r} and data.path: {flat['data.path']!r}; set exactly one of them")
    wrong = _problems_of(get_task, name) if name else []
    yield from wrong
    task = get_task(name) if name and not wrong else None
    yield from _problems_of(task_args, flat["data.task_args"], task)
    yield from _problems_of(parse_filters, flat["data.filters"])
    yield from held_out_problems(flat)
    for role in ROLES:
        warm = flat[f"{role}.sft.task"] or name
        if flat[f"{role}.sft.steps"] and not warm:
            yield (
                f"{role}.sft.task: empty, as is data.task, and {role}.sft.steps needs worked "
                "solutions; name a task or set the steps to 0"
            )
        elif flat[f"{role}.sft.steps"] and not wrong:
            problems = _problems_of(get_task, warm) if flat[f"{role}.sft.task"] else []
            yield from problems
            if not problems and get_task(warm).solution is None:
                yield (
                    f"{role}.sft.steps: {flat[f'{role}.sft.steps']}, but {warm!r} has no worked "
                    "solutions; set it to 0"
                )
    if not flat["student.path"] and not name:
        yield "student.path: empty, which needs data.task; give a folder or a model of the hub"
    elif not flat["student.path"] and not wrong and get_task(name).alphabet is None:
        yield f"student.path: empty, and task {name!r} has no tokenizer; give a model folder"


def refused(config: ConfigDict, keys: tuple[str, ...]) -> list[str]:
    """What `validate` says of the keys that begin so: for commands that read no others."""
    try:
        validate(config)
    except UserError as error:
        return [line for line in error.problems if line.startswith(keys)]
    return []


def differences(
    where: Path, before: Mapping[str, Any], after: Mapping[str, Any], option: str
) -> list[str]:
    """A line for each setting that was another when `where` was made.

    Args:
      option: of the command line, which names a place where nothing has been made yet.
    """
    return [
        f"{where}: was made with {key}={before.get(key)!r}, now {after.get(key)!r}; "
        f"use the old value or another {option}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def compare_for_resume(
    old: dict[str, Any], new: ConfigDict, where: Path, option: str = "--workdir"
) -> None:
    """Refuse to continue a run whose results another config shaped.

    Raises:
      UserError: one line per key that differs and may not.
    """
    before = flatten(ConfigDict(old))
    after = flatten(ConfigDict(json.loads(to_json(new))))

    def shaping(flat: dict[str, Any]) -> dict[str, Any]:
        return {key: x for key, x in flat.items() if not key.startswith(RESUMABLE_CHANGES)}

    problems = differences(where, shaping(before), shaping(after), option)
    if before.get("steps") != after["steps"] and after["optimizer.schedule"] == "cosine":
        problems.append(
            f"{where}: was made with steps={before.get('steps')!r}, now {after['steps']!r}, "
            f"on which the cosine schedule depends; use the old value or another {option}"
        )
    if problems:
        raise UserError(*problems)
