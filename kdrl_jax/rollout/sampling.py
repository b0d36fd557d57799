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

# The inverse CDF first chooses a block of the vocabulary, of at most so many tokens, then a token.
BLOCK = 512


def sample(
    logits: Float[Array, "B V"],
    keys: PRNGKeyArray,
    sampling: SamplingParams,
    *,
    valid_vocab: int,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token per request, and its log-prob under softmax(logits/τ) before any truncation.

    top-k keeps the k likeliest tokens; top-p the fewest likeliest ones of those that hold top_p of
    their mass; min-p those at least min_p times as likely as the likeliest. Tokens that tie with
    the last one kept are kept too.

    Args:
      logits: float32; ids from `valid_vocab` on are never sampled and have no probability.
      keys: `[B]`, one fresh key for each draw.
      sampling: temperature 0 takes the likeliest token, with its log-prob at temperature 1.

    Returns:
      (tokens int32, log_probs float32), both `[B]`.
    """
    # The product that made the logits is not to be computed again within the sums below.
    logits = jax.lax.optimization_barrier(logits)
    vocab = logits.shape[-1]
    greedy = sampling.temperature <= 0
    z = logits * (1.0 / jnp.where(greedy, 1.0, sampling.temperature))
    if valid_vocab < vocab:
        ids = jax.lax.broadcasted_iota(jnp.int32, (1, vocab), 1)
        z = jnp.where(ids < valid_vocab, z, -jnp.inf)
    top = z.max(-1, keepdims=True)
    # No [B, V] array is kept: what is looked at again, one block, is computed again.
    sums = _blocks(jnp.exp(z - top)).sum(-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)

    def likeliest() -> Array:
        return jnp.argmax(z, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        return _draw(sums, lambda block: jnp.exp(_one_block(z, block, -jnp.inf) - top), uniform)

    def truncated() -> Array:
        weights = truncate(jnp.exp(z - top), sampling)
        of_blocks = _blocks(weights).sum(-1)
        return _draw(of_blocks, lambda block: _one_block(weights, block, 0.0), uniform)

    cuts = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    case = jnp.where(greedy, 0, jnp.where(cuts, 2, 1))
    tokens = jax.lax.switch(case, [likeliest, drawn, truncated])
    chosen = jnp.take_along_axis(z, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - top[:, 0] - jnp.log(sums.sum(-1))


def truncate(probs: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B V"]:
    """`probs`, of any sum, with what top-k, top-p and min-p cut off set to 0."""
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


def _keep_largest(p: Float[Array, "B V"], enough) -> Float[Array, "B V"]:
    """The fewest largest entries of p for which `enough(kept [B, V]) -> [B]` holds.

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


def block_size(vocab: int) -> int:
    """Tokens of a block: all, or a divisor of the vocabulary if there is one near BLOCK."""
    if vocab <= BLOCK:
        return vocab
    return next((size for size in range(BLOCK, BLOCK // 8, -1) if vocab % size == 0), BLOCK)


def _blocks(x: Float[Array, "B V"]) -> Float[Array, "B blocks size"]:
    vocab, size = x.shape[-1], block_size(x.shape[-1])
    if vocab % size:
        x = jnp.pad(x, [(0, 0), (0, -vocab % size)])
    return x.reshape(x.shape[0], -1, size)


def _one_block(
    x: Float[Array, "B V"], block: Int[Array, "B"], beyond: float
) -> Float[Array, "B size"]:
    """Block number `block` of each row, filled up with `beyond` where the vocabulary ends."""
    size = block_size(x.shape[-1])
    if size == x.shape[-1]:
        return x
    ids = block[:, None] * size + jnp.arange(size)[None, :]
    return jnp.take_along_axis(x, ids, axis=-1, mode="fill", fill_value=beyond)


def _draw(sums: Float[Array, "B blocks"], inside, uniform: Float[Array, "B 2"]) -> Int[Array, "B"]:
    """An index with probability proportional to its weight, by inverse CDF at two levels.

    Two uniform numbers decide, whatever the vocabulary: Gumbel noise would take one per token.

    Args:
      sums: the weight of each block.
      inside: from block numbers `[B]` to the weights within them, `[B, size]`.
    """
    if sums.shape[-1] == 1:
        return _invert(inside(jnp.zeros(len(sums), jnp.int32)), uniform[:, 0])
    block = _invert(sums, uniform[:, 0])
    weights = inside(block)
    return block * weights.shape[-1] + _invert(weights, uniform[:, 1])


def _invert(weights: Float[Array, "B W"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index at which the cumulative weight exceeds `uniform` of the total.

    Rounding can leave no such index, or one without weight: then the heaviest is as good.
    """
    total = jnp.cumsum(weights, axis=-1)
    reached: Bool[Array, "B W"] = total > uniform[:, None] * total[:, -1:]
    reached &= weights > 0
    first = jnp.argmax(reached, axis=-1)
    return jnp.where(reached.any(-1), first, jnp.argmax(weights, axis=-1)).astype(jnp.int32)
