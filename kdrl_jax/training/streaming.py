"""Weights between files and Orbax checkpoints piece by piece: never a whole parameter in memory.

Orbax reads and writes a leaf as its type's handler says; here the leaves are arrays that lie in
files, and the handler moves some layers at a time.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from kdrl_jax import processes
from kdrl_jax.models.hf_save import Stored
from kdrl_jax.models.hf_table import piece_of, pieces
from kdrl_jax.training.integrity import (
    CHECKSUMS,
    META,
    BlockNumber,
    Damaged,
    read_meta,
    seal,
    shapes_of,
)
from kdrl_jax.types import Params, UserError

handlers = ocp.type_handlers
STORED_TYPES = ((jax.Array, "jax.Array"), (np.ndarray, "np.ndarray"))


class OrbaxArray:
    """A parameter of an Orbax checkpoint: opened, and read block by block.

    Once all of it has been read it is compared with the checksum it was saved with.
    """

    def __init__(self, store: ts.TensorStore, checkpoint: Path):
        """Args: the array's own store, and the folder that errors name."""
        self._store, self._checkpoint = store, checkpoint
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        self._saved: tuple[str, str] | None = None
        self._number = BlockNumber(self.shape)

    def expect(self, name: str, number: str) -> None:
        """Take the number that was saved of the array, see `integrity.checksums`."""
        self._saved = name, number

    @property
    def piece(self) -> int:
        """Along the first axis: whole chunks as they were stored, so that each is read once."""
        shape: Any = self._store.chunk_layout.read_chunk.shape
        return max(shape[0], 1)

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """The block `index`.

        Raises:
          UserError: the files cannot be read, or the array is not what was saved.
        """
        try:
            found = self._store[tuple(index)].read().result()
            if self._saved:
                self._number.add(index, found)
                name, number = self._saved
                if self._number.whole not in (None, number):
                    raise Damaged(f"the checksum of {name} differs from what was saved")
        except (ValueError, Damaged) as error:
            raise UserError(damaged(self._checkpoint, error)) from error
        return found


class Watched:
    """A stored parameter that shows each block that is read of it."""

    def __init__(self, stored: Stored, seen: Callable[[Sequence[slice], np.ndarray], Any]):
        """Args: the parameter, and what is called with the index and content of each block."""
        self._stored, self._seen = stored, seen
        self.shape, self.dtype = stored.shape, stored.dtype

    @property
    def piece(self) -> int:
        """See `Stored`."""
        return self._stored.piece

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """The block `index`."""
        block = self._stored.read(index)
        self._seen(index, block)
        return block


def counted(params: Params, progress: Callable[[int, int], Any]) -> Params:
    """A tree of `Stored` that calls `progress` with the bytes read so far, and those of all."""
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    done = 0

    def read(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    def one(x: Stored) -> Watched:  # merged blocks are wider than what is read
        return Watched(x, lambda _, block: read(block.size * x.dtype.itemsize))

    return jax.tree.map(one, params)


class _StoredHandler(ocp.type_handlers.TypeHandler):
    """Saves `Stored` leaves in pieces, and opens a checkpoint's leaves as OrbaxArrays."""

    def __init__(self, name: str):
        """Args: what a checkpoint's metadata calls the type."""
        self._name = name

    def typestr(self) -> str:
        """What a checkpoint's metadata calls the type."""
        return self._name

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """As a NumPy array's."""
        return await handlers.NumpyHandler().metadata(infos)

    async def serialize(
        self, values: Sequence[Stored], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[ocp.future.Future]:
        """Write all leaves, one piece after the other; returns when all is written."""
        for i, (value, info) in enumerate(zip(values, infos, strict=True)):
            await info.await_path_creation()
            chunk = (min(value.shape[0], piece_of(value.shape, value.dtype)), *value.shape[1:])
            spec = handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=chunk,
                dtype=value.dtype,
                process_index=processes.index(),
                arg=args[i] if args else None,
            )
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            for part in pieces(value.shape[0], chunk[0]):
                block = value.read([part, *([slice(None)] * (len(value.shape) - 1))])
                await store[part].write(block, can_reference_source_data_indefinitely=True)
        return [ocp.future.NoopFuture()]

    async def deserialize(
        self, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[OrbaxArray]:
        """Open the leaves; nothing is read yet."""
        found = []
        for info in infos:
            await info.await_path_creation()
            spec = handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
            store = await ts.open(ts.Spec(spec), open=True, context=info.ts_context)
            found.append(OrbaxArray(store, Path(info.parent_dir).parent))
        return found


def write_stored(folder: Path, params: Params) -> None:
    """Write weights that lie in files as checkpoint 0 of a run's folder, in their own dtypes.

    Args:
      params: a tree of `Stored`.
    """
    numbers = jax.tree.map(lambda x: BlockNumber(x.shape), params)
    numbered = jax.tree.map(lambda x, number: Watched(x, number.add), params, numbers)
    # Named like NumPy arrays, so that any Orbax restores them.
    with _manager(folder, (object, _StoredHandler("np.ndarray"))) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.PyTreeSave(numbered)))
    names = shapes_of({"params": params}).items()
    sums = {
        name: [*shape, number.whole]
        for (name, shape), number in zip(names, jax.tree.leaves(numbers), strict=True)
    }
    meta = folder / "checkpoints" / "0" / META
    meta.parent.mkdir()
    meta.write_text(json.dumps(seal({"step": 0, CHECKSUMS: sums})), encoding="utf-8")


def open_stored(folder: Path, step: int) -> Params:
    """The weights of a run's checkpoint as OrbaxArrays, in the tree in which they were saved.

    Raises:
      Damaged: the checkpoint's meta is not what was saved.
    """
    meta = read_meta(folder / "checkpoints" / str(step)) or {}
    # A stored array's type is looked up by the name it was saved under.
    kinds = [(kind, _StoredHandler(name)) for kind, name in STORED_TYPES]
    with _manager(folder, *kinds) as manager:
        args = ocp.args.Composite(params=ocp.args.PyTreeRestore())
        found = manager.restore(step, args=args).params
    names = shapes_of({"params": found}).items()
    for (name, shape), leaf in zip(names, jax.tree.leaves(found), strict=True):
        *saved, number = meta.get(CHECKSUMS, {}).get(name, [None])
        if saved == shape and leaf.dtype.itemsize <= 4:
            leaf.expect(name, number)
    return found


def damaged(checkpoint: Path, error: Exception) -> str:
    """The line about a checkpoint that cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return f"{checkpoint}: damaged or half written ({reason}); use another step, or copy it again"


def _manager(folder: Path, *kinds: tuple[type, Any]) -> ocp.CheckpointManager:
    logging.getLogger("absl").setLevel(logging.ERROR)
    registry = handlers.create_type_handler_registry(*kinds)
    return ocp.CheckpointManager(
        (folder / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={"params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)},
    )
