"""What the teacher costs: KDRL's and RLAD's step beside a GRPO step, in turns within one process.

    python benchmarks/step_cost.py [--shape=small] [--dtype=float32] [--rows=16] [--length=256] \
        [--repeats=5] [--output=FILE.json]

GRPO's step is the update alone; KDRL's is the teacher's scoring and the update that uses it. The
teacher has the student's shape. Bar: KDRL at most 1.15 times the GRPO update plus a forward pass
of the teacher that gives the log-probs of the tokens. "topk" and "full" ask the teacher for more
than these, and are held against the same; "rlad" has the teacher in the ratio. Rollouts, the same
for all, are left out, so these are not the 15.5 % that RLAD (2602.22495, table 4) measures of a
whole step, in which rollouts take some 80 to 90 % of the time.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.append(str(Path(__file__).parent / "peers"))
import run_kdrl as own
import workloads as w

from kdrl_jax.training.scoring import Scorer
from kdrl_jax.training.state import init_state
from kdrl_jax.training.step import Objective, make_hyper, make_update

TOP_K = 50
BAR = 1.15


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    w.add_sizes(parser)
    parser.set_defaults(rows=16, length=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    steps = make_steps(args)
    for step in steps.values():  # compiles
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(w.seconds_of(step, 1))
    grpo, teacher = times["grpo"], times["teacher"]
    print("| step | s | of GRPO's and the teacher's forward |")
    print("| --- | --- | --- |")
    found = {}
    for name, own_times in times.items():
        ratios = [x / (g + t) for x, g, t in zip(own_times, grpo, teacher, strict=True)]
        found[name] = {"seconds": statistics.median(own_times), "ratio": statistics.median(ratios)}
        print(f"| {name} | {found[name]['seconds']:.3f} | {found[name]['ratio']:.2f} |")
    rest = [(x - t) / g for x, g, t in zip(times["kdrl k2"], grpo, teacher, strict=True)]
    print(
        f"\nKDRL / (GRPO + teacher's forward): {found['kdrl k2']['ratio']:.2f}; without the "
        f"teacher's forward on either side: {statistics.median(rest):.2f} (bar: {BAR})"
    )
    if args.output:
        args.output.write_text(json.dumps({"shape": args.shape, "found": found}, indent=1) + "\n")


def make_steps(args) -> dict[str, Callable[[], None]]:
    """The steps by name: they share one student, whose state each takes and leaves."""
    shape, mesh = w.SHAPES[args.shape], own.one_device()
    model, optimizer = own.make_model(shape, args.dtype), own.make_optimizer()
    init = jax.jit(model.init)
    holder = [init_state(init(jax.random.key(0)), optimizer, mesh)]
    teacher = model.cast(init(jax.random.key(1)))
    data = w.train_rows(shape, args.rows, args.length)
    rows, scored = own.packed(jnp.asarray(data["tokens"])), args.length - w.PROMPT
    head = {"valid_vocab": shape.vocab, "chunk": 512}
    scorer, heat = Scorer(model, mesh, rows=args.rows, **head), jnp.float32(1.0)
    hyper = make_hyper(mesh, beta=w.KL_WEIGHT, temperature=1.0)
    teacher_head = jax.jit(model.head)(teacher)
    batch, none = own.train_batch(data), jnp.zeros(data["old"].shape, jnp.float32)

    def step(
        estimator: str, ask: Callable[[], dict], of_head=None, ratio: str = "old"
    ) -> Callable[[], None]:
        objective = Objective(kd_estimator=estimator, support="floor", ratio=ratio)
        options = {"objective": objective, "micro_batches": 1, **head}
        update = make_update(model, optimizer, mesh, **options)

        def run() -> None:
            asked = dataclasses.replace(batch, **ask())
            holder[0], metrics = update(holder[0], asked, hyper, of_head)
            jax.block_until_ready((holder[0], metrics))

        return run

    def nobody() -> dict:
        return {"teacher_log_probs": None, "kd_weights": none}

    def tokens() -> dict:
        return {"teacher_log_probs": scorer.log_probs(teacher, rows, scored, heat)}

    def top() -> dict:
        names = ("teacher_log_probs", "support", "support_log_probs")
        found = scorer.top_support(teacher, rows, TOP_K, scored, heat)
        return dict(zip(names, found, strict=True))

    def states() -> dict:
        found = scorer.hidden(teacher, rows, scored, heat)
        return dict(zip(("teacher_log_probs", "teacher_hidden"), found, strict=True))

    return {
        "grpo": step("k2", nobody),
        "teacher": lambda: jax.block_until_ready(tokens()),
        "kdrl k2": step("k2", tokens),
        f"kdrl topk, k = {TOP_K}": step("topk", top),
        "kdrl full": step("full", states, teacher_head),
        "rlad": step("k2", tokens, ratio="trrd"),
    }


if __name__ == "__main__":
    main()
