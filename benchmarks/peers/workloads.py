"""What every library is measured on: shapes, inputs and the way to measure. Needs only numpy.

W1  rollout: 32 prompts of 32 tokens, exactly 128 new tokens each, temperature 1
W2  long tail: 64 requests of 32 tokens, lognormal lengths (median 48, at most 384), 16 at a time
W3  train step: 16 rows of 256 tokens (prompt 32), clipped ratio + 0.04 · KL, AdamW
W4  scoring: log-probs of the same rows, no gradient
W5  W3 with 4 rows of --length tokens and a vocabulary of 151,936: time and peak memory
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """A Qwen3-shaped decoder with tied embeddings."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    head_dim: int = 64


SHAPES = {
    "small": Shape(256, 4, 4, 2, 1024, 32_000),
    "small152k": Shape(256, 4, 4, 2, 1024, 151_936),
    "smollm2": Shape(576, 12, 9, 3, 1536, 49_152),
}
PROMPT = 32
ROLLOUT = {"W1": (32, 128), "W2": (64, 384)}  # requests, most new tokens
AT_ONCE = 16  # requests of W2 that are decoded together
KL_WEIGHT = 0.04
ADAM = {"learning_rate": 1e-6, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0}


def prompts(shape: Shape, count: int) -> np.ndarray:
    """Token ids `[count, PROMPT]`; the first few ids are left to padding and ends."""
    rng = np.random.default_rng(0)
    return rng.integers(8, shape.vocab, (count, PROMPT)).astype(np.int32)


def long_tail(count: int, most: int) -> np.ndarray:
    """New tokens of each request, in order of arrival; one is the longest possible."""
    lengths = np.random.default_rng(7).lognormal(np.log(48), 1.0, count)
    lengths = np.clip(np.round(lengths), 4, most).astype(np.int32)
    lengths[np.argmax(lengths)] = most
    return lengths


def train_rows(shape: Shape, workload: str, length: int) -> dict[str, np.ndarray]:
    """tokens `[R, L]`; old and teacher log-probs `[R, L - PROMPT]`; advantages `[R]`."""
    rng = np.random.default_rng(0)
    rows, length = (4, length) if workload == "W5" else (16, 256)
    scored = (rows, length - PROMPT)
    usual = -np.log(shape.vocab)
    return {
        "tokens": rng.integers(8, shape.vocab, (rows, length)).astype(np.int32),
        "old": (usual + 0.1 * rng.standard_normal(scored)).astype(np.float32),
        "teacher": (usual + 0.3 * rng.standard_normal(scored)).astype(np.float32),
        "advantages": rng.standard_normal(rows).astype(np.float32),
    }


def arguments() -> argparse.Namespace:
    """The options that every library's script has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=["W1", "W2", "W3", "W4", "W5"], required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--variant", default="", help="of the library, see its script")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row in W5")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def measure(run: Callable[[], Any], tokens: int, repeats: int) -> None:
    """Print the median of `repeats` calls after one that compiles, as one line of JSON."""
    begun = time.perf_counter()
    run()
    first = time.perf_counter() - begun
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times)
    result = {"seconds": seconds, "tokens_per_s": tokens / seconds, "first_s": first}
    print("RESULT " + json.dumps(result | {"peak_mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    """The most memory that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
