"""Per-token weights: aggregation and masking, decided once for a whole batch.

A loss is Σ weight·term. Whatever then splits, packs, pads or shards the rows cannot change it,
because no later step normalises by what it happens to see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kdrl_jax.objectives._checks import require_name, require_rank, require_shape

Aggregation = Literal[
    "group-token-mean", "token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]
KDMask = Literal["none", "response", "group"]

_Rows = Float[Array, "B"]
_MaxLength = int | Float[Array, ""] | None


def token_weights(
    completion_mask: Shaped[Array, "B T"],
    group_ids: Int[Array, " B"],
    mode: str = "group-token-mean",
    *,
    max_length: _MaxLength = None,
) -> Float[Array, "B T"]:
    """Weight of each completion token, 0 elsewhere; |oᵢ| tokens in response i.

        group-token-mean         1 / (groups · Σ_{j in i's group} |oⱼ|)   KDRL eq. 2, the default
        token-mean               1 / Σ_j |oⱼ|                             DAPO, arXiv 2503.14476
        seq-mean-token-mean      1 / (responses · |oᵢ|)                   GRPO, RLAD
        seq-mean-token-sum-norm  1 / (responses · max_length)             Dr. GRPO, 2503.20783

    The first three sum to 1 over the batch, so Σ weight·x is a mean of x. Responses without a
    token, such as rows that only fill a batch up, get no weight and count neither as responses
    nor as groups.

    Args:
      completion_mask: `[B, T]`, true (or non-zero) on tokens of the response.
      group_ids: `[B]`, any integers; equal ones are of one problem. Order does not matter.
      mode: a name from the table above; static.
      max_length: tokens; what "seq-mean-token-sum-norm" divides by. Unused by the others.

    Returns:
      Weights float32 `[B, T]`.

    Raises:
      ValueError: a shape or `mode` is wrong, or `max_length` is missing where it is needed.
    """
    require_rank(2, "[B, T]", completion_mask=completion_mask)
    require_shape(completion_mask.shape[:1], "completion_mask's first axis", group_ids=group_ids)
    require_name("mode", mode, AGGREGATIONS)
    mask = jnp.asarray(completion_mask) != 0
    lengths = mask.sum(axis=1)
    per_row = AGGREGATIONS[mode](lengths, jnp.asarray(group_ids), max_length)
    return jnp.where(mask, per_row[:, None], 0.0)


def kd_weights(
    weights: Float[Array, "B T"],
    rewards: Shaped[Array, " B"],
    group_ids: Int[Array, " B"],
    mask: str = "none",
) -> Float[Array, "B T"]:
    """Weights of the distillation term: reward-guided masking, arXiv 2506.02208 section 3.4.

        none      wᵢₜ
        response  wᵢₜ · I[rᵢ = 0]                    where this response failed
        group     wᵢₜ · I[rⱼ = 0 for all j in i's group]    where every response failed

    What is left is not renormalised: fewer failures mean less distillation.

    Args:
      weights: `[B, T]`, from `token_weights`.
      rewards: `[B]`, outcome rewards; 0 is a failure.
      group_ids: `[B]`, any integers; equal ones are of one problem.
      mask: "none", "response" or "group"; static.

    Returns:
      Weights `[B, T]` of the dtype of `weights`.

    Raises:
      ValueError: a shape or `mask` is wrong.
    """
    require_rank(2, "[B, T]", weights=weights)
    rows = weights.shape[:1]
    require_shape(rows, "weights' first axis", rewards=rewards, group_ids=group_ids)
    require_name("mask", mask, ("none", "response", "group"))
    weights = jnp.asarray(weights)
    if mask == "none":
        return weights
    kept = jnp.asarray(rewards) == 0
    if mask == "group":
        solved = _same_group(jnp.asarray(group_ids)) & ~kept[None, :]
        kept = ~solved.any(axis=1)
    return jnp.where(kept[:, None], weights, 0)


def _same_group(group_ids: Int[Array, " B"]) -> Bool[Array, "B B"]:
    return group_ids[:, None] == group_ids[None, :]


def _inverse(count: Array) -> Float[Array, "..."]:
    """1 / count in float32; of a count of 0, which only rows without tokens meet, 1."""
    return 1.0 / jnp.maximum(count, 1).astype(jnp.float32)


def _group_token_mean(
    lengths: Int[Array, " B"], group_ids: Int[Array, " B"], max_length: _MaxLength
) -> _Rows:
    same = _same_group(group_ids)
    group_tokens = jnp.where(same, lengths[None, :], 0).sum(axis=1)
    # A group is counted at its first response that has a token.
    earlier = jnp.tril(same & (lengths > 0)[None, :], -1).any(axis=1)
    groups = ((lengths > 0) & ~earlier).sum()
    return _inverse(group_tokens) * _inverse(groups)


def _token_mean(
    lengths: Int[Array, " B"], group_ids: Int[Array, " B"], max_length: _MaxLength
) -> _Rows:
    return jnp.broadcast_to(_inverse(lengths.sum()), lengths.shape)


def _seq_mean_token_mean(
    lengths: Int[Array, " B"], group_ids: Int[Array, " B"], max_length: _MaxLength
) -> _Rows:
    return _inverse(lengths) * _inverse((lengths > 0).sum())


def _seq_mean_token_sum_norm(
    lengths: Int[Array, " B"], group_ids: Int[Array, " B"], max_length: _MaxLength
) -> _Rows:
    if max_length is None:
        raise ValueError("max_length: missing; seq-mean-token-sum-norm divides by it")
    per_row = _inverse((lengths > 0).sum()) / jnp.asarray(max_length, jnp.float32)
    return jnp.broadcast_to(per_row, lengths.shape)


AGGREGATIONS: dict[str, Callable[[Array, Array, _MaxLength], _Rows]] = {
    "group-token-mean": _group_token_mean,
    "token-mean": _token_mean,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
}
"""Mode → (lengths [B], group_ids [B], max_length) → weight of a token of each row [B]."""
