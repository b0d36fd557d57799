"""What a train step and a decode step cost on TPUs that are not there, by XLA's own estimates.

    pip install "jax[tpu]"      # in each environment; libtpu compiles without a TPU
    python benchmarks/tpu_cost.py [--tunix=ENV/bin/python] [--topology=v5e:2x2] \
        [--shape=qwen1.5b] [--rows=8] [--length=1024] [--depths=1,2] [--output=FILE.json]

bfloat16 products, float32 weights, everything sharded over all chips by each library's own rules
(kdrl_jax: the axis fsdp; google-tunix: its default ShardingConfig on a mesh fsdp x tp = chips x 1).
Bar: the GRPO step's FLOPs, bytes and seconds are at most google-tunix's.

XLA counts a loop's body once. So FLOPs, bytes and seconds are of programs whose loops over layers
and chunks are unrolled (recomputation stays), of as few layers as --depths says; the figures of
the whole model lie on the line through these two. Memory is of the program as it is, loops and
all: of the whole model, or on that line too where layers are unrolled by the library itself. The
decode step is one turn of the loop over tokens, and what a chunk does once beside it. "seconds" is
the compiler's estimate of a chip's time; no clock has seen it.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from unittest import mock

# Told so, libtpu asks no metadata server what machine this is.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
sys.path.append(str(Path(__file__).parent / "peers"))
import workloads as w

PARTS = ("flops", "bytes accessed", "optimal_seconds")


def main() -> None:
    """The table, or with --library one library's figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    w.add_sizes(parser)
    parser.set_defaults(shape="qwen1.5b", dtype="bfloat16", rows=8, length=1024)
    parser.add_argument("--tunix", help="python of its environment")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--depths", default="1,2", help="layers of the two unrolled programs")
    parser.add_argument("--slots", type=int, default=64, help="rows of the decode step")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--library", choices=["kdrl", "tunix"], help="in a process of its own")
    args = parser.parse_args()
    if args.library:
        return {"kdrl": of_kdrl, "tunix": of_tunix}[args.library](args)
    found = in_process(sys.executable, "kdrl")
    if args.tunix:
        found |= in_process(args.tunix, "tunix")
    print("| program | TFLOP a chip | GB moved | seconds | arguments, GiB | temporary, GiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, x in found.items():
        print(
            f"| {name} | {x['flops'] / 1e12:.3f} | {x['bytes accessed'] / 1e9:.2f} | "
            f"{x['optimal_seconds']:.4f} | {x['arguments'] / 2**30:.2f} | "
            f"{x['temporary'] / 2**30:.2f} |"
        )
    own = found["kdrl_jax train step"]
    for name, x in found.items():
        if name.startswith("tunix"):
            ratios = ", ".join(f"{key} {own[key] / x[key]:.2f}" for key in (*PARTS, "temporary"))
            print(f"\nkdrl_jax's train step / {name}: {ratios} (bar: 1)")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return None


def in_process(python: str, library: str) -> dict[str, dict[str, float]]:
    """What this script reports under another Python."""
    command = [python, __file__, *sys.argv[1:], f"--library={library}"]
    return w.in_process(command, own=library == "kdrl")


def chips(args) -> list:
    """The devices of a TPU system that is described, not present."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(args.topology, platform="tpu").devices


def costs(compiled) -> dict[str, float]:
    """XLA's estimates for one chip."""
    found = {part: compiled.cost_analysis()[part] for part in PARTS}
    # Each of the compiler's own calls that it knows nothing of is booked as -1 second: what they
    # leave is the fraction, of programs far shorter than a second.
    found["optimal_seconds"] %= 1.0
    return found | memory(compiled)


def memory(compiled) -> dict[str, float]:
    plan = compiled.memory_analysis()
    return {"arguments": plan.argument_size_in_bytes, "temporary": plan.temp_size_in_bytes}


def on_the_line(args, of_depth) -> dict[str, float]:
    """The whole model's figures from those of the two depths."""
    few, more = map(int, args.depths.split(","))
    a, b = of_depth(few), of_depth(more)
    turns = (w.SHAPES[args.shape].layers - few) / (more - few)
    return {key: a[key] + turns * (b[key] - a[key]) for key in a}


def of_kdrl(args) -> None:
    """The train step, by the fused update; and a decode step of the rollout engine."""
    import jax
    import run_kdrl as own

    from kdrl_jax.sharding import make_mesh

    mesh = make_mesh(1, -1, 1, devices=chips(args))
    shape = w.SHAPES[args.shape]

    def train(layers: int):
        model = own.make_model(shape._replace(layers=layers), args.dtype)
        return own.lower_train(model, mesh, args.rows, args.length, chunk=2048).compile()

    def unrolled(layers: int) -> dict[str, float]:
        # Without a loop around it, recomputation must be kept from being merged away.
        scan, checkpoint = jax.lax.scan, jax.checkpoint
        kept = lambda f, **options: checkpoint(f, **options | {"prevent_cse": True})  # noqa: E731
        full = {"full": functools.partial(kept)}
        with (
            mock.patch.object(jax.lax, "scan", functools.partial(scan, unroll=True)),
            mock.patch.object(jax, "checkpoint", kept),
            mock.patch("kdrl_jax.models.qwen.REMAT", full),
        ):
            return costs(train(layers))

    step = on_the_line(args, unrolled) | memory(train(shape.layers))
    w.report(
        **{
            "kdrl_jax train step": step,
            f"kdrl_jax decode step, {args.slots} slots": on_the_line(
                args, lambda layers: decode(args, mesh, layers)
            ),
        }
    )


def decode(args, mesh, layers: int) -> dict[str, float]:
    """The loop over tokens of the engine's decode program, whose layers are unrolled anyway."""
    import jax
    import run_kdrl as own
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from kdrl_jax.rollout import decode as device
    from kdrl_jax.rollout import sampling_params
    from kdrl_jax.sharding import BATCH_AXES, param_shardings, replicated

    shape = w.SHAPES[args.shape]._replace(layers=layers)
    model = own.make_model(shape, args.dtype)
    params = place(model.shapes(), param_shardings(mesh, model.shapes()))
    sampling = sampling_params((1, 1), (-1,), max_new_tokens=1, temperature=1.0)
    with jax.set_mesh(mesh):
        unstack = jax.jit(model.unstack).lower(params)
        weights = place(jax.eval_shape(model.unstack, params), unstack.compile().output_shardings)
        slots = jax.eval_shape(lambda: device.empty_slots(model, args.slots, args.length))
        split = NamedSharding(mesh, P(BATCH_AXES))
        cache = place(slots.cache, jax.tree.map(lambda _: split, slots.cache))
        whole = jax.tree.map(lambda _: replicated(mesh), slots.requests)
        slots = device.Slots(cache, place(slots.requests, whole))

        def draw(weights, slots):
            # Settings that are known let the compiler drop the branches they do not take.
            options = {"steps": 32, "valid_vocab": shape.vocab}
            return device.decode(model, weights, slots, sampling, 0, **options)

        return costs(jax.jit(draw, donate_argnums=1).lower(weights, slots).compile())


def place(shapes, shardings):
    """Shapes of arrays that lie as `shardings` say."""
    import jax

    def one(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    return jax.tree.map(one, shapes, shardings)


def of_tunix(args) -> None:
    """google-tunix's GRPO step, with all activations kept (its default) and recomputed."""
    import lower_tunix as other

    def step(layers: int) -> dict[str, float]:
        shape = w.SHAPES[args.shape]._replace(layers=layers)
        return costs(other.lower_train(args, shape, chips(args)).compile())

    found = {}
    for args.variant in ("", "remat"):
        found[f"tunix GRPO step {args.variant}".strip()] = on_the_line(args, step)
    w.report(**found)


if __name__ == "__main__":
    main()
