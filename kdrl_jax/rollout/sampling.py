"""One token per request from its logits: truncation, sampling and the untruncated log-prob.

Every request draws by its own key, so a token depends on the request and its position, and on the
batch, the mesh and the schedule around it by rounding alone: sums of another shape round otherwise,
which tells where a uniform number is within rounding of the boundary between two tokens. Truncation
finds its threshold by bisection over the probabilities themselves, so nothing is sorted; a settings
value that switches a rule off also skips its work, at run time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from kdrl_jax.types import SamplingParams

# The inverse CDF first chooses a block of the vocabulary, of at most so many tokens, then a token.
BLOCK = 512


def uniforms(
    keys: Key[Array, " B"], drawn: Int[Array, " B"], steps: int
) -> Float[Array, "steps B 2"]:
    """What `sample` needs for the next `steps` draws of requests that have had `drawn`.

    Draw n of a request uses fold_in(key, n). Made for many draws at once: a CPU takes as long for
    one.
    """

    def one(key: PRNGKeyArray, nth: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, nth), (2,))

    return jax.vmap(lambda step: jax.vmap(one)(keys, drawn + step))(jnp.arange(steps))


def sample(
    logits: Float[Array, "B V"],
    uniform: Float[Array, "B 2"],
    sampling: SamplingParams,
    *,
    valid_vocab: int,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token per request, and its log-prob under softmax(logits/τ) before any truncation.

    top-k keeps the k likeliest tokens; top-p the fewest likeliest ones of those that hold top_p of
    their mass; min-p those at least min_p times as likely as the likeliest. Tokens that tie with
    the last one kept are kept too.

    Args:
      logits: float32; ids from `valid_vocab` on are never sampled and have no probability.
      uniform: numbers in [0, 1), fresh for each draw.
      sampling: temperature 0 takes the likeliest token, with its log-prob at temperature 1.

    Returns:
      (tokens int32, log_probs float32), both `[B]`.
    """
    # The product that made the logits is not to be computed again within the sums below. With the
    # vocabulary first, neighbours in memory are requests, and every sum below runs over all of
    # them at once.
    logits = jax.lax.optimization_barrier(logits.T)
    if valid_vocab < len(logits):
        ids = jax.lax.broadcasted_iota(jnp.int32, (len(logits), 1), 0)
        logits = jnp.where(ids < valid_vocab, logits, -jnp.inf)
    greedy = sampling.temperature <= 0
    inverse = 1.0 / jnp.where(greedy, 1.0, sampling.temperature)
    top = logits.max(0, keepdims=True) * inverse

    # No other [V, B] array is kept: what is looked at again, one block, is computed again.
    def scaled() -> Float[Array, "V B"]:
        return logits * inverse

    # The barrier keeps the total below from becoming a second sum over the vocabulary.
    sums = jax.lax.optimization_barrier(_blocks(jnp.exp(scaled() - top)).sum(1))

    def likeliest() -> Array:
        return jnp.argmax(logits, axis=0).astype(jnp.int32)

    def drawn() -> Array:
        return _draw(
            sums,
            lambda block: jnp.exp(_one_block(logits, block, -jnp.inf) * inverse - top),
            uniform.T,
        )

    def truncated() -> Array:
        weights = truncate(jnp.exp(scaled() - top).T, sampling).T
        of_blocks = _blocks(weights).sum(1)
        return _draw(of_blocks, lambda block: _one_block(weights, block, 0.0), uniform.T)

    cuts = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    case = jnp.where(greedy, 0, jnp.where(cuts, 2, 1))
    tokens = jax.lax.switch(case, [likeliest, drawn, truncated])
    chosen = jnp.take_along_axis(logits, tokens[None, :], axis=0)[0] * inverse
    return tokens, chosen - top[0] - jnp.log(sums.sum(0))


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


def _blocks(x: Float[Array, "V B"]) -> Float[Array, "blocks size B"]:
    vocab, size = len(x), block_size(len(x))
    if vocab % size:
        x = jnp.pad(x, [(0, -vocab % size), (0, 0)])
    return x.reshape(-1, size, x.shape[1])


def _one_block(
    x: Float[Array, "V B"], block: Int[Array, " B"], beyond: float
) -> Float[Array, "size B"]:
    """Block number `block` of each column, filled up with `beyond` where the vocabulary ends."""
    size = block_size(len(x))
    if size == len(x):
        return x
    ids = block[None, :] * size + jnp.arange(size)[:, None]
    return jnp.take_along_axis(x, ids, axis=0, mode="fill", fill_value=beyond)


def _draw(
    sums: Float[Array, "blocks B"], inside: Callable[[Array], Array], uniform: Float[Array, "2 B"]
) -> Int[Array, " B"]:
    """An index with probability proportional to its weight, by inverse CDF at two levels.

    Two uniform numbers decide, whatever the vocabulary: Gumbel noise would take one per token.

    Args:
      sums: the weight of each block.
      inside: from block numbers `[B]` to the weights within them, `[size, B]`.
    """
    if len(sums) == 1:
        return _invert(inside(jnp.zeros(sums.shape[1], jnp.int32)), uniform[0])
    block = _invert(sums, uniform[0])
    weights = inside(block)
    return block * len(weights) + _invert(weights, uniform[1])


def _invert(weights: Float[Array, "W B"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index at which the cumulative weight exceeds `uniform` of the total.

    Rounding can leave no such index, or one without weight: then the heaviest is as good.
    """
    total = jnp.cumsum(weights, axis=0)
    reached: Bool[Array, "W B"] = total > uniform[None, :] * total[-1:]
    reached &= weights > 0
    first = jnp.argmax(reached, axis=0)
    return jnp.where(reached.any(0), first, jnp.argmax(weights, axis=0)).astype(jnp.int32)
