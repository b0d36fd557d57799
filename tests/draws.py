"""What a request must have drawn: at each token the inverse CDF of its own uniform numbers.

Sums round differently for other shapes, on another mesh and on another processor. Two ways to draw
a request have the same tokens up to the first one whose uniform number lies within rounding of the
boundary between two tokens, and among some hundred tokens of a large vocabulary there is such a
one. So no way is compared with another here: the tokens of each must lie, within rounding, where
the full forward pass has them. Ways that pass have the same tokens but for rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from local_server import log_softmax

from kdrl_jax.rollout import RolloutEngine
from kdrl_jax.rollout.sampling import block_size, uniforms
from kdrl_jax.types import Rollouts, SamplingParams

ROUNDING = 1e-4
"""Of float32: in cumulative probabilities, log-probs and the largest logits."""


class Request(NamedTuple):
    """A prompt, what was drawn for it and by which key, as NumPy has its bits."""

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    key: np.ndarray


class Call(NamedTuple):
    """Requests that were drawn at once."""

    params: Any
    requests: list[Request]
    temperature: float
    stops: set[int]
    limits: list[int]


def requests_of(out: Rollouts, keys) -> list[Request]:
    """All requests of a call, in order."""
    out, bits, found = jax.device_get(out), np.asarray(jax.random.key_data(keys)), []
    for at in np.ndindex(out.lengths.shape):
        prompt = out.prompt_tokens[at[0], out.prompt_tokens.shape[1] - out.prompt_lengths[at[0]] :]
        n = out.lengths[at]
        assert not out.tokens[at][n:].any()
        tokens, log_probs = out.tokens[at][:n].tolist(), out.log_probs[at][:n].tolist()
        found.append(Request(prompt.tolist(), tokens, log_probs, bits[at]))
    return found


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """What `RolloutEngine` draws meanwhile."""
    calls, generate = [], RolloutEngine.generate

    def spy(self, params, prompts, keys, sampling: SamplingParams, **options):
        out = generate(self, params, prompts, keys, sampling, **options)
        sampling = jax.device_get(sampling)
        assert (sampling.top_p, sampling.top_k, sampling.min_p) == (1, 0, 0)
        limits = np.minimum(sampling.max_new_tokens, self.max_new_tokens).reshape(-1).tolist()
        stops = set(sampling.stop_ids.tolist())
        requests = requests_of(out, keys)
        # The step may take the buffers of these weights for its own.
        calls.append(
            Call(jax.device_get(params), requests, float(sampling.temperature), stops, limits)
        )
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutEngine, "generate", spy)
        yield calls


def forward(model, params, requests: Sequence[Request]) -> list[np.ndarray]:
    """The logits that each token was drawn from, `[n, V]`, by the full forward pass."""
    width = -(-max(len(r.prompt) + len(r.tokens) for r in requests) // 32) * 32
    tokens, segments = (np.zeros((len(requests), width), np.int32) for _ in range(2))
    for row, r in enumerate(requests):
        length = len(r.prompt) + len(r.tokens)
        tokens[row, :length] = [*r.prompt, *r.tokens]
        segments[row, :length] = 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    logits = np.asarray(_logits(model, params, tokens, positions, segments), np.float64)
    places = [(len(r.prompt) - 1, len(r.prompt) + len(r.tokens) - 1) for r in requests]
    return [logits[row, start:end] for row, (start, end) in enumerate(places)]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, *rows):
    return model.logits(params, model.apply(params, *rows))


def distances(
    tokens: Sequence[int], logits: np.ndarray, uniform: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """How far, in cumulative probability, each uniform number is from those that draw its token.

    At temperature 0: how far the token's logit is below the largest.

    Args:
      logits: `[n, V]`; -inf of ids that are never drawn.
      uniform: `[n, 2]`, see `uniforms`.
    """
    rows, tokens = np.arange(len(tokens)), np.asarray(tokens, int)
    if temperature == 0:
        return logits.max(1) - logits[rows, tokens]
    probs = np.exp(log_softmax(logits / temperature))
    size = block_size(logits.shape[1])
    padded = np.pad(probs, [(0, 0), (0, -logits.shape[1] % size)])
    blocks = padded.reshape(len(rows), padded.shape[1] // size, size)
    block = tokens // size
    inside = blocks[rows, block] / blocks[rows, block].sum(1, keepdims=True)
    if blocks.shape[1] == 1:
        return _outside(inside, tokens, uniform[:, 0])
    within = _outside(inside, tokens % size, uniform[:, 1])
    return np.maximum(within, _outside(blocks.sum(2), block, uniform[:, 0]))


def _outside(probs: np.ndarray, chosen: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    rows = np.arange(len(chosen))
    high = np.cumsum(probs, axis=1)[rows, chosen]
    low = high - probs[rows, chosen]
    return np.maximum(0.0, np.maximum(low - uniform, uniform - high))


def furthest(
    model, params, requests: Sequence[Request], valid: int, temperature: float = 1.0
) -> list[float]:
    """The largest of the `distances` of each request, or the largest error of its log-probs."""
    found = []
    for r, logits in zip(requests, forward(model, params, requests), strict=True):
        key = jax.random.wrap_key_data(jnp.asarray(r.key))[None]
        uniform = np.asarray(uniforms(key, jnp.zeros(1, int), len(r.tokens)))[:, 0]
        logits[:, valid:] = -np.inf
        off = distances(r.tokens, logits, uniform, temperature)
        scores = log_softmax(logits / (temperature or 1.0))[
            np.arange(len(off)), np.asarray(r.tokens, int)
        ]
        off = np.maximum(off, np.abs(scores - r.log_probs))
        found.append(float(off.max(initial=0)))
    return found


def assert_drawn(model, call: Call, valid: int) -> None:
    """Each token is where its key has it, and each request ends at an end token or its limit.

    Log-probs are those of the whole distribution, too.
    """
    found = furthest(model, call.params, call.requests, valid, call.temperature)
    assert max(found) <= ROUNDING, f"request {np.argmax(found)} is off by {max(found)}"
    for i, (r, limit) in enumerate(zip(call.requests, call.limits, strict=True)):
        assert not set(r.tokens[:-1]) & call.stops, f"request {i} goes on after its end"
        assert len(r.tokens) <= limit, f"request {i} goes on after its limit"
        assert len(r.tokens) == limit or r.tokens[-1] in call.stops, f"request {i} ends too soon"


def assert_same_requests(one: Sequence[Request], other: Sequence[Request]) -> None:
    """The same prompts by the same keys: what is drawn is the same but for rounding."""
    assert [(r.prompt, r.key.tolist()) for r in one] == [(r.prompt, r.key.tolist()) for r in other]
