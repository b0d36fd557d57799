"""Sizes of a config that do not go together, and what a run is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def size_problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """A line for each, of a config by its dotted keys."""
    prompts, group = flat["rollout.prompts_per_step"], flat["rollout.group_size"]
    parts = flat["mini_batches"]
    if parts > 0 and prompts % parts:
        yield (
            f"mini_batches: {parts} does not divide rollout.prompts_per_step={prompts}; "
            "an update takes whole groups"
        )
    elif parts > 0 and flat["micro_batch"] > 0 and prompts // parts * group % flat["micro_batch"]:
        yield (
            f"micro_batch: {flat['micro_batch']} does not divide the "
            f"{prompts // parts} x {group} rollouts of an update"
        )
    if flat["reward.overlong_buffer"] > flat["rollout.max_new_tokens"]:
        yield (
            f"reward.overlong_buffer: {flat['reward.overlong_buffer']} exceeds "
            f"rollout.max_new_tokens={flat['rollout.max_new_tokens']}; it is the part of the "
            "budget that is punished"
        )
    start, most = flat["entropy_coef"], flat["adaptive_entropy.max"]
    if flat["adaptive_entropy.target"] > 0 and start > most:
        yield (
            f"entropy_coef: {start} is above adaptive_entropy.max={most}; it is where the "
            "coefficient starts, so use at most that"
        )
    if flat["advantage.baseline"] == "none" and flat["advantage.scale"] == "group":
        yield (
            "advantage.scale: 'group' does not go with advantage.baseline='none', as a group's "
            "standard deviation may be 0; use 'none' or 'batch'"
        )
    buckets = flat["data.prompt_buckets"]
    whole = all(type(b) is int for b in buckets)
    if buckets and (not whole or list(buckets) != sorted(set(buckets)) or buckets[0] < 1):
        yield f"data.prompt_buckets: {buckets!r} must be increasing positive lengths"
    elif buckets and buckets[-1] < flat["data.max_prompt_tokens"]:
        yield (
            f"data.prompt_buckets: the largest, {buckets[-1]}, is below data.max_prompt_tokens="
            f"{flat['data.max_prompt_tokens']}; add that length"
        )


def held_out_problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the choice of held-out problems."""
    share, file, task = flat["data.eval_fraction"], flat["data.eval_path"], flat["data.task"]
    if not 0 <= share < 1:
        yield f"data.eval_fraction: {share} must be at least 0 and below 1"
    elif share and file:
        yield (
            f"data.eval_fraction: {share}, but data.eval_path={file!r} has held-out problems; "
            "set one of them, data.eval_fraction=0 or data.eval_path="
        )
    elif share and task:
        yield (
            f"data.eval_fraction: {share}, but data.task={task!r} has a test split of its own; "
            "set data.eval_fraction=0"
        )
    if not task and flat["eval.every"] and not (file or share):
        yield (
            "data.eval_path: empty, but eval.every is not 0; give a JSONL file, hold some problems "
            "out by data.eval_fraction=0.1, or set eval.every=0"
        )
