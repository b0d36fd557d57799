"""What tells that a checkpoint is what was saved: a checksum of every array, and of those a seal.

Files can change after they were written: a flipped bit, a block of zeros, a copy cut short. The
numbers are taken of the arrays on the devices, before saving and after restoring, so that they
cover all that lies between.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax.sharding import in_memory, path_name
from kdrl_jax.types import UserError

CHECKSUMS, SEAL = "checksums", "sha256"
META = Path("meta", "metadata")
"""Where Orbax keeps a checkpoint's meta, below the checkpoint's folder."""


class Damaged(Exception):
    """A checkpoint that is not what was saved."""


def checksums(tree: Any) -> dict[str, list[Any]]:
    """`{path: [shape, dtype, number]}` of the arrays of `tree`, as JSON has them.

    The number is the sum over all elements of the element's bits times an odd number made of its
    place, mod 2³². Any change of one bit, indeed of one element, changes it; of other damage one
    in 2³² goes unseen. It does not depend on how the arrays are split over devices. All processes
    must call this, and get the same.
    """
    arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), tree)
    names = shapes_of(arrays).items()
    return {
        name: [*shape, f"{_number_of(x):08x}"]
        for (name, shape), x in zip(names, jax.tree.leaves(arrays), strict=True)
    }


def shapes_of(tree: Any) -> dict[str, list[Any]]:
    """`checksums` without the numbers; `tree` may be abstract."""
    return {
        path_name(path): [list(x.shape), str(x.dtype)]
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def compare(stored: Mapping[str, Sequence[Any]], tree: Any) -> None:
    """Raises Damaged, naming an array, if `tree` is not what `stored` was taken of."""
    found = checksums(tree)
    wrong = [name for name in found if list(stored[name]) != found[name]]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(f"the checksum of {wrong[0]}{more} differs from what was saved")


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` with a SHA-256 of its own canonical JSON."""
    return {**meta, SEAL: _digest(meta)}


def read_meta(checkpoint: Path) -> dict[str, Any] | None:
    """The meta of a checkpoint's folder; None: it never had one.

    Raises:
      Damaged: it cannot be read, or is not what was sealed. One without checksums, as they were
        once written, has no seal.
    """
    if not (checkpoint / META).is_file():
        if (checkpoint / META.parts[0]).exists():
            raise Damaged(f"{META} is missing")
        return None
    try:
        meta = json.loads((checkpoint / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{META} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise Damaged(f"{META} holds no settings")
    content = {key: x for key, x in meta.items() if key != SEAL}
    if set(meta) <= UNSEALED:
        return content
    if meta.get(SEAL) != _digest(content):
        raise Damaged(f"{META} is not what was saved")
    return content


UNSEALED = frozenset({"step", "seed", "data_position", "data", "trend", "carried"})
"""The keys that checkpoints had before they were sealed."""


def compare_shapes(where: Path, stored: Mapping[str, Sequence[Any]], like: Any) -> None:
    """Refuse a checkpoint of another model.

    Raises:
      UserError: arrays that are missing, surplus, or of another shape or dtype.
    """
    wanted = shapes_of(like)
    hint = "use the config that made it or another --workdir"
    problems = [
        f"{where}: does not fit this model: {name} is "
        f"{'missing' if name in wanted else 'surplus'}; {hint}"
        for name in sorted(wanted.keys() ^ stored.keys())
    ]
    problems += [
        f"{where}: does not fit this model: {name} is {list(stored[name][:2])}, not {wanted[name]};"
        f" {hint}"
        for name in sorted(wanted.keys() & stored.keys())
        if list(stored[name][:2]) != wanted[name]
    ]
    if problems:
        more = [f"{where}: and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UserError(*problems[:8], *more)


def _digest(meta: Mapping[str, Any]) -> str:
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _number_of(x: jax.Array) -> int:
    where = x.sharding
    # Of several processes each reads the result, so it must lie on all of them.
    out = NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else None
    if str(where.memory_kind) == "pinned_host":
        x = in_memory("device", x)
    # One after the other: that bounds the memory, and of many programs under way at once that
    # wait for each other's devices a CPU's threads do not get any done.
    return int(jax.device_get(_program(out)(x)))


@functools.cache
def _program(out: NamedSharding | None) -> Any:
    """For one array at a time: XLA fuses the products into the sum, but not on CPUs, where it makes
    a tree of a large one and holds the products of the whole array."""
    return jax.jit(_number, out_shardings=out)


def _number(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 64 bits become two numbers along a new last axis.
    x = jax.lax.bitcast_convert_type(x, WORDS.get(x.dtype.itemsize, jnp.uint32))
    place = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(x.astype(jnp.uint32) * _factors(place), dtype=jnp.uint32)


def number_of_block(
    block: np.ndarray, starts: Sequence[int], shape: Sequence[int], place: int = 0
) -> int:
    """What a block adds, mod 2³², to the number of the whole array in `checksums`.

    Args:
      block: of 8, 16 or 32 bits an element.
      starts: where it begins in the array, along each axis.
      shape: of the array.
      place: of the array's first element, where it is a part of another.
    """
    if block.ndim == 0:
        block, starts, shape = block[None], (0,), (1,)
    row = math.prod(shape[1:])
    place += starts[0] * row
    if block.shape[1:] != tuple(shape[1:]):
        rows = enumerate(block)
        return sum(number_of_block(x, starts[1:], shape[1:], place + i * row) for i, x in rows)
    words = np.ascontiguousarray(block).reshape(-1).view(WORDS.get(block.dtype.itemsize, np.uint32))
    total = 0
    for begin in range(0, len(words), SPAN):  # few enough to stay in a core's cache
        part = words[begin : begin + SPAN]
        places = np.arange(len(part), dtype=np.uint32) + np.uint32((place + begin) % 2**32)
        total += int(np.sum(part * _factors(places), dtype=np.uint32))
    return total


class BlockNumber:
    """The number of one array in `checksums`, taken while it is read block by block."""

    def __init__(self, shape: Sequence[int]):
        self._shape, self._sum, self._left = tuple(shape), 0, math.prod(shape)
        self._blocks: set[tuple[tuple[int, int], ...]] = set()

    def add(self, index: Sequence[slice], block: np.ndarray) -> None:
        """Take the block `index` of the array; one that was taken already counts once."""
        ends = zip(index, self._shape, strict=True)
        spans = tuple(part.indices(size)[:2] for part, size in ends)
        if spans in self._blocks:
            return
        if any(_overlap(spans, other) for other in self._blocks):
            self._left = -1  # nobody reads so; the sum is of no use any more
        self._blocks.add(spans)
        self._sum += number_of_block(block, [start for start, _ in spans], self._shape)
        self._left -= block.size

    @property
    def whole(self) -> str | None:
        """The number as `checksums` writes it, once all of the array has been taken."""
        return None if self._left else f"{self._sum % 2**32:08x}"


def _overlap(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))


SPAN = 1 << 15
"""Elements that `number_of_block` takes at a time."""
WORDS = {1: np.uint8, 2: np.uint16}
"""What elements of so many bytes are read as; others as words of 32 bits."""


def _factors(place: Any) -> Any:
    """Odd, and of neighbours unlike, so that what moves by a few places is seen as well."""
    place ^= place >> 16
    place *= np.uint32(0x7FEB352D)
    place ^= place >> 15
    place *= np.uint32(0x846CA68B)
    place ^= place >> 16
    return 2 * place + 1
