"""The meshes of a run: where the student is trained, the teacher asked, and rollouts are drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.sharding import AXES, infer_sizes, make_mesh
from kdrl_jax.types import UserError


class Meshes(NamedTuple):
    """Over the same devices unless a config names others; arrays move by `jax.device_put`.

    A plan's are of devices that are not there; without a description of these, of sizes alone.
    """

    student: Mesh
    teacher: Mesh
    rollout: Mesh
    apart: frozenset[str] = frozenset()
    """Which of "teacher" and "rollout" have no device of the student's."""


def make_meshes(
    config: ConfigDict, devices: list[jax.Device] | None = None, *, count: int | None = None
) -> Meshes:
    """The meshes of a config; a size of 0 stands for that of `mesh`.

    Args:
      devices: default: all there are.
      count: of devices that nobody describes: gives meshes of sizes alone.

    Raises:
      UserError: sizes that do not fit the devices, of all meshes at once.
    """
    present: Sequence[Any] = range(count) if count else devices or jax.devices()
    problems: list[str] = []
    kinds = (AxisType.Auto,) * len(AXES)

    def make(key: str, like: Mesh | None) -> Mesh | None:
        sizes = {axis: config[key][axis] for axis in config[key] if axis in AXES}
        sizes.setdefault("context", 1)  # rollouts have no use for it
        try:
            chosen = pick_devices(config[key].devices, present, key)
            if like is not None:
                sizes = {axis: size or like.shape[axis] for axis, size in sizes.items()}
            if not count and (like is None or config[key].devices):
                return make_mesh(**sizes, devices=chosen, key=key)
            share = like is not None and not config[key].devices
            sizes = infer_sizes(sizes, like.size if like and share else len(chosen), key)
            shape = tuple(sizes[axis] for axis in AXES)
            if count or like is None:
                return cast(Mesh, AbstractMesh(shape, AXES, axis_types=kinds))
            # In the order of the first mesh, so that what is laid out alike need not move.
            return Mesh(like.devices.reshape(shape), AXES, axis_types=kinds)
        except UserError as error:
            problems.extend(error.problems)
            return None

    if processes.count() > 1:
        problems += [
            f"{key}.devices: {config[key].devices!r}, but there are {processes.count()} processes, "
            "and JAX moves arrays between their devices only where all meshes have the same; leave "
            "it empty"
            for key in ("mesh", "teacher_mesh", "rollout_mesh")
            if config[key].devices
        ]
    student = make("mesh", None)
    if student is None:
        raise UserError(*problems)
    teacher, rollout = make("teacher_mesh", student), make("rollout_mesh", student)
    if teacher is None or rollout is None or problems:
        raise UserError(*problems)
    home = set(pick_devices(config.mesh.devices, present, "mesh"))
    apart = {
        name
        for name in ("teacher", "rollout")
        if (own := config[f"{name}_mesh"].devices)
        and home.isdisjoint(pick_devices(own, present, name))
    }
    return Meshes(student, teacher, rollout, frozenset(apart))


def describe(mesh: Mesh) -> str:
    """'8 x cpu of 2 processes (0 = HOST, 1 = HOST), mesh data=1 …'. All of them must call."""
    hosts = processes.hosts()
    several = f" of {len(hosts)} processes ({', '.join(hosts)})" if len(hosts) > 1 else ""
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{several}, mesh {sizes}"


def rollout_mesh(config: ConfigDict) -> Mesh:
    """The mesh of rollouts alone, for what does not train: of `mesh` and `rollout_mesh`."""
    return make_meshes(config).rollout


def pick_devices(text: str, devices: Sequence[Any], key: str) -> Sequence[Any]:
    """'0:48' of `devices`.

    Raises:
      UserError: not written like that, or none of the devices there are.
    """
    if not text:
        return devices
    found = re.fullmatch(r"(\d*):(\d*)", text)
    first, last = (int(x) if x else None for x in found.groups()) if found else (None, None)
    chosen = devices[first:last]
    if not found or not chosen or (last or 0) > len(devices):
        raise UserError(
            f"{key}.devices: {text!r} is no range of the {len(devices)} devices; write FIRST:END "
            f"such as '0:{max(1, len(devices) // 2)}', or '' for all"
        )
    return chosen
