"""The device mesh, and one strict table from parameter paths to partition specs.

Axes: `data` and `fsdp` both split the batch; `fsdp` also splits every large weight; `tensor`
splits heads, the MLP width and the vocabulary; `context` splits the length of rows that are scored
or trained on.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.types import UserError
from kdrl_jax.versions import libtpu_problem

# From the outermost to the innermost: `tensor` talks most, so its devices are the nearest ones. As
# `context` follows `data`, rollouts can take both for one axis without moving a weight.
AXES = ("data", "context", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SPREAD_AXES = ("fsdp", "data", "context")
"""A moment's part is a part of its weight's."""

# (regex that must match the whole '/'-joined path, spec without the leading layer axis).
# Weights under `layers/` are stacked: their first axis is the layer and is never split.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),  # [V, D]
    (r"lm_head/kernel", P("tensor", "fsdp")),  # [V, D]
    (r"final_norm/scale", P(None)),
    (r"layers/(input_norm|post_norm)/scale", P(None)),
    (r"layers/attn/q_proj/kernel", P("fsdp", "tensor", None)),  # [D, N, H]
    (r"layers/attn/(k_proj|v_proj)/kernel", P("fsdp", "tensor", None)),  # [D, K, H]
    (r"layers/attn/(q_proj|k_proj|v_proj)/bias", P("tensor", None)),  # [N or K, H]
    (r"layers/attn/o_proj/kernel", P("tensor", None, "fsdp")),  # [N, H, D]
    (r"layers/attn/(q_norm|k_norm)/scale", P(None)),  # [H]
    (r"layers/mlp/(gate_proj|up_proj)/kernel", P("fsdp", "tensor")),  # [D, F]
    (r"layers/mlp/down_proj/kernel", P("tensor", "fsdp")),  # [F, D]
    # Adapters, r being their rank: each lies as the axis that it shares with its kernel.
    (r"layers/(attn/[qkv]_proj|mlp/(gate_proj|up_proj))/lora_a", P("fsdp", None)),  # [D, r]
    (r"layers/attn/[qkv]_proj/lora_b", P(None, "tensor", None)),  # [r, N or K, H]
    (r"layers/attn/o_proj/lora_a", P("tensor", None, None)),  # [N, H, r]
    (r"layers/mlp/(gate_proj|up_proj)/lora_b", P(None, "tensor")),  # [r, F]
    (r"layers/mlp/down_proj/lora_a", P("tensor", None)),  # [F, r]
    (r"layers/(attn/o_proj|mlp/down_proj)/lora_b", P(None, "fsdp")),  # [r, D]
)

# Activations by logical axis name.
ACTIVATION_RULES: dict[str | None, Any] = {
    "batch": BATCH_AXES,
    "tokens": (*BATCH_AXES, "context"),  # of a batch of rows, all together
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "length": "context",
    "embed": None,
    None: None,
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
    key: str = "mesh",
) -> Mesh:
    """A mesh over `devices` (default: all); one size may be -1 and is then inferred.

    On several TPU slices, `data` or else `fsdp` runs over the slices and the other axes within.

    Args:
      key: of the config, for errors.

    Raises:
      UserError: the sizes do not multiply to the number of devices; says which would.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    sizes = infer_sizes(sizes, len(devices), key)
    shape = tuple(sizes[axis] for axis in AXES)
    on_tpu = devices[0].platform == "tpu"
    if on_tpu and (problem := libtpu_problem()):
        warnings.warn(f"{problem}; until then compiling may fail", RuntimeWarning, stacklevel=2)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices == 1:
        kinds = (AxisType.Auto,) * len(AXES)
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    over = next((axis for axis in BATCH_AXES if sizes[axis] % slices == 0), None)
    if over is None:
        raise UserError(
            f"{key}.data={sizes['data']}, {key}.fsdp={sizes['fsdp']}: neither is a multiple of the "
            f"{slices} slices, and only they can run over slices; use {key}.data={slices}"
        )
    outer = [slices if axis == over else 1 for axis in AXES]
    inner = [n // m for n, m in zip(shape, outer, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def infer_sizes(sizes: Mapping[str, int], count: int, key: str = "mesh") -> dict[str, int]:
    """`sizes` by axis with the -1 replaced, for `count` devices.

    Raises:
      UserError: they do not multiply to `count`.
    """
    names = ", ".join(f"{key}.{axis}={size}" for axis, size in sizes.items())
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"{names}: sizes must be positive, with at most one -1 to be inferred")
    known = math.prod(size for size in sizes.values() if size != -1)
    if known == count and not unknown:
        return dict(sizes)
    if unknown and count % known == 0:
        return {axis: count // known if size == -1 else size for axis, size in sizes.items()}
    # The largest axis is what one would change.
    axis = max(sizes, key=lambda axis: sizes[axis])
    if rest := count % (known // sizes[axis]):
        hint = f"the product of the others does not divide {count} (remainder {rest})"
    else:
        fits = count // (known // sizes[axis])
        fits = nearest_divisor(sizes[axis], fits) if unknown else fits
        hint = f"{key}.{axis}={fits} does"
    raise UserError(
        f"{names}: {known} does not {'divide' if unknown else 'make'} the {count} devices "
        f"present; {hint}"
    )


def nearest_divisor(size: int, of: int) -> int:
    """The divisor of `of` that is nearest to `size`; of two, the smaller."""
    divisors = (n for n in range(1, of + 1) if of % n == 0)
    return min(divisors, key=lambda n: (abs(n - size), n))


def path_name(path: Sequence[Any]) -> str:
    """'layers/attn/q_proj/kernel' for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def param_spec(name: str) -> P:
    """The partition spec of one parameter.

    Raises:
      ValueError: not exactly one row of PARAM_RULES matches `name`.
    """
    found = [spec for pattern, spec in PARAM_RULES if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise ValueError(f"parameter {name!r} matches {len(found)} rows of PARAM_RULES, must be 1")
    return P(None, *found[0]) if name.startswith("layers/") else found[0]


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """A tree of NamedSharding in the shape of `params` (arrays or shapes).

    Raises:
      UserError: a mesh axis does not divide the array axis that it splits.
    """
    problems: list[str] = []

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = param_spec(name)
        problems.extend(_indivisible(mesh, name, leaf.shape, spec))
        return NamedSharding(mesh, spec)

    tree = jax.tree_util.tree_map_with_path(one, params)
    if problems:
        raise UserError(*problems)
    return tree


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings of a TrainState: whatever mirrors a parameter is split as that parameter.

    Optimizer moments carry the parameter's path as the end of their own; everything else
    (counters, scalars) is replicated. Moments are split over `data` and `context` too, which have
    whole copies of the weights, where the sizes allow it: no copy of a moment is kept twice (ZeRO,
    arXiv 1910.02054, stage 1).
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if any(re.fullmatch(pattern, name) for pattern, _ in PARAM_RULES):
                spec = param_spec(name) if leaf.ndim else P()
                copies = mesh.shape["data"] * mesh.shape["context"]
                spread_out = "opt_state" in parts and copies > 1
                return NamedSharding(mesh, spread(spec, leaf) if spread_out else spec)
        return NamedSharding(mesh, P())

    def spread(spec: P, leaf: Any) -> P:
        axes = (
            SPREAD_AXES if part == "fsdp" and _divides(mesh, SPREAD_AXES, size) else part
            for part, size in zip(spec, leaf.shape, strict=False)
        )
        return P(*axes)

    return jax.tree_util.tree_map_with_path(one, state)


def to_mesh(mesh: Mesh, tree: Any) -> Any:
    """Weights on another mesh, each split over the axes that split it now, if any do."""

    def one(x: jax.Array) -> jax.Array:
        spec = getattr(x.sharding, "spec", None)
        return x if spec is None else put(x, NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def in_memory(kind: str, tree: Any) -> Any:
    """Arrays in another memory of their devices: "device", or "pinned_host", their host's."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard an activation by the logical names of its axes; nothing outside `jax.set_mesh`.

    An axis whose size the mesh does not divide is left whole: a batch of one on four devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, *axes))


def gathered(name: str, weight: jax.Array) -> jax.Array:
    """A weight whole on `fsdp`, as products read it; nothing outside `jax.set_mesh`.

    Args:
      name: its path, of a single layer if it is one's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return weight
    spec = param_spec(name)[-weight.ndim :]
    parts = (None if part == "fsdp" else part for part in spec)
    return jax.lax.with_sharding_constraint(weight, P(*parts))


def activation_spec(mesh: Any, shape: Sequence[int], *axes: str | None) -> P:
    """The partition spec of an activation by the logical names of its axes."""
    parts = [ACTIVATION_RULES[a] for a in axes]
    return P(*(p if _divides(mesh, p, n) else None for p, n in zip(parts, shape, strict=True)))


def shares(name: str, size: int) -> int:
    """Into how many parts the current mesh splits an activation's axis of this name and size."""
    mesh, part = jax.sharding.get_abstract_mesh(), ACTIVATION_RULES[name]
    return 1 if mesh.empty or not _divides(mesh, part, size) else _axis_size(mesh, part)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch_parts(mesh: Any) -> int:
    """Into how many parts the mesh splits a batch."""
    return _axis_size(mesh, BATCH_AXES)


def even_parts(mesh: Any, size: int) -> int:
    """Into how many parts the mesh splits a batch of this size; 1 where it does not divide it."""
    return batch_parts(mesh) if _divides(mesh, BATCH_AXES, size) else 1


def put(tree: Any, sharding: Any) -> Any:
    """Arrays to devices, which may be those of several processes.

    Args:
      tree: device arrays; or host arrays, the same in every process.
      sharding: one, or a tree of them in the shape of `tree`.
    """

    def of_host(x: Any, where: jax.sharding.Sharding) -> jax.Array:
        x = np.asarray(x)
        with jax.transfer_guard("allow"):  # it is meant, as a device_put is
            return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    def one(x: Any, where: jax.sharding.Sharding) -> jax.Array:
        if not isinstance(x, jax.Array):
            # A device_put would ask the other processes whether they have the same.
            return jax.device_put(x, where) if jax.process_count() == 1 else of_host(x, where)
        if x.is_fully_addressable and not where.is_fully_addressable:
            return of_host(jax.device_get(x), where)
        if x.sharding == where:
            return x
        if x.sharding.is_equivalent_to(where, x.ndim):  # the same by another mesh's names
            parts = [shard.data for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, where, parts)
        # To other devices, and split otherwise, JAX itself goes through the host; it is meant.
        with jax.transfer_guard("allow"):
            return jax.device_put(x, where)

    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda x: one(x, sharding), tree)
    return jax.tree.map(one, tree, sharding)


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """Arrays to the mesh's devices, split along their first axis where the mesh divides it."""

    def one(x: Any) -> jax.Array:
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        return put(x, batch_sharding(mesh, x.shape))

    return jax.tree.map(one, tree)


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """How `put_batch` lays out an array of this shape."""
    whole = not shape or not _divides(mesh, BATCH_AXES, shape[0])
    return NamedSharding(mesh, P() if whole else P(BATCH_AXES))


def placed(shapes: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s of arrays that lie as `shardings`, a tree alike, say."""

    def one(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings)


def placed_batch(mesh: Mesh, shapes: Any) -> Any:
    """What `put_batch` makes of arrays like these, as shapes."""
    return placed(shapes, jax.tree.map(lambda x: batch_sharding(mesh, x.shape), shapes))


def _axis_size(mesh: Any, part: Any) -> int:
    names = (part,) if isinstance(part, str) else (part or ())
    return math.prod(mesh.shape[n] for n in names)


def _divides(mesh: Any, part: Any, size: int) -> bool:
    return size % _axis_size(mesh, part) == 0


def _indivisible(mesh: Mesh, name: str, shape: Sequence[int], spec: P) -> list[str]:
    return [
        f"mesh.{part}={_axis_size(mesh, part)} does not divide axis {i} of {name} {tuple(shape)}; "
        f"use a size that divides {size}"
        for i, (part, size) in enumerate(zip(spec, shape, strict=False))
        if part is not None and not _divides(mesh, part, size)
    ]
