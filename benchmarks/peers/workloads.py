"""What every library is measured on: shapes, inputs, floors and the way to measure.

W1  rollout: 32 prompts of 32 tokens, exactly 128 new tokens each, temperature 1
W2  long tail: 64 requests of 32 tokens, lognormal lengths (median 48, at most 384), 16 at a time
W3  train step: 16 rows of 256 tokens (prompt 32), clipped ratio + 0.04 · KL, AdamW
W4  scoring: log-probs of the same rows, no gradient
W5  W3 with 4 rows of 1,024 tokens, for a vocabulary of 151,936: time and peak memory

--rows and --length change requests and most new tokens of a rollout, rows and their tokens else.
Needs only numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
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

    @property
    def matrices(self) -> int:
        """Weights of the layers' matrices: what one token meets before the output head."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp)


SHAPES = {
    "tiny": Shape(64, 2, 2, 1, 128, 512, 32),  # to see that a script runs
    "small": Shape(256, 4, 4, 2, 1024, 32_000),
    "small152k": Shape(256, 4, 4, 2, 1024, 151_936),
    "smollm2": Shape(576, 12, 9, 3, 1536, 49_152),
    "smollm2-135m": Shape(576, 30, 9, 3, 1536, 49_152),
    "qwen1.5b": Shape(1536, 28, 12, 2, 8960, 151_936, 128),
}
PROMPT = 32
SIZES = {"W1": (32, 128), "W2": (64, 384), "W3": (16, 256), "W4": (16, 256), "W5": (4, 1024)}
AT_ONCE = 16  # requests of W2 that are decoded together
KL_WEIGHT = 0.04
ADAM = {"learning_rate": 1e-6, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0}


def prompts(vocab: int, count: int) -> np.ndarray:
    """Token ids `[count, PROMPT]`; the first few ids are left to padding and ends."""
    return np.random.default_rng(0).integers(8, vocab, (count, PROMPT)).astype(np.int32)


def wanted_lengths(workload: str, count: int, most: int) -> np.ndarray:
    """New tokens of each request, in order of arrival; in W2 one is the longest possible."""
    if workload != "W2":
        return np.full(count, most, np.int32)
    lengths = np.random.default_rng(7).lognormal(np.log(48), 1.0, count)
    lengths = np.clip(np.round(lengths), 4, most).astype(np.int32)
    lengths[np.argmax(lengths)] = most
    return lengths


def train_rows(shape: Shape, rows: int, length: int) -> dict[str, np.ndarray]:
    """tokens `[R, L]`; old and teacher log-probs `[R, L - PROMPT]`; advantages `[R]`."""
    rng = np.random.default_rng(0)
    scored = (rows, length - PROMPT)
    usual = -np.log(shape.vocab)
    return {
        "tokens": rng.integers(8, shape.vocab, (rows, length)).astype(np.int32),
        "old": (usual + 0.1 * rng.standard_normal(scored)).astype(np.float32),
        "teacher": (usual + 0.3 * rng.standard_normal(scored)).astype(np.float32),
        "advantages": rng.standard_normal(rows).astype(np.float32),
    }


def forward_flops(shape: Shape, rows: int, length: int) -> tuple[float, float]:
    """FLOPs of a forward pass that scores all but the prompt: (all, attention's own).

    2 per weight and token, the head for scored tokens alone; attention counts causally: each
    token's query meets the keys up to its own, 2 · 2 · heads · head_dim FLOPs for each.
    Softmax, norms and sampling are not counted, nor what is computed twice to save memory.
    """
    pairs = rows * length * (length + 1) / 2
    attention = shape.layers * 4 * shape.heads * shape.head_dim * pairs
    head = 2 * shape.width * shape.vocab * rows * (length - PROMPT)
    return 2 * shape.matrices * rows * length + head + attention, attention


def decode_cost(shape: Shape, batch: int, columns: int, width: int) -> tuple[float, float]:
    """(FLOPs, bytes) that one decode step cannot do without.

    Every weight, the head's too, is read once for the whole batch and met by each row; each row
    reads its `columns` keys and values and writes one. `width` is the bytes of a number.
    """
    weights = shape.matrices + shape.width * shape.vocab
    flops = batch * (2 * weights + shape.layers * 4 * shape.heads * shape.head_dim * columns)
    cache = shape.layers * 2 * shape.kv_heads * shape.head_dim * batch * (columns + 1)
    return flops, width * (weights + cache)


def arguments() -> argparse.Namespace:
    """The options that every library's script has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=list(SIZES), required=True)
    parser.add_argument("--variant", default="", help="of the library, see its script")
    add_sizes(parser)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    usual = SIZES[args.workload]
    args.rows, args.length = args.rows or usual[0], args.length or usual[1]
    return args


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options that say how large the work is."""
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=0, help="0: the workload's own")
    parser.add_argument("--length", type=int, default=0, help="0: the workload's own")


def add_rollouts_and_rows(parser: argparse.ArgumentParser) -> None:
    """`add_sizes` for scripts that do W1 and W3 or W4 both, with the usual sizes of these."""
    add_sizes(parser)
    requests, new = SIZES["W1"]
    rows, length = SIZES["W4"]
    parser.set_defaults(rows=rows, length=length)
    parser.add_argument("--requests", type=int, default=requests)
    parser.add_argument("--new", type=int, default=new, help="tokens of each request")


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` calls."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(run: Callable[[], Any], tokens: int, repeats: int) -> None:
    """Print the median of `repeats` calls after one that compiles, as one line of JSON."""
    first = seconds_of(run, 1)
    seconds = seconds_of(run, repeats)
    report(seconds=seconds, tokens_per_s=tokens / seconds, first_s=first, peak_mib=peak_mib())


def report(**found: Any) -> None:
    """The line that `in_process` reads in another process."""
    print("RESULT " + json.dumps(found), flush=True)


def in_process(command: list[str], own: bool) -> dict[str, Any]:
    """What a command reports; the program ends where it reports nothing.

    Args:
      own: whether it finds kdrl_jax here; the other libraries find nothing of this repository.
    """
    root = str(Path(__file__).parents[2]) if own else ""
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    if (found := result_of(done.stdout)) is None:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return found


def result_of(stdout: str) -> dict[str, Any] | None:
    """What `report` printed last."""
    lines = [line for line in stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else None


def peak_mib() -> float:
    """The most memory in use so far: the accelerator's if there is one, else the process's."""
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if "jax" in sys.modules:
        found = sys.modules["jax"].devices()[0].memory_stats()
        if found and "peak_bytes_in_use" in found:
            return found["peak_bytes_in_use"] / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
