"""Every sequence of one or two tokens over a vocabulary of five, and oracles in float64 NumPy.

A policy is a table of logits: row 0 for the first token, row 1 + a for the second token after a.
Weighted by the probability with which each sequence would be sampled, one call of a loss gives the
exact expectation. The oracles are closed forms, themselves checked by `finite_difference`;
autodiff is only on the side that is tested.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax.objectives import kdrl_loss

VOCAB = 5
LENGTHS = [1, 2]


def table(seed: int, length: int, scale: float = 1.0) -> np.ndarray:
    rows = 1 if length == 1 else 1 + VOCAB
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)) * scale


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def sequences(length: int) -> tuple[np.ndarray, np.ndarray]:
    """All sequences `[N, length]` and the table row that each token is drawn from."""
    if length == 1:
        tokens = np.arange(VOCAB)[:, None]
        return tokens, np.zeros_like(tokens)
    a, b = (x.ravel() for x in np.meshgrid(np.arange(VOCAB), np.arange(VOCAB), indexing="ij"))
    return np.stack([a, b], 1), np.stack([np.zeros_like(a), 1 + a], 1)


def prefix_probs(logits: np.ndarray) -> np.ndarray:
    """Probability of reaching each row of the table."""
    p = np.exp(log_softmax(logits))
    return np.ones(1) if len(p) == 1 else np.concatenate([[1.0], p[0]])


def reverse_kl_gradient(student: np.ndarray, teacher: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Σ_s reach(s)·∇KL(π_θ(·|s)‖π_T(·|s)): of a softmax, π_k·(ℓ_k − KL)."""
    log_p, log_t = log_softmax(student), log_softmax(teacher)
    p, ell = np.exp(log_p), log_p - log_t
    return reach[:, None] * p * (ell - (p * ell).sum(-1, keepdims=True))


def forward_kl_gradient(student: np.ndarray, teacher: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Σ_s reach(s)·∇KL(π_T(·|s)‖π_θ(·|s)): of a softmax, π_k − π_T,k."""
    return reach[:, None] * (np.exp(log_softmax(student)) - np.exp(log_softmax(teacher)))


def reverse_kl(student: np.ndarray, teacher: np.ndarray, reach: np.ndarray) -> float:
    log_p, log_t = log_softmax(student), log_softmax(teacher)
    return float((reach * (np.exp(log_p) * (log_p - log_t)).sum(-1)).sum())


def forward_kl(student: np.ndarray, teacher: np.ndarray, reach: np.ndarray) -> float:
    return reverse_kl(teacher, student, reach)


def score(student: np.ndarray, length: int, per_token: np.ndarray) -> np.ndarray:
    """Σ_sequences Σ_t per_token·∇log π_θ(token), ∇log π of a softmax being onehot − π."""
    tokens, rows = sequences(length)
    p, out = np.exp(log_softmax(student)), np.zeros_like(student)
    for c, token, row in zip(per_token.ravel(), tokens.ravel(), rows.ravel(), strict=True):
        out[row] += c * (np.eye(VOCAB)[token] - p[row])
    return out


def finite_difference(f, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i], down[i] = up[i] + step, down[i] - step
        out[i] = (f(up) - f(down)) / (2 * step)
    return out


def token_values(logits: np.ndarray, length: int) -> np.ndarray:
    """log π of every token of every sequence `[N, length]`."""
    tokens, rows = sequences(length)
    return log_softmax(logits)[rows, tokens]


def sequence_probs(logits: np.ndarray, length: int) -> np.ndarray:
    """Probability of each sequence, repeated for its tokens `[N, length]`."""
    total = np.exp(token_values(logits, length).sum(1, keepdims=True))
    return np.broadcast_to(total, (len(total), length))


def loss_gradient(
    student,
    length,
    *,
    teacher,
    weights,
    old=None,
    advantages=None,
    kd_weights=None,
    reference=None,
    sampler=None,
    divergence=None,
    loss=kdrl_loss,
    **options,
) -> np.ndarray:
    """∇ of a loss over all sequences in the student's table, by autodiff.

    `divergence` takes logits `[N, length, V]` of the student to a divergence `[N, length]`.
    """
    tokens, rows = sequences(length)

    def values(logits):
        return None if logits is None else jnp.asarray(token_values(logits, length))

    batch = types.SimpleNamespace(
        old_log_probs=values(old),
        teacher_log_probs=values(teacher),
        reference_log_probs=values(reference),
        sampler_log_probs=values(sampler),
        advantages=jnp.asarray(np.zeros(tokens.shape) if advantages is None else advantages),
        weights=jnp.asarray(weights),
        kd_weights=jnp.asarray(weights if kd_weights is None else kd_weights),
    )

    def total(logits):
        given = {} if divergence is None else {"kd_divergence": divergence(logits[rows])}
        log_probs = jax.nn.log_softmax(logits)[rows, tokens]
        return loss(log_probs, batch, **given, **options)[0]

    return np.asarray(jax.grad(total)(jnp.asarray(student, jnp.float32)))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
