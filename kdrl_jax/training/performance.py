"""How fast a step was beside what the devices could do: MFU, and decoding beside its roofline.

    MFU = FLOPs the models need / (time · devices · peak)          arXiv 2204.02311, appendix B

FLOPs are those of the matrix products of real tokens: padding, and what the backward pass
computes again, count as waste. Everything is computed on the host from numbers it has anyway.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kdrl_jax.models import ModelConfig
from kdrl_jax.rollout import DecodeStats
from kdrl_jax.training.collect import Collected
from kdrl_jax.training.display import Display
from kdrl_jax.training.footprint import Placed
from kdrl_jax.training.meshes import Meshes
from kdrl_jax.training.validation import Sizes
from kdrl_jax.types import Scores


class Peak(NamedTuple):
    """What one device can do at best."""

    flops: float
    """Per second: dense bf16 products, or those measured."""
    bandwidth: float
    """Bytes per second, to and from its memory."""
    measured: bool = False


# `device_kind` → dense bf16 FLOP/s (fp16 where there is no bf16) and bytes/s of the vendors' data
# sheets. float32 products are slower, so a float32 student's MFU is a share of the bf16 peak.
DATA_SHEETS: tuple[tuple[str, float, float], ...] = (
    (r"TPU v4", 275e12, 1228e9),
    (r"TPU v5( lite|e)", 197e12, 819e9),
    (r"TPU v5p?", 459e12, 2765e9),
    (r"TPU v6( lite|e)", 918e12, 1638e9),
    (r"TPU7x", 2307e12 / 2, 7380e9 / 2),  # a chip is two devices
    (r"NVIDIA B200.*", 2250e12, 8000e9),
    (r"NVIDIA H200 NVL", 835e12, 4800e9),
    (r"NVIDIA H200.*", 989e12, 4800e9),
    (r"NVIDIA H100 NVL", 835e12, 3938e9),
    (r"NVIDIA H100 PCIe", 756e12, 2000e9),
    (r"NVIDIA H100.*", 989e12, 3352e9),
    (r"NVIDIA A100 80GB PCIe", 312e12, 1935e9),
    (r"NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
    (r"NVIDIA A100.*", 312e12, 1555e9),
    (r"NVIDIA L40S", 362e12, 864e9),
    (r"NVIDIA L4", 121e12, 300e9),
    (r"NVIDIA A10", 125e12, 600e9),
    (r"NVIDIA GeForce RTX 4090", 165e12, 1008e9),
    (r"Tesla V100.*", 125e12, 900e9),
    (r"(Tesla|NVIDIA) T4", 65e12, 320e9),
)


def peak_of(kind: str) -> Peak | None:
    """What the data sheet of a `device_kind` says; None: not known."""
    for pattern, flops, bandwidth in DATA_SHEETS:
        if re.fullmatch(pattern, kind):
            return Peak(flops, bandwidth)
    return None


@functools.cache
def measured_peak(dtype: str) -> Peak:
    """A device's best of a few products of square matrices and of a few copies; a fraction of 1 s.

    Simulated CPU devices share one machine: each has its part of what all can do.
    """
    on_cpu = jax.devices()[0].platform == "cpu"
    n, size = (1024, 2**24) if on_cpu else (8192, 2**26)
    square = jax.device_put(np.full((n, n), 1 / n, jnp.dtype(dtype)))
    vector = jax.device_put(np.zeros(size, np.float32))
    share = len(jax.local_devices()) if on_cpu else 1
    flops = 2 * n**3 / _fastest(lambda x: x @ x, square)
    bandwidth = 2 * vector.nbytes / _fastest(lambda x: x + 1, vector)
    return Peak(flops / share, bandwidth / share, measured=True)


def _fastest(f: Callable[[Any], Any], x: Any) -> float:
    """Seconds of the fastest of a few calls, each on the result of the one before."""
    program = jax.jit(f, donate_argnums=0)  # in place: fresh memory would cost more than a copy
    x = program(x).block_until_ready()  # compiles
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        x = program(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def forward_flops(shape: ModelConfig, tokens: float, context: float, logits: float) -> float:
    """FLOPs of the products of a forward pass: two for each weight, and the attention's.

    Args:
      tokens: how many go through the layers.
      context: how many each of them looks at, itself included, summed over the tokens.
      logits: how many go through the output head.
    """
    products = shape.num_layers * shape.layer_matrices * tokens
    head = shape.vocab_size * shape.hidden_size * logits
    attention = shape.num_layers * shape.num_heads * shape.head_dim * context
    return 2 * products + 2 * head + 4 * attention


def update_flops(
    shape: ModelConfig, tokens: float, context: float, logits: float, *, adapters: bool
) -> float:
    """FLOPs of forward and backward pass: twice as many backwards as forwards.

    Args:
      tokens, context, logits: see `forward_flops`.
      adapters: only these are trained: the other weights have no gradient, which is a third of
        their products; the adapters' own are not counted.
    """
    forward = forward_flops(shape, tokens, context, logits)
    return 2 * forward + (forward_flops(shape, 0, context, 0) if adapters else forward)


def decode_seconds(model: Placed, done: DecodeStats, peak: Peak) -> float:
    """The least time for `done`: the roofline of arXiv 2211.05102's memory and compute time.

    A step reads the weights once, and each token its request's keys and values.
    """
    shape = model.shape
    weights = shape.num_layers * shape.layer_matrices + shape.vocab_size * shape.hidden_size
    column = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    ways = model.batch * model.tensor
    read = done.steps * weights / model.tensor + done.context * column / ways
    flops = forward_flops(shape, done.tokens, done.context, done.tokens) / ways
    return max(read * model.width / peak.bandwidth, flops / peak.flops)


class Ideal(NamedTuple):
    """The least seconds that the phases of a step could take, and what they did."""

    rollout: float
    """0: a server's devices drew them, of which nothing is known; nor of its slots."""
    score: float
    """0: nobody was asked."""
    update: float
    drawn: int
    """Tokens, with those of rollouts that were replaced."""
    slot_use: float
    kept: int
    """Completion tokens to learn from."""
    trained: int
    """Tokens of rows that went through the update, prompts included."""


class Meter:
    """Measures steps of a run against the peak of its devices, which it says.

    Args:
      shapes: of "student" and, where the method has one, "teacher".
    """

    def __init__(
        self,
        config: ConfigDict,
        sizes: Sizes,
        shapes: Mapping[str, ModelConfig],
        meshes: Meshes,
        display: Display,
    ):
        self._config, self._shapes = config, shapes
        self._adapters = sizes.lora is not None
        self._devices = meshes.student.size
        device = jax.devices()[0]
        self.peak = peak_of(device.device_kind) or measured_peak(config.student.dtype)
        by_teacher = sizes.method.sampler == "teacher"
        name = "teacher" if by_teacher else "student"
        source = "measured" if self.peak.measured else "data sheet"
        tera, giga = self.peak.flops / 1e12, self.peak.bandwidth / 1e9
        display.say(f"peak of a device ({source}): {tera:.3g} TFLOP/s, {giga:.3g} GB/s")
        dtype = config.teacher.dtype if by_teacher else sizes.rollout_dtype
        self._sampler = Placed.on(meshes.rollout, shapes[name], dtype, device.platform == "cpu")

    def ideal(self, found: Collected, scores: Scores) -> Ideal:
        """What the devices could have made of a step. Waits for nothing."""
        lengths = np.asarray(found.rollouts.lengths, np.float64)
        rows = lengths + np.asarray(found.rollouts.prompt_lengths)[:, None]
        tokens, context = rows.sum(), (rows * (rows + 1) / 2).sum()

        work = (tokens, context, lengths.sum())

        def forward(name: str) -> float:
            return forward_flops(self._shapes[name], *work)

        by_student = self._config.kd_topk.support == "student" and scores.support is not None
        asked = ["student"] * (scores.old_log_probs is not None or by_student)
        asked += ["student"] * (scores.reference_log_probs is not None)
        asked += ["teacher"] * (scores.teacher_log_probs is not None)
        speed = self._devices * self.peak.flops
        update = update_flops(self._shapes["student"], *work, adapters=self._adapters)
        done = found.decoding
        return Ideal(
            rollout=decode_seconds(self._sampler, done, self.peak) if done.steps else 0.0,
            score=sum(map(forward, asked)) / speed,
            update=self._config.epochs * update / speed,
            drawn=done.tokens,
            slot_use=done.tokens / max(done.slot_steps, 1) if done.steps else 0.0,
            kept=int(lengths.sum()),
            trained=self._config.epochs * int(tokens),
        )


def speeds(ideal: Ideal, times: Mapping[str, float]) -> dict[str, float]:
    """Shares of the peak, tokens per second, and what share of the time each phase took.

    Args:
      times: a step's metrics; those named `time/…_s`, in seconds, are read.
    """
    phases = {
        name.removeprefix("time/").removesuffix("_s"): seconds
        for name, seconds in times.items()
        if name.startswith("time/") and name.endswith("_s")
    }
    whole = sum(phases.values())
    found = {
        "perf/mfu_update": ideal.update / phases["update"],
        "tokens_per_s/rollout": ideal.drawn / phases["rollout"],
        "tokens_per_s/update": ideal.trained / phases["update"],
        "tokens_per_s/total": ideal.kept / whole,
    }
    if ideal.rollout:
        found["perf/decode_roofline"] = ideal.rollout / phases["rollout"]
        found["perf/slot_use"] = ideal.slot_use
    if ideal.score:
        found["perf/mfu_score"] = ideal.score / phases["score"]
    return found | {f"share/{name}": seconds / whole for name, seconds in phases.items()}
