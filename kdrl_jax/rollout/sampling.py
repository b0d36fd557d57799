"""One token per request from its logits: truncation, sampling and the untruncated log-prob.

Every request draws from its own key, so a token depends on the request and its position alone,
not on the batch, the mesh or the schedule around it. Truncation finds its threshold by bisection
over the probabilities themselves, so nothing is sorted; a settings value that switches a rule off
also skips its work, at run time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from kdrl_jax.types import SamplingParams

# The inverse CDF first chooses a block of the vocabulary, then a token in it.
BLOCK = 512


def sample(
    logits: Float[Array, "P G V"],
    keys: PRNGKeyArray,
    sampling: SamplingParams,
    *,
    valid_vocab: int,
) -> tuple[Int[Array, "P G"], Float[Array, "P G"]]:
    """One token per request, and its log-prob under softmax(logits/τ) before any truncation.

    top-k keeps the k likeliest tokens; top-p the fewest likeliest ones of those that hold top_p of
    their mass; min-p those at least min_p times as likely as the likeliest. Tokens that tie with
    the last one kept are kept too.

    Args:
      logits: float32; ids from `valid_vocab` on are never sampled and have no probability.
      keys: `[P, G]`, one fresh key for each draw.
      sampling: temperature 0 takes the likeliest token, with its log-prob at temperature 1.

    Returns:
      (tokens int32, log_probs float32), both `[P, G]`.
    """
    greedy = sampling.temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
    scaled = jnp.where(ids < valid_vocab, scaled, -jnp.inf)
    log_probs = jax.nn.log_softmax(scaled, axis=-1)
    tokens = jax.lax.cond(
        greedy,
        lambda: jnp.argmax(scaled, axis=-1).astype(jnp.int32),
        lambda: _draw(truncate(jnp.exp(log_probs), sampling), keys),
    )
    return tokens, jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def truncate(probs: Float[Array, "P G V"], sampling: SamplingParams) -> Float[Array, "P G V"]:
    """`probs` with what top-k, top-p and min-p cut off set to 0, not renormalised."""
    vocab = probs.shape[-1]

    def top_k(p: Array) -> Array:
        k = jnp.minimum(sampling.top_k, vocab)
        return _keep_largest(p, lambda kept: kept.sum(-1) >= k)

    def top_p(p: Array) -> Array:
        mass = sampling.top_p * p.sum(-1)
        return _keep_largest(p, lambda kept: jnp.where(kept, p, 0.0).sum(-1) >= mass)

    def min_p(p: Array) -> Array:
        return jnp.where(p >= sampling.min_p * p.max(-1, keepdims=True), p, 0.0)

    probs = jax.lax.cond(sampling.top_k > 0, top_k, lambda p: p, probs)
    probs = jax.lax.cond(sampling.top_p < 1, top_p, lambda p: p, probs)
    return jax.lax.cond(sampling.min_p > 0, min_p, lambda p: p, probs)


def _keep_largest(p: Float[Array, "P G V"], enough) -> Float[Array, "P G V"]:
    """The fewest largest entries of p for which `enough(kept [P, G, V]) -> [P, G]` holds.

    Floats that are not negative order as their bit patterns do, so 31 halvings of the range of
    patterns find the largest threshold exactly. The largest entry always stays.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough at low, not at high
        middle = low + (high - low) // 2
        good = enough(bits >= middle[..., None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    top = bits.max(-1)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top), top + 1))
    return jnp.where(bits >= low[..., None], p, 0.0)


def _draw(weights: Float[Array, "P G V"], keys: PRNGKeyArray) -> Int[Array, "P G"]:
    """An index with probability proportional to its weight, by inverse CDF at two levels.

    Two uniform numbers decide, whatever the vocabulary: Gumbel noise would take one per token.
    """
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys)
    vocab = weights.shape[-1]
    if vocab <= BLOCK:
        return _invert(weights, uniform[..., 0])
    blocks = -(-vocab // BLOCK)
    pad = blocks * BLOCK - vocab
    weights = jnp.pad(weights, [(0, 0), (0, 0), (0, pad)])
    weights = weights.reshape(*weights.shape[:2], blocks, BLOCK)
    block = _invert(weights.sum(-1), uniform[..., 0])
    inside = jnp.take_along_axis(weights, block[..., None, None], axis=2)[..., 0, :]
    return block * BLOCK + _invert(inside, uniform[..., 1])


def _invert(weights: Float[Array, "P G W"], uniform: Float[Array, "P G"]) -> Int[Array, "P G"]:
    """The first index at which the cumulative weight exceeds `uniform` of the total.

    Rounding can leave no such index, or one without weight: then the heaviest is as good.
    """
    total = jnp.cumsum(weights, axis=-1)
    reached: Bool[Array, "P G W"] = total > uniform[..., None] * total[..., -1:]
    reached &= weights > 0
    first = jnp.argmax(reached, axis=-1)
    return jnp.where(reached.any(-1), first, jnp.argmax(weights, axis=-1)).astype(jnp.int32)
