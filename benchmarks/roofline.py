"""What the machine can do, and what share of it W1's decode loop, W3 and W4 reach.

    python benchmarks/roofline.py [--shape=small] [--dtype=float32] [--requests=32] [--new=128] \
        [--rows=16] [--length=256] [--output=FILE.json]

Peaks are measured: the best matrix product of the dtype, and an array far larger than any cache
changed in place. A program's floor is the larger of its FLOPs over the one and its bytes over the
other, see `forward_flops` and `decode_cost` in peers/workloads.py; for W1 summed over the decode
steps, the prefill apart; 3 times the forward pass for W3. What is recomputed to save memory is thus
no work, and W3's share is the model FLOPs utilisation (MFU). Products of few rows are slower than
square ones: a row of its own has the products of W1's decode alone, one after the other. Bars, on a
GPU: decoding 64 requests or more at 60 % of the roofline, a train step of 4,096-token rows at 45 %
MFU.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parent / "peers"))
import run_kdrl as own
import workloads as w

from kdrl_jax.models.layers import einsum
from kdrl_jax.rollout import decode as device

ON_CPU = jax.default_backend() == "cpu"


def main() -> None:
    """The peaks and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    w.add_rollouts_and_rows(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    dtypes = ["float32"] if ON_CPU else ["float32", "bfloat16"]
    peaks = {dtype: matmul_peak(dtype) for dtype in {*dtypes, args.dtype}}
    bandwidth = memory_bandwidth()
    for dtype, peak in peaks.items():
        print(f"{jax.devices()[0].device_kind}: {peak / 1e9:.0f} GFLOP/s of {dtype} products")
    print(f"memory: {bandwidth / 1e9:.1f} GB/s, read and written\n")
    found = [*rollout(args, peaks[args.dtype], bandwidth), *rows(args, peaks[args.dtype])]
    print("| work | s | floor, s | share of the roofline, % |")
    print("| --- | --- | --- | --- |")
    for name, seconds, floor in found:
        print(f"| {name} | {seconds:.4f} | {floor:.4f} | {100 * floor / seconds:.1f} |")
    if args.output:
        settings = {key: getattr(args, key) for key in ("shape", "dtype", "requests", "rows")}
        result = {**settings, "flops": peaks, "bandwidth": bandwidth, "found": found}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the best of some square products, at the precision that the models ask for."""
    best = 0.0
    for size in (1024, 2048) if ON_CPU else (4096, 8192, 16384):
        x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
        product = jax.jit(functools.partial(einsum, "MK,KN->MN"))
        best = max(best, 2 * size**3 / fastest(lambda f=product, x=x: f(x, x)))
    return best


def memory_bandwidth() -> float:
    """Bytes a second, read and written, of 256 MiB on a CPU and 2 GiB else."""
    holder = [jnp.zeros(2**26 if ON_CPU else 2**29, jnp.float32)]
    # In place: fresh memory costs a CPU several times as much as what is written to it.
    more = jax.jit(lambda x: x + 1, donate_argnums=0)

    def again() -> jax.Array:
        holder[0] = more(holder[0])
        return holder[0]

    return 2 * holder[0].nbytes / fastest(again)


def fastest(call) -> float:
    """Seconds of the best of ten calls."""
    calls = [w.seconds_of(lambda: jax.block_until_ready(call()), 1) for _ in range(11)]
    return min(calls[1:])


def rollout(args, peak: float, bandwidth: float) -> list[tuple[str, float, float]]:
    """W1's prefill, which is timed alone, and the rest of W1."""
    shape = w.SHAPES[args.shape]
    model = own.make_model(shape, args.dtype)
    params = model.cast(jax.jit(model.init)(jax.random.key(0)))
    prompts = jnp.asarray(w.prompts(shape.vocab, args.requests))
    lengths = jnp.full(args.requests, w.PROMPT, jnp.int32)
    program = jax.jit(functools.partial(device.prefill, model))
    prefill = fastest(lambda: program(params, prompts, lengths))
    # A prefill scores nothing: its only product with the head is the first decode step's.
    flops = 2 * shape.matrices * prompts.size
    width = jnp.dtype(args.dtype).itemsize
    floor = max(flops / peak, width * shape.matrices / bandwidth)

    run = own.rollout(model, params, np.full(args.requests, args.new, np.int32))
    run()
    seconds = w.seconds_of(run, args.repeats) - prefill
    steps = [
        w.decode_cost(shape, args.requests, w.PROMPT + step, width) for step in range(args.new)
    ]
    of_steps = sum(max(f / peak, b / bandwidth) for f, b in steps)
    name = f"{args.requests} x {args.new}"
    alone = products_alone(model, params, args.requests, args.new)
    return [
        ("W1 prefill", prefill, floor),
        (f"W1 decode, {name}", seconds, of_steps),
        ("its products alone", alone, of_steps),
    ]


def products_alone(model, params, requests: int, steps: int) -> float:
    """Seconds of the products of so many decode steps: the rest is all else that decoding does."""
    c = model.config
    values = c.num_heads * c.head_dim

    def step(weights, _, carry):
        x, top = carry
        x = x / jnp.abs(x).max()
        for layer in weights.layers:
            x = x + product(product(x, layer.qkv)[:, :values], layer.out)
            x = x + product(product(x, layer.gate_up)[:, : c.mlp_size], layer.down)
        logits = einsum("VD,BD->VB", weights.embedding, x, jnp.float32)
        return x, top + logits.max(0)

    def product(x, kernel):
        return einsum("BD,DF->BF", x, kernel)

    @jax.jit
    def run(weights):
        start = jnp.ones((requests, c.hidden_size), model.dtype), jnp.zeros(requests, jnp.float32)
        return jax.lax.fori_loop(0, steps, functools.partial(step, weights), start)

    weights = jax.jit(model.unstack)(params)
    return fastest(lambda: run(weights))


def rows(args, peak: float) -> list[tuple[str, float, float]]:
    """W4 and W3."""
    shape = w.SHAPES[args.shape]
    forward, _ = w.forward_flops(shape, args.rows, args.length)
    data = w.train_rows(shape, args.rows, args.length)
    model = own.make_model(shape, args.dtype)
    params = jax.jit(model.init)(jax.random.key(0))
    score = own.score(model, model.cast(params), data)
    score()
    scoring = w.seconds_of(score, args.repeats)
    del score
    train = own.train(model, params, data, chunk=512 if ON_CPU else 2048)
    del params
    train()
    training = w.seconds_of(train, args.repeats)
    name = f"{args.rows} x {args.length}"
    return [
        (f"W4 scoring, {name}", scoring, forward / peak),
        (f"W3 train step, {name}", training, 3 * forward / peak),
    ]


if __name__ == "__main__":
    main()
