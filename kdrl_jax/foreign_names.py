"""Names that other trainers have for what is a key here, with what to write instead.

TRL's are those of `GRPOConfig`, `TrainingArguments` and its scripts, verl's those of its YAML
files. A dotted name is looked up as it is, then without its first part, and so on:
`actor_rollout_ref.rollout.n` is `rollout.n`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 100
"""Characters of a value that an answer repeats."""


@dataclasses.dataclass(frozen=True)
class Here:
    """What a foreign name is here.

    Attributes:
      keys: of configs/base.py; none where it follows from other keys, which `note` then names.
      note: what is to be known beside.
      values: theirs (in lower case), as one of ours for each key; any other value is no answer.
      form: how a value of theirs without a colon is written here, where `values` does not say.
    """

    keys: tuple[str, ...] = ()
    note: str = ""
    values: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    form: str = "{}"


def _is(*keys: str, note: str = "", form: str = "{}", **values: str) -> Here:
    """`keys`, with one of our values for each of theirs."""
    return Here(keys, note, {name.lower(): (ours,) for name, ours in values.items()}, form)


_ROWS = (
    "the rows of an update are rollout.prompts_per_step x rollout.group_size / mini_batches, on "
    "however many devices; micro_batch of them go through the model at once, over all devices "
    "(0: as many as fit)"
)
_PASSES = (
    "the passes of an update follow: rollout.prompts_per_step x rollout.group_size / mini_batches "
    "rows in parts of micro_batch (0: as many as fit)"
)
_LENGTH = (
    "a run's length is steps, of rollout.prompts_per_step problems each: for E passes over N "
    "problems steps = E x N / rollout.prompts_per_step"
)
_DEVICES = "all devices are used; mesh.* shares the model out over them, mesh.devices takes fewer"
_TO_THE_START = (
    "the weight of the KL to the initial student; that of the KL to the teacher is beta.init"
)
_KL_ON = "a KL to the initial student is there where its weight reference_coef is not 0"
_SAVED = "every checkpoint.every steps and after the last; the same command continues from there"
_OPTIMIZER = "the optimizer is AdamW: optimizer.*"
_GROUP = {
    **dict.fromkeys(("true", "group"), ("group",)),
    "batch": ("batch",),
    **dict.fromkeys(("false", "none"), ("none",)),
}
_SCHEDULES = {name: (name,) for name in ("constant", "cosine")} | {
    "constant_with_warmup": ("constant",)
}
_REMAT = {"true": ("full",), "false": ("none",)}
_BOTH_CLIPS = Here(("clip_eps_low", "clip_eps_high"))

NAMES: dict[str, Here] = {
    # --- models and data
    **dict.fromkeys(("model_name_or_path", "model_name", "model_id", "model"), _is("student.path")),
    "model.path": _is("student.path"),
    "teacher_model_name_or_path": _is("teacher.path"),
    "teacher_model": _is("teacher.path"),
    "dataset_name": _is("data.path", note="hf://owner/name is the hub's", form="hf://{}"),
    "train_dataset": _is("data.path"),
    "eval_dataset": _is("data.eval_path"),
    "train_files": _is("data.path"),
    "val_files": _is("data.eval_path"),
    "prompt_key": _is("data.fields.problem"),
    "max_prompt_length": _is("data.max_prompt_tokens"),
    "filter_overlong_prompts": Here(
        note="prompts over data.max_prompt_tokens are always left out, counted and reported"
    ),
    "bf16": _is("student.dtype", true="bfloat16", false="float32"),
    **dict.fromkeys(
        ("torch_dtype", "dtype"),
        _is("student.dtype", bfloat16="bfloat16", float32="float32", auto="bfloat16"),
    ),
    "gradient_checkpointing": Here(("student.remat",), values=_REMAT),
    "enable_gradient_checkpointing": Here(("student.remat",), values=_REMAT),
    "use_peft": Here(note="adapters are trained where student.lora.rank is not 0"),
    **dict.fromkeys(("lora_r", "lora_rank"), _is("student.lora.rank")),
    "lora_alpha": _is("student.lora.alpha"),
    **dict.fromkeys(("lora_target_modules", "target_modules"), _is("student.lora.targets")),
    # --- rollouts
    **dict.fromkeys(("num_generations", "rollout.n"), _is("rollout.group_size")),
    **dict.fromkeys(
        ("max_completion_length", "max_response_length", "response_length", "max_new_tokens"),
        _is("rollout.max_new_tokens"),
    ),
    "train_batch_size": _is("rollout.prompts_per_step", note="in problems"),
    "generation_batch_size": Here(
        ("rollout.prompts_per_step",), "in problems: theirs counts completions; divide"
    ),
    **{name: _is(f"rollout.{name}") for name in ("temperature", "top_p", "top_k", "min_p")},
    "use_vllm": Here(note="a vLLM server draws where rollout.server.url has its address"),
    "vllm_mode": Here(note="a vLLM server draws where rollout.server.url has its address"),
    "vllm_server_base_url": _is("rollout.server.url"),
    "vllm_server_timeout": _is("rollout.server.timeout_s"),
    "vllm_importance_sampling_cap": _is("tis_cap"),
    "gpu_memory_utilization": Here(note="GiB of each device that a run may use: memory_gib"),
    "vllm_gpu_memory_utilization": Here(note="GiB of each device that a run may use: memory_gib"),
    "tensor_model_parallel_size": _is("rollout_mesh.tensor"),
    "vllm_tensor_parallel_size": _is("rollout_mesh.tensor"),
    # --- rewards
    "reward_funcs": Here(
        ("reward.functions",),
        "module:function or module:function*weight, several with commas",
        form="module:{}",
    ),
    "reward_weights": Here(note="weights stand behind the functions: reward.functions=m:f*0.2"),
    "custom_reward_function.path": Here(note="reward.functions=module:function"),
    "custom_reward_function.name": Here(note="reward.functions=module:function"),
    "mask_truncated_completions": _is("mask_truncated"),
    # --- objective
    **dict.fromkeys(("kl_coef", "kl_loss_coef", "beta"), _is("reference_coef", note=_TO_THE_START)),
    **dict.fromkeys(("use_kl_loss", "use_kl_in_reward"), Here(note=_KL_ON)),
    **dict.fromkeys(("epsilon", "clip_ratio", "cliprange"), _BOTH_CLIPS),
    "clip_ratio_low": _is("clip_eps_low"),
    **dict.fromkeys(("epsilon_high", "clip_ratio_high"), _is("clip_eps_high")),
    "entropy_coeff": _is("entropy_coef"),
    "loss_type": _is(
        "aggregation",
        grpo="seq-mean-token-mean",
        bnpo="token-mean",
        dapo="token-mean",
        dr_grpo="seq-mean-token-sum-norm",
    ),
    "loss_agg_mode": Here(
        ("aggregation",),
        values={
            name: (name,)
            for name in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
        },
    ),
    "scale_rewards": Here(("advantage.scale",), values=_GROUP),
    "norm_adv_by_std_in_grpo": Here(("advantage.scale",), values=_GROUP),
    "adv_estimator": Here(
        ("objective", "advantage.baseline"),
        "there is no critic",
        {"grpo": ("grpo", "mean"), "rloo": ("grpo", "leave_one_out")},
    ),
    "filter_groups.enable": Here(note="rollout.refill says how many more rollout batches"),
    # --- updates
    **dict.fromkeys(("learning_rate", "lr"), _is("optimizer.learning_rate")),
    "weight_decay": _is("optimizer.weight_decay"),
    "adam_beta1": _is("optimizer.b1"),
    "adam_beta2": _is("optimizer.b2"),
    "adam_epsilon": _is("optimizer.eps"),
    "optim": Here(note=_OPTIMIZER),
    **dict.fromkeys(("max_grad_norm", "grad_clip"), _is("optimizer.clip_norm")),
    "lr_scheduler_type": Here(("optimizer.schedule",), values=_SCHEDULES),
    **dict.fromkeys(("warmup_steps", "lr_warmup_steps"), _is("optimizer.warmup_steps")),
    "warmup_ratio": Here(note="optimizer.warmup_steps is a number of updates"),
    **dict.fromkeys(("num_iterations", "ppo_epochs"), _is("epochs", note="over a rollout batch")),
    "ppo_mini_batch_size": Here(
        note="mini_batches is the number of parts: rollout.prompts_per_step / their size"
    ),
    "per_device_train_batch_size": Here(note=_ROWS),
    **dict.fromkeys(("ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu"), Here(note=_ROWS)),
    **dict.fromkeys(("gradient_accumulation_steps", "steps_per_generation"), Here(note=_PASSES)),
    # --- the run
    **dict.fromkeys(("max_steps", "total_training_steps"), _is("steps")),
    **dict.fromkeys(("num_train_epochs", "total_epochs"), Here(note=_LENGTH)),
    **dict.fromkeys(("output_dir", "default_local_dir"), Here(note="the folder is --workdir")),
    "logging_steps": Here(note="every step is logged; samples.every says when rollouts are shown"),
    "log_completions": Here(note="rollouts are shown every samples.every steps"),
    **dict.fromkeys(("save_steps", "save_freq"), _is("checkpoint.every")),
    "save_total_limit": _is("checkpoint.keep"),
    **dict.fromkeys(("save_strategy", "resume_from_checkpoint"), Here(note=_SAVED)),
    **dict.fromkeys(("eval_steps", "test_freq"), _is("eval.every")),
    "eval_strategy": Here(note="every eval.every steps, before the first and after the last"),
    "per_device_eval_batch_size": _is("eval.batch", note="problems, over all devices"),
    "report_to": Here(note="wandb.project=NAME turns Weights & Biases on"),
    "project_name": _is("wandb.project"),
    **dict.fromkeys(("run_name", "experiment_name"), _is("wandb.name")),
    **dict.fromkeys(("n_gpus_per_node", "nnodes", "deepspeed", "fsdp"), Here(note=_DEVICES)),
}


def here(name: str) -> Here | None:
    """What a foreign name is; None: not known."""
    parts = name.split(".")
    found = (NAMES.get(".".join(parts[first:])) for first in range(len(parts)))
    return next(filter(None, found), None)


def answer(name: str, value: Any = None, option: str = "") -> str:
    """'num_generations: here it is rollout.group_size; write rollout.group_size=8'.

    Args:
      value: theirs; None: not given.
      option: stands before a key, '--config.' on the command line.

    Returns:
      '' where the name is not known.
    """
    found = here(name)
    if found is None:
        return ""
    if not found.keys:
        return f"{name}: no such key; {found.note}"
    verb = "it is" if len(found.keys) == 1 else "they are"
    note = f" ({found.note})" if found.note else ""
    written = " ".join(
        f"{option}{key}={text}" for key, text in zip(found.keys, _values(found, value), strict=True)
    )
    return f"{name}: here {verb} {' and '.join(found.keys)}{note}; write {written}"


def _values(found: Here, value: Any) -> Sequence[str]:
    """One of our values for each key, 'VALUE' where theirs is not known."""
    unknown = ["VALUE"] * len(found.keys)
    if value is None or value == "":
        return unknown
    several = value if isinstance(value, list | tuple) else [value]
    texts = [str(getattr(x, "__name__", x)) for x in several]  # of a function its name
    if found.values:
        return found.values.get(",".join(texts).lower(), unknown)
    written = ",".join(x if ":" in x else found.form.format(x) for x in texts)
    return [written] * len(found.keys) if len(written) <= LONGEST else unknown
