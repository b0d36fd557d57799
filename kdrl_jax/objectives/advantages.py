"""From rewards of a group to advantages."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from kdrl_jax.objectives._checks import require_name, require_rank

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out", "none"]


def group_advantages(
    rewards_P_G: Real[Array, "P G"],
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    eps: float = 1e-6,
) -> Float[Array, "P G"]:
    """Advantage of each response over the others to the same problem.

        Âᵢ = (rᵢ − bᵢ) / (σ + eps)

    A group whose rewards are all equal teaches nothing: its Â is exactly 0, unless nothing is
    subtracted.

    Args:
      rewards_P_G: rewards `[P, G]`; any integers or floats.
      scale: σ is the population standard deviation of the rewards of the "group" (GRPO,
        arXiv 2402.03300) or of the whole "batch" (arXiv 2508.08221); "none" divides by nothing
        (Dr. GRPO, arXiv 2503.20783).
      baseline: b is the "mean" of the group, or the mean of the other G − 1 responses,
        "leave_one_out" (RLOO, arXiv 2402.14740), which equals (rᵢ − mean)·G/(G − 1); "none" is 0
        (REINFORCE), and does not go with the scale of a group, which may be 0.
      eps: added to σ; in units of reward.

    Returns:
      Advantages float32 `[P, G]`. With G = 1 and the mean as baseline they are all 0.

    Raises:
      ValueError: not two axes; an unknown `scale` or `baseline`; leave-one-out with G = 1; no
        baseline with the scale of a group.
    """
    require_rank(2, "[P, G]", rewards_P_G=rewards_P_G)
    require_name("scale", scale, ("group", "batch", "none"))
    require_name("baseline", baseline, ("mean", "leave_one_out", "none"))
    if baseline == "none" and scale == "group":
        raise ValueError("scale: 'group' found with baseline 'none'; use 'none' or 'batch'")
    rewards = jnp.asarray(rewards_P_G, jnp.float32)
    size = rewards.shape[1]
    if baseline == "leave_one_out" and size < 2:
        raise ValueError(f"rewards_P_G: G = {size}; leave_one_out needs two responses or more")

    centred = rewards
    if baseline != "none":
        centred = rewards - rewards.mean(axis=1, keepdims=True)
    if baseline == "leave_one_out":
        centred = centred * (size / (size - 1))
    if scale == "group":
        centred = centred / (rewards.std(axis=1, keepdims=True) + eps)
    elif scale == "batch":
        centred = centred / (rewards.std() + eps)
    if baseline == "none":
        return centred
    # The mean of equal floats need not be that float, and the division would blow the rest up.
    equal = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    return jnp.where(equal, 0.0, centred)
