"""The meshes of a run: where the student is trained, the teacher asked, and rollouts are drawn."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdrl_jax import processes
from kdrl_jax.sharding import AXES, infer_sizes, make_mesh
from kdrl_jax.types import UserError


class Meshes(NamedTuple):
    """Over the same devices unless a config names others; arrays move by `jax.device_put`."""

    student: Mesh
    teacher: Mesh
    rollout: Mesh


def make_meshes(config: ConfigDict, devices: list[jax.Device] | None = None) -> Meshes:
    """The meshes of a config; a size of 0 stands for that of `mesh`.

    Args:
      devices: default: all there are.

    Raises:
      UserError: sizes that do not fit the devices, of all meshes at once.
    """
    devices = jax.devices() if devices is None else devices
    problems: list[str] = []

    def make(key: str, like: Mesh | None) -> Mesh | None:
        sizes = {axis: config[key][axis] for axis in config[key] if axis in AXES}
        sizes.setdefault("context", 1)  # rollouts have no use for it
        try:
            chosen = pick_devices(config[key].devices, devices, key)
            if like is None:
                return make_mesh(**sizes, devices=chosen, key=key)
            sizes = {axis: size or like.shape[axis] for axis, size in sizes.items()}
            if config[key].devices:
                return make_mesh(**sizes, devices=chosen, key=key)
            # In the order of the first mesh, so that what is laid out alike need not move.
            sizes = infer_sizes(sizes, like.size, key)
            grid = like.devices.reshape([sizes[axis] for axis in AXES])
            return Mesh(grid, AXES, axis_types=like.axis_types)
        except UserError as error:
            problems.extend(error.problems)
            return None

    student = make("mesh", None)
    if student is None:
        raise UserError(*problems)
    teacher, rollout = make("teacher_mesh", student), make("rollout_mesh", student)
    if teacher is None or rollout is None:
        raise UserError(*problems)
    return Meshes(student, teacher, rollout)


def describe(mesh: Mesh) -> str:
    """'8 x cpu of 2 processes (0 = HOST, 1 = HOST), mesh data=1 …'. All of them must call."""
    hosts = processes.hosts()
    several = f" of {len(hosts)} processes ({', '.join(hosts)})" if len(hosts) > 1 else ""
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{several}, mesh {sizes}"


def rollout_mesh(config: ConfigDict) -> Mesh:
    """The mesh of rollouts alone, for what does not train: of `mesh` and `rollout_mesh`."""
    return make_meshes(config).rollout


def pick_devices(text: str, devices: list[jax.Device], key: str) -> list[jax.Device]:
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
