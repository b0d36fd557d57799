"""Sizes of a config that do not go together."""

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
    buckets = flat["data.prompt_buckets"]
    whole = all(type(b) is int for b in buckets)
    if buckets and (not whole or list(buckets) != sorted(set(buckets)) or buckets[0] < 1):
        yield f"data.prompt_buckets: {buckets!r} must be increasing positive lengths"
    elif buckets and buckets[-1] < flat["data.max_prompt_tokens"]:
        yield (
            f"data.prompt_buckets: the largest, {buckets[-1]}, is below data.max_prompt_tokens="
            f"{flat['data.max_prompt_tokens']}; add that length"
        )
