"""The device mesh, and one strict table from parameter paths to partition specs.

Axes: `data` and `fsdp` both split the batch; `fsdp` also splits every large weight; `tensor`
splits heads, the MLP width and the vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.types import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

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
)

# Activations by logical axis name.
ACTIVATION_RULES: dict[str | None, Any] = {
    "batch": BATCH_AXES,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "length": None,
    "embed": None,
    None: None,
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `devices` (default: all); one size may be -1 and is then inferred.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(len(devices), (data, fsdp, tensor))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(count: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the axes on `count` devices, the one that is -1 inferred.

    Raises:
      UserError: they do not multiply to `count`.
    """
    names = ", ".join(f"mesh.{a}={s}" for a, s in zip(AXES, sizes, strict=True))
    if list(sizes).count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"{names}: sizes must be positive, with at most one -1 to be inferred")
    known = math.prod(s for s in sizes if s != -1)
    if -1 not in sizes and known != count:
        raise UserError(f"{names}: needs {known} devices, {count} are present; use -1 for one axis")
    if count % known:
        raise UserError(f"{names}: {known} does not divide the {count} devices present")
    return tuple(count // known if s == -1 else s for s in sizes)


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
    (counters, scalars) is replicated. Moments are split over `data` too, which has whole copies of
    the weights, where the sizes allow it: no copy of a moment is kept twice (ZeRO, arXiv
    1910.02054, stage 1).
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if any(re.fullmatch(pattern, name) for pattern, _ in PARAM_RULES):
                spec = param_spec(name) if leaf.ndim else P()
                spread_out = "opt_state" in parts and mesh.shape["data"] > 1
                return NamedSharding(mesh, spread(spec, leaf) if spread_out else spec)
        return NamedSharding(mesh, P())

    def spread(spec: P, leaf: Any) -> P:
        axes = (
            BATCH_AXES if part == "fsdp" and _divides(mesh, BATCH_AXES, size) else part
            for part, size in zip(spec, leaf.shape, strict=False)
        )
        return P(*axes)

    return jax.tree_util.tree_map_with_path(one, state)


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


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """Arrays to the mesh's devices, split along their first axis where the mesh divides it."""

    def one(x: Any) -> jax.Array:
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        return jax.device_put(x, batch_sharding(mesh, x.shape))

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
