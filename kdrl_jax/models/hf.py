"""Hugging Face checkpoints read straight into shards. No torch.

Names and axes come from the one table in `kdrl_jax.models.hf_table`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from kdrl_jax.models.hf_files import open_hf
from kdrl_jax.models.hf_table import HFArray, piece_of, pieces
from kdrl_jax.models.qwen import Decoder
from kdrl_jax.sharding import param_shardings, path_name
from kdrl_jax.types import Params

Progress = Callable[[int, int], Any]
"""(done, total), in bytes."""


def load_hf(
    folder: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    progress: Progress = lambda read, total: None,
) -> tuple[Decoder, Params]:
    """Load a checkpoint folder: config.json, and safetensors whole or sharded with an index.

    Each process reads what its own devices hold. A shard is read, cast and put on its device by
    itself, a large stack of layers a few layers at a time: the host never holds more than the
    largest single shard beside what the devices have.

    Args:
      folder: what `transformers` writes with `save_pretrained`.
      mesh: devices to load onto; None means the default device.
      dtype: of the parameters; or a tree of dtypes in their shape.
      compute_dtype, remat: of the model, see `Decoder`.
      progress: called after each piece with how many bytes of the files this process has read,
        and is to read.

    Returns:
      (model, params).

    Raises:
      UserError: files are missing or unreadable, or tensors are missing, surplus or misshapen, or
        a mesh axis does not divide a weight; all such tensors by name, at once.
    """
    device = jax.devices()[0] if mesh is None else None
    with open_hf(Path(folder)) as (config, arrays):
        model = Decoder(config, dtype=compute_dtype, remat=remat)
        shapes = model.shapes()
        shardings = (
            jax.tree.map(lambda _: SingleDeviceSharding(device), shapes)
            if mesh is None
            else param_shardings(mesh, shapes)
        )

        def held(path: Any, _: Any, sharding: Any) -> int:
            array = arrays[path_name(path)]
            blocks = len(_holders(array.shape, sharding))
            return blocks * math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize

        total = sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(held, shapes, shardings)))
        done = 0

        def read(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        def load(path: Any, dtype: Any, sharding: Any) -> jax.Array:
            return _load_sharded(arrays[path_name(path)], sharding, jnp.dtype(dtype), read)

        dtypes = dtype if isinstance(dtype, dict) else jax.tree.map(lambda _: dtype, shapes)
        return model, jax.tree_util.tree_map_with_path(load, dtypes, shardings)


def _load_sharded(
    array: HFArray, sharding: Any, dtype: np.dtype, read: Callable[[int], None]
) -> jax.Array:
    """One parameter on its devices; `read` is told of the bytes of each block."""
    shard = sharding.shard_shape(array.shape)
    group = piece_of(shard, dtype)
    if not array.row.stacked or len(range(0, array.shape[0], group)) == 1:
        return _load_block(array, slice(0, array.shape[0]), sharding, dtype, read)
    # Filled in place on the devices: no stack is ever whole on the host, nor twice on a device.
    stack = _filler(array.shape, dtype.name, sharding)()
    for layers in pieces(array.shape[0], group):
        part = _load_block(array, layers, sharding, dtype, read)
        stack = jax.block_until_ready(_putter(sharding)(stack, part, np.int32(layers.start)))
    return stack


def _holders(
    shape: tuple[int, ...], sharding: Any
) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """The blocks of an array that this process holds, and the devices that hold each."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(spans, []).append(device)
    return holders


def _load_block(
    array: HFArray,
    first: slice,
    sharding: Any,
    dtype: np.dtype,
    read: Callable[[int], None],
) -> jax.Array:
    """The part `first` of the parameter's first axis; what several devices hold is read once."""
    shape = (first.stop - first.start, *array.shape[1:])
    arrays = []
    for spans, devices in _holders(shape, sharding).items():
        start, stop = spans[0]
        index = [slice(first.start + start, first.start + stop)]
        block = array.read(index + [slice(*span) for span in spans[1:]], dtype)
        read(block.size * array.dtype.itemsize)
        arrays += [jax.device_put(block, device) for device in devices]
        jax.block_until_ready(arrays)  # or transfers queue up, each holding its block
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


@functools.lru_cache(maxsize=64)
def _filler(shape: tuple[int, ...], dtype: str, sharding: Any) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _putter(sharding: Any) -> Callable[..., jax.Array]:
    """Puts layers into a stack that is given up for it."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
