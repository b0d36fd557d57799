"""What a teacher could win by scoring under a rollout instead of after it, on the same devices.

    python benchmarks/overlap.py [--shape=small] [--dtype=float32] [--requests=32] [--new=128] \
        [--rows=16] [--length=256] [--repeats=7]

W1 by the rollout engine and W4's scoring, in turns within one process: one after the other, and
with the scoring handed to the devices as soon as the first tokens are being drawn. A ratio of 1
says that the devices are busy either way: a device runs one program at a time.
"""

import argparse
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parent / "peers"))
import run_kdrl as own
import workloads as w

from kdrl_jax.rollout import RolloutEngine, request_keys, sampling_params
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.types import Prompts


def main() -> None:
    """The three times and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    w.add_rollouts_and_rows(parser)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    shape = w.SHAPES[args.shape]
    model = own.make_model(shape, args.dtype)
    student, teacher = (model.cast(jax.jit(model.init)(jax.random.key(s))) for s in (0, 1))

    engine = RolloutEngine(
        model, valid_vocab=shape.vocab, prompt_buckets=(w.PROMPT,), max_new_tokens=args.new
    )
    lengths = np.full(args.requests, w.PROMPT, np.int32)
    prompts = Prompts(w.prompts(shape.vocab, args.requests), lengths)
    keys = request_keys(0, 0, range(args.requests), 1)
    sampling = sampling_params((args.requests, 1), (-1,), max_new_tokens=args.new, temperature=1.0)
    scorer = Scorer(model, own.one_device(), rows=args.rows, valid_vocab=shape.vocab, chunk=512)
    rows = own.packed(jnp.asarray(w.train_rows(shape, args.rows, args.length)["tokens"]))

    def draw(meanwhile=lambda: None):
        return engine.generate(student, prompts, keys, sampling, meanwhile=meanwhile)

    def score():
        return scorer.log_probs(teacher, rows, args.length - w.PROMPT, jnp.float32(1.0))

    def together() -> None:
        started = []
        draw(lambda: started.append(score()))
        jax.block_until_ready(started)

    runs = {"rollout": draw, "scoring": lambda: jax.block_until_ready(score()), "both": together}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeats + 1):  # the first compiles
        for name, run in runs.items():
            seconds = w.seconds_of(run, 1)
            if turn:
                times[name].append(seconds)
    for name, found in times.items():
        print(f"{name}: {statistics.median(found):.3f} s")
    ratio = statistics.median(
        (a + b) / c for a, b, c in zip(*(times[name] for name in runs), strict=True)
    )
    print(f"one after the other / together: {ratio:.2f}")


if __name__ == "__main__":
    main()
