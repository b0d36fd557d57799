"""W6: how time and memory of kdrl_jax grow with a row's length and with the group's size.

    python benchmarks/growth.py [--shape=small152k] [--dtype=float32] \
        [--rows=1] [--lengths=512,1024,2048,4096,8192] [--groups=4,8,16,32] [--output=FILE.json]

A train step of rows of T tokens, and rollouts of 128 tokens by G samples of each of 4 prompts,
every size in a process of its own. Bars: time per token is flat in T but for the optimizer, the
same whatever T, and attention's own FLOPs (time = c + a · T + b · these FLOPs, within 10 %);
memory grows no faster than T (exponent 1); what the vocabulary adds to the step's activations is
under a tenth of them.

What the vocabulary adds is, by XLA's plan of the step's temporary memory ("temp"),

    temp(V) - temp(256) - (V - 256) · width · 4 bytes        256: a vocabulary of no weight

The last term is one gradient of the embedding, which the optimizer takes whole; what is left are
logits and what is made of them. The share is of temp(V) less that gradient. It can be 0: logits
live where the layers' activations do at another time.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent / "peers"))
import workloads as w

SMALL_VOCAB, CHUNK = 256, 128
PROBLEMS, NEW = 4, 128
MIB = 2**20


def main() -> None:
    """Both tables; with --size one line of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    w.add_sizes(parser)
    parser.set_defaults(shape="small152k", rows=1)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--groups", default="4,8,16,32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--size", type=int, help="measure one size: in the process of its own")
    parser.add_argument("--of", choices=["length", "group"])
    args = parser.parse_args()
    if args.size:
        return (one_length if args.of == "length" else one_group)(args)
    lengths = [in_process(args, "length", int(t)) for t in args.lengths.split(",")]
    print_lengths(w.SHAPES[args.shape], args.rows, lengths)
    groups = [in_process(args, "group", int(g)) for g in args.groups.split(",")]
    print_groups(groups)
    if args.output:
        found = {"shape": args.shape, "lengths": lengths, "groups": groups}
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return None


def in_process(args, of: str, size: int) -> dict[str, float]:
    """What this script reports of one size."""
    options = [f"--{key}={getattr(args, key)}" for key in ("shape", "dtype", "rows", "repeats")]
    command = [sys.executable, __file__, f"--of={of}", f"--size={size}", *options]
    return w.in_process(command, own=True)


def one_length(args) -> None:
    """A train step; then the plans of its memory."""
    import jax
    import run_kdrl as own

    shape = w.SHAPES[args.shape]
    model = own.make_model(shape, args.dtype)
    data = w.train_rows(shape, args.rows, args.size)
    run = own.train(model, jax.jit(model.init)(jax.random.key(0)), data, CHUNK)
    first = w.seconds_of(run, 1)
    seconds, peak = w.seconds_of(run, args.repeats), w.peak_mib()

    def temp_bytes(vocab: int) -> int:
        model = own.make_model(shape._replace(vocab=vocab), args.dtype)
        program = own.lower_train(model, own.one_device(), args.rows, args.size, CHUNK).compile()
        return program.memory_analysis().temp_size_in_bytes

    temp = temp_bytes(shape.vocab)
    gradient = (shape.vocab - SMALL_VOCAB) * shape.width * 4
    added = max(0, temp - temp_bytes(SMALL_VOCAB) - gradient)
    w.report(
        length=args.size,
        seconds=seconds,
        first_s=first,
        peak_mib=peak,
        temp_mib=temp / MIB,
        added_mib=added / MIB,
        share=added / (temp - gradient),
    )


def one_group(args) -> None:
    """Rollouts of groups of one size."""
    import jax
    import run_kdrl as own

    model = own.make_model(w.SHAPES[args.shape], args.dtype)
    params = model.cast(jax.jit(model.init)(jax.random.key(0)))
    lengths = np.full(PROBLEMS * args.size, NEW, np.int32)
    run = own.rollout(model, params, lengths, group=args.size)
    first = w.seconds_of(run, 1)
    seconds = w.seconds_of(run, args.repeats)
    w.report(group=args.size, seconds=seconds, first_s=first, peak_mib=w.peak_mib())


def print_lengths(shape: w.Shape, rows: int, found: list[dict[str, float]]) -> None:
    """The first table, and what the bars are about."""
    print(
        "| T | step, s | µs a token | attention, % of FLOPs | peak MiB | temp | vocabulary's | % |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    lengths = np.array([x["length"] for x in found], float)
    seconds = np.array([x["seconds"] for x in found])
    flops = np.array([w.forward_flops(shape, rows, int(t)) for t in lengths])
    each = 1e6 * seconds / rows / lengths
    for x, per_token, (total, attention) in zip(found, each, flops, strict=True):
        print(
            f"| {x['length']} | {x['seconds']:.3f} | {per_token:.0f} | "
            f"{100 * attention / total:.0f} | {x['peak_mib']:.0f} | {x['temp_mib']:.0f} | "
            f"{x['added_mib']:.0f} | {100 * x['share']:.1f} |"
        )
    if len(found) < 4:
        return
    # Relative errors, so that the longest rows do not outweigh the others.
    terms = np.stack([lengths**0, rows * lengths, flops[:, 1]], 1) / seconds[:, None]
    factors = np.linalg.lstsq(terms, np.ones(len(found)), rcond=None)[0]
    worst = 100 * np.abs(terms @ factors - 1).max()
    of_time, of_temp = (
        exponent(lengths, [x[key] for x in found]) for key in ("seconds", "temp_mib")
    )
    print(
        f"\nTime: {factors[0]:.3f} s, {1e6 * factors[1]:.1f} µs a token and "
        f"{1e9 * factors[2]:.3f} s for 10⁹ FLOPs of attention fit to {worst:.0f} % (bar: 10). "
        f"Exponents in T: time {of_time:.2f}, temp {of_temp:.2f} (bar: 1). Vocabulary's share: "
        f"{100 * found[-1]['share']:.1f} % at the longest (bar: 10).\n"
    )


def print_groups(found: list[dict[str, float]]) -> None:
    """The second table."""
    print("| G | requests | rollout, s | µs a token | peak MiB | MiB more a request |")
    print("| --- | --- | --- | --- | --- | --- |")
    start = found[0]
    for x in found:
        count = PROBLEMS * x["group"]
        more = count - PROBLEMS * start["group"]
        each = (x["peak_mib"] - start["peak_mib"]) / more if more else float("nan")
        per_token = 1e6 * x["seconds"] / count / NEW
        print(
            f"| {x['group']} | {count} | {x['seconds']:.3f} | {per_token:.0f} | "
            f"{x['peak_mib']:.0f} | {each:.2f} |"
        )
    sizes = [x["group"] for x in found]
    time, memory = (exponent(sizes, [x[key] for x in found]) for key in ("seconds", "peak_mib"))
    print(f"\nExponents in G: time {time:.2f}, memory {memory:.2f} (bar: 1).")


def exponent(sizes, values) -> float:
    """p of values ∝ sizes^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if len(sizes) > 1 else np.nan


if __name__ == "__main__":
    main()
