"""Loading a config file, applying overrides, and refusing what cannot work, all at once.

A config is a file with `get_config()`; every key and its default stand in `configs/base.py`.
Nothing here allocates: a mistake costs a second, not a queue slot.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdrl_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent

ROLES = ("student", "teacher")

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("kdrl", "grpo", "kd_rkl"),
    "kd_estimator": ("k1", "k2", "k3"),
    "kd_mask": ("none", "response", "group"),
    "beta.schedule": ("constant", "linear"),
    "aggregation": (
        "group-token-mean",
        "token-mean",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
    ),
    "advantage.scale": ("group", "batch", "none"),
    "advantage.baseline": ("mean", "leave_one_out"),
    "optimizer.schedule": ("constant", "cosine"),
    "data.task": ("", "arithmetic"),
    "data.prompt_style": ("kdrl", "zero_rl", "chat", "plain"),
    **{f"{role}.dtype": ("float32", "bfloat16") for role in ROLES},
    **{f"{role}.sft.task": ("", "arithmetic") for role in ROLES},
    **{f"{role}.remat": ("none", "dots", "full") for role in ROLES},
    **{f"{role}.shape.model_type": ("qwen2", "qwen3", "llama") for role in ROLES},
}

SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size")
_AT_LEAST_ONE = (
    *("steps", "rollout.prompts_per_step", "rollout.group_size", "rollout.max_new_tokens"),
    *("micro_batch", "logprob_chunk", "reward.workers", "eval.problems", "eval.samples"),
    *("eval.batch", "checkpoint.every", "checkpoint.keep", "data.max_prompt_tokens", "data.size"),
    *(f"{role}.sft.{key}" for role in ROLES for key in ("batch_size", "problems")),
    *(f"{role}.shape.{key}" for role in ROLES for key in SHAPE),
)
_NOT_NEGATIVE = (
    *("seed", "rollout.top_k", "rollout.min_p", "clip_eps_low", "clip_eps_high", "eval.every"),
    *("entropy_coef", "optimizer.weight_decay", "optimizer.warmup_steps", "samples.every"),
    *("samples.count", "eval.temperature", "data.seed"),
    *(f"{role}.sft.{key}" for role in ROLES for key in ("steps", "seed")),
    *("optimizer.b1", "optimizer.b2"),
    *("beta.init", "beta.min", "beta.delta"),
)
_POSITIVE = (
    *("rollout.temperature", "rollout.top_p", "optimizer.learning_rate", "optimizer.clip_norm"),
    *("optimizer.eps", "reward.timeout_s", "student.sft.learning_rate"),
    "teacher.sft.learning_rate",
)

# Keys that may change between a run and its resumption; all others shape the result.
RESUMABLE_CHANGES = (
    *("steps", "checkpoint.", "samples.", "mesh.", "teacher_mesh.", "cache_dir", "micro_batch"),
    *("reward.workers", "logprob_chunk"),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers that follow from a config."""

    rollouts: int
    """B = prompts_per_step · group_size, the rows of an update."""
    micro_batches: int
    logprob_temperature: float
    uses_teacher: bool
    uses_reward: bool


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{'optimizer.learning_rate': 1e-6, …}."""
    flat: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as sorted, indented JSON: what `DIR/config.json` holds."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def digest(value: Any) -> str:
    """Twelve hex digits that name a JSON-able value: cache keys, config comparison."""
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Run `get_config()` of a file and apply `key=value` overrides.

    Args:
      path: a Python file; its folder's parent is importable while it runs.
      overrides: 'optimizer.learning_rate=3e-6'; lists are written (1,2) or 1,2.

    Raises:
      UserError: no such file, no `get_config`, unknown keys (with the nearest), wrong types.
    """
    file = Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.py") if p.name != "__init__.py")
        there = f"; there are {', '.join(near)}" if near else ""
        raise UserError(f"--config: no file {file}{there}")
    for folder in (str(file.resolve().parent.parent), str(ROOT)):
        if folder not in sys.path:
            sys.path.append(folder)
    spec = importlib.util.spec_from_file_location("kdrl_jax_config", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise UserError(f"--config: {_where(error, file)}: {error}; see configs/demo.py") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {file} must return a ConfigDict")
    config, problems = _override(config, overrides)
    if problems:  # name what else is wrong as well, so that one look mends it all
        try:
            validate(config)
        except UserError as error:
            problems += error.problems
        raise UserError(*problems)
    return config


def _where(error: Exception, file: Path) -> str:
    """'FILE:LINE' of the last frame in a config file that led to `error`."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{f.filename}:{f.lineno}" for f in frames if f.filename == str(file)]
    return f"{lines[-1] if lines else file}: {type(error).__name__}"


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of `config` with `key=value` strings applied; see `load_config`."""
    config, problems = _override(config, overrides)
    if problems:
        raise UserError(*problems)
    return config


def _override(config: ConfigDict, overrides: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """A copy of `config` with the overrides that can be applied, and what is wrong with others."""
    config = config.copy_and_resolve_references()
    flat = flatten(config)
    problems: list[str] = []
    updates: dict[str, Any] = {}
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator:
            problems.append(f"--config.{key}: no value; write --config.{key}=VALUE")
        elif key not in flat:
            near = difflib.get_close_matches(key, flat, n=1, cutoff=0.0)
            problems.append(f"--config.{key}: no such key; the nearest is {near[0]}")
        else:
            try:
                updates[key] = _parse(text, flat[key])
            except ValueError as error:
                problems.append(f"--config.{key}={text}: {error}")
    config.update_from_flattened_dict(updates)
    return config, problems


def _parse(text: str, default: Any) -> Any:
    """`text` as a value of the type of `default`.

    Raises:
      ValueError: it does not read as that type.
    """
    kind = type(default)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("must be true or false")
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind is tuple and type(value) in (int, list):
        value = tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not kind:
        raise ValueError(f"must be {kind.__name__}, like {default!r}")
    return value


def validate(config: ConfigDict, reference: ConfigDict | None = None) -> Sizes:
    """Check every key and combination that can be checked without files or devices.

    Args:
      config: what `load_config` returned.
      reference: a config with every key; default `configs/base.py`.

    Raises:
      UserError: with one line per problem.
    """
    flat = flatten(config)
    if reference is None:
        reference = load_config(ROOT / "configs" / "base.py")
    known = flatten(reference)
    problems = list(_key_problems(flat, known))
    # Where a key is missing or mistyped the default stands in, so that the rest is checked too.
    usable = {k: flat[k] if type(flat.get(k)) is type(v) else v for k, v in known.items()}
    problems += [*_value_problems(usable), *_combination_problems(usable)]
    if problems:
        raise UserError(*problems)
    temperature = flat["logprob_temperature"]
    rollouts = flat["rollout.prompts_per_step"] * flat["rollout.group_size"]
    return Sizes(
        rollouts=rollouts,
        micro_batches=rollouts // flat["micro_batch"],
        logprob_temperature=(
            flat["rollout.temperature"] if temperature == "rollout" else float(temperature)
        ),
        uses_teacher=flat["objective"] != "grpo",
        uses_reward=flat["objective"] != "kd_rkl",
    )


def _key_problems(flat: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    for key in sorted(flat.keys() - known.keys()):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        yield f"{key}: no such key; the nearest is {near[0]}"
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
        (("rollout.top_p", "rollout.min_p"), lambda v: v <= 1, "must be at most 1"),
        (("seed",), lambda v: v < 2**32, "must be below 2**32"),
        (("optimizer.b1", "optimizer.b2"), lambda v: v < 1, "must be below 1"),
    ]
    for keys, holds, rule in checks:
        for key in keys:
            if not holds(flat[key]):
                yield f"{key}: {flat[key]!r} {rule}"
    temperature = flat["logprob_temperature"]
    if temperature != "rollout":
        try:
            good = float(temperature) > 0
        except ValueError:
            good = False
        if not good:
            yield f"logprob_temperature: {temperature!r} must be 'rollout' or a positive number"
    buckets = flat["data.prompt_buckets"]
    whole = buckets and all(type(b) is int for b in buckets)
    if not whole or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        yield f"data.prompt_buckets: {buckets!r} must be increasing positive lengths"
    elif buckets[-1] < flat["data.max_prompt_tokens"]:
        yield (
            f"data.prompt_buckets: the largest, {buckets[-1]}, is below data.max_prompt_tokens="
            f"{flat['data.max_prompt_tokens']}; add that length"
        )


def _combination_problems(flat: dict[str, Any]) -> Iterator[str]:
    objective, group = flat["objective"], flat["rollout.group_size"]
    if flat["beta.schedule"] == "linear" and flat["beta.min"] > flat["beta.init"]:
        yield (
            f"beta.min: {flat['beta.min']!r} is above beta.init={flat['beta.init']!r}; "
            "the linear schedule falls from init to min"
        )
    if objective != "kd_rkl" and group == 1:
        yield (
            f"rollout.group_size: 1 gives objective={objective!r} only zero advantages, as "
            "they compare the rewards of a group; use 2 or more, or objective='kd_rkl'"
        )
    if objective != "grpo" and not (flat["teacher.path"] or flat["teacher.sft.steps"]):
        yield (
            f"teacher.path: empty, and objective={objective!r} needs a teacher; give a folder, "
            "set teacher.sft.steps to make one, or use objective='grpo'"
        )
    if bool(flat["data.task"]) == bool(flat["data.path"]):
        yield (
            f"data.task: {flat['data.task']!r} and data.path: {flat['data.path']!r}; "
            "set exactly one of them"
        )
    if not flat["data.task"] and flat["eval.every"] and not flat["data.eval_path"]:
        yield "data.eval_path: empty, but eval.every is not 0; give a JSONL file or eval.every=0"
    for role in ROLES:
        if flat[f"{role}.sft.steps"] and not (flat[f"{role}.sft.task"] or flat["data.task"]):
            yield (
                f"{role}.sft.task: empty, as is data.task, and {role}.sft.steps needs worked "
                "solutions; name a task or set the steps to 0"
            )
    if not flat["student.path"] and not flat["data.task"]:
        yield "student.path: empty, which needs data.task; give a model folder"
    if flat["micro_batch"] > 0 and flat["rollout.prompts_per_step"] * group % flat["micro_batch"]:
        yield (
            f"micro_batch: {flat['micro_batch']} does not divide the "
            f"{flat['rollout.prompts_per_step']} x {group} rollouts of a step"
        )
    for key in ("data.path", "data.eval_path"):
        if flat[key] and not Path(flat[key]).is_file():
            yield f"{key}: no file {flat[key]}"
    for key in ("student.path", "teacher.path", "tokenizer"):
        needed = objective != "grpo" or key != "teacher.path"
        if flat[key] and needed and not Path(flat[key]).is_dir():
            yield f"{key}: no folder {flat[key]}; give a Hugging Face model folder or a run's"


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run in this folder has got as far as its first checkpoint."""
    return any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*"))


def compare_for_resume(old: dict[str, Any], new: ConfigDict, where: Path) -> None:
    """Refuse to continue a run whose results another config shaped.

    Raises:
      UserError: one line per key that differs and may not.
    """
    before = flatten(ConfigDict(old))
    after = flatten(ConfigDict(json.loads(to_json(new))))
    problems = [
        f"{where}: was made with {key}={before.get(key)!r}, now {after.get(key)!r}; "
        "use the old value or another --workdir"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(RESUMABLE_CHANGES)
    ]
    if before.get("steps") != after["steps"] and after["optimizer.schedule"] == "cosine":
        problems.append(
            f"{where}: was made with steps={before.get('steps')!r}, now {after['steps']!r}, "
            "on which the cosine schedule depends; use the old value or another --workdir"
        )
    if problems:
        raise UserError(*problems)
