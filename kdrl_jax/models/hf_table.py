"""The one table between our parameters and the tensors of a Hugging Face checkpoint.

ROWS says for every parameter its tensor's name and how their axes correspond; reading and writing
both follow it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax.models.config import ModelConfig
from kdrl_jax.sharding import path_name
from kdrl_jax.types import Params

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype("float16"),
}
"""What a safetensors header calls the dtypes that are read and written."""
PIECE_BYTES = 1 << 28
"""About how much of a parameter is held on the host at a time; at least one layer's share."""
LAYER = "model.layers.{layer}."

# (our path, tensor name, "axes of the tensor -> axes of the parameter without the layer axis").
# An axis in brackets is several of ours in one. Letters as in `kdrl_jax.types`.
ROWS: tuple[tuple[str, str, str], ...] = (
    ("embed/embedding", "model.embed_tokens.weight", "V D -> V D"),
    ("lm_head/kernel", "lm_head.weight", "V D -> V D"),
    ("final_norm/scale", "model.norm.weight", "D -> D"),
    ("layers/input_norm/scale", LAYER + "input_layernorm.weight", "D -> D"),
    ("layers/post_norm/scale", LAYER + "post_attention_layernorm.weight", "D -> D"),
    ("layers/attn/q_proj/kernel", LAYER + "self_attn.q_proj.weight", "(N H) D -> D N H"),
    ("layers/attn/k_proj/kernel", LAYER + "self_attn.k_proj.weight", "(K H) D -> D K H"),
    ("layers/attn/v_proj/kernel", LAYER + "self_attn.v_proj.weight", "(K H) D -> D K H"),
    ("layers/attn/q_proj/bias", LAYER + "self_attn.q_proj.bias", "(N H) -> N H"),
    ("layers/attn/k_proj/bias", LAYER + "self_attn.k_proj.bias", "(K H) -> K H"),
    ("layers/attn/v_proj/bias", LAYER + "self_attn.v_proj.bias", "(K H) -> K H"),
    ("layers/attn/o_proj/kernel", LAYER + "self_attn.o_proj.weight", "D (N H) -> N H D"),
    ("layers/attn/q_norm/scale", LAYER + "self_attn.q_norm.weight", "H -> H"),
    ("layers/attn/k_norm/scale", LAYER + "self_attn.k_norm.weight", "H -> H"),
    ("layers/mlp/gate_proj/kernel", LAYER + "mlp.gate_proj.weight", "F D -> D F"),
    ("layers/mlp/up_proj/kernel", LAYER + "mlp.up_proj.weight", "F D -> D F"),
    ("layers/mlp/down_proj/kernel", LAYER + "mlp.down_proj.weight", "D F -> F D"),
)

# Buffers that old exports saved beside the weights; derived from config.json, so not needed.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class Row(NamedTuple):
    """A row of ROWS with its axes parsed and its sizes filled in."""

    tensor: str
    groups: tuple[tuple[str, ...], ...]
    axes: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def stacked(self) -> bool:
        """Whether the parameter has the layer axis in front: one tensor per layer."""
        return "{layer}" in self.tensor

    @property
    def hf_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[a] for a in group) for group in self.groups)

    def tensors(self, layers: int) -> list[str]:
        """Names of the tensors in this row: one per layer, or just one."""
        if not self.stacked:
            return [self.tensor]
        return [self.tensor.format(layer=i) for i in range(layers)]

    def read(self, source: Any, index: Sequence[slice]) -> np.ndarray:
        """The block `index` of the parameter (without the layer axis) from a safetensors slice.

        Only the rows and columns of the block are read, except that a bracketed axis is read
        whole in all but its first letter.
        """
        wanted = {
            a: range(*s.indices(self.sizes[a])) for a, s in zip(self.axes, index, strict=True)
        }
        box, shape, rest = [], [], []
        for group in self.groups:
            inner = math.prod(self.sizes[a] for a in group[1:])
            first = wanted[group[0]]
            box.append(slice(first.start * inner, first.stop * inner))
            shape += [len(first), *(self.sizes[a] for a in group[1:])]
            rest += [slice(None), *(slice(wanted[a].start, wanted[a].stop) for a in group[1:])]
        block = source[tuple(box)].reshape(shape)[tuple(rest)]
        letters = [a for group in self.groups for a in group]
        return block.transpose([letters.index(a) for a in self.axes])

    def write(self, array: np.ndarray, dtype: Any = None) -> np.ndarray:
        """The tensor that holds one layer's `array`, as `dtype` (None: its own)."""
        letters = [a for group in self.groups for a in group]
        array = array.transpose([self.axes.index(a) for a in letters])
        tensor = np.empty(array.shape, array.dtype if dtype is None else dtype)
        copy_into(tensor, array)
        return tensor.reshape(self.hf_shape)


class HFArray:
    """A parameter as it lies in the files: read block by block, in our axes.

    Attributes:
      shape: of the parameter, the layer axis in front where there is one.
      dtype: of the tensors; the smallest that holds all of them where layers differ.
    """

    def __init__(self, row: Row, sources: Sequence[Any]):
        """Args: the parameter's row, and a safetensors slice of each of its tensors."""
        self.row, self._sources = row, sources
        inner = tuple(row.sizes[a] for a in row.axes)
        self.shape = (len(sources), *inner) if row.stacked else inner
        dtype = DTYPES[sources[0].get_dtype()]
        for source in sources[1:]:
            dtype = jnp.promote_types(dtype, DTYPES[source.get_dtype()])
        self.dtype = np.dtype(dtype)

    @property
    def piece(self) -> int:
        """Along the first axis: how much is best read or stored at a time."""
        return piece_of(self.shape, self.dtype)

    def read(self, index: Sequence[slice], dtype: Any = None) -> np.ndarray:
        """The block `index` as `dtype` (None: its own); tensors are read one at a time."""
        spans = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        block = np.empty([len(s) for s in spans], self.dtype if dtype is None else dtype)
        inner = [slice(s.start, s.stop) for s in spans]
        if self.row.stacked:
            for i, layer in enumerate(spans[0]):
                copy_into(block[i], self.row.read(self._sources[layer], inner[1:]))
            return block
        for at in pieces(len(spans[0]), piece_of(block.shape, self.dtype)):
            first = slice(inner[0].start + at.start, inner[0].start + at.stop)
            block[at] = self.row.read(self._sources[0], [first, *inner[1:]])
        return block


def copy_into(out: np.ndarray, array: np.ndarray, tile: int = 256) -> None:
    """`out[...] = array`, tile by tile where the order of axes in memory differs.

    A large transpose goes against the cache, and NumPy casts bfloat16 slowly against the order of
    memory: by tiles it takes a seventh of the time.
    """
    if array.ndim < 2 or array.strides[-1] == array.itemsize:
        out[...] = array
        return
    if out.dtype == array.dtype:  # NumPy moves integers faster than bfloat16
        kind = f"u{array.itemsize}"
        out, array = out.view(kind), array.view(kind)
    fastest = min(range(array.ndim), key=lambda axis: array.strides[axis])
    steps = [tile if axis in (fastest, array.ndim - 1) else 1 for axis in range(array.ndim)]
    cuts = [pieces(size, step) for size, step in zip(array.shape, steps, strict=True)]
    for at in itertools.product(*cuts):
        out[at] = array[at].astype(out.dtype, order="K", copy=False)


def piece_of(shape: Sequence[int], dtype: Any) -> int:
    """How many items along the first axis of an array make PIECE_BYTES; at least one."""
    return max(1, PIECE_BYTES // max(1, math.prod(shape[1:]) * np.dtype(dtype).itemsize))


def pieces(size: int, piece: int) -> Iterator[slice]:
    """Slices of `piece` items, the last maybe fewer, that make up `size`."""
    for start in range(0, size, piece):
        yield slice(start, min(start + piece, size))


def table_rows(config: ModelConfig, shapes: Params) -> dict[str, Row]:
    """The row of each parameter by its path, in the order of ROWS.

    Raises:
      ValueError: a parameter has no row, or its row gives another shape.
    """
    c = config
    sizes = {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "N": c.num_heads,
        "K": c.num_kv_heads,
        "H": c.head_dim,
        "F": c.mlp_size,
    }
    leaves = {path_name(p): v.shape for p, v in jax.tree_util.tree_leaves_with_path(shapes)}
    rows = {}
    for path, tensor, axes in ROWS:
        if path not in leaves:
            continue
        left, right = axes.split(" -> ")
        groups = tuple(tuple(g.strip("()").split()) for g in re.findall(r"\([^)]*\)|\w", left))
        row = Row(tensor, groups, tuple(right.split()), sizes)
        shape = (c.num_layers,) * ("{layer}" in tensor) + tuple(sizes[a] for a in row.axes)
        if shape != leaves.pop(path):
            raise ValueError(f"parameter {path!r}: its row in ROWS does not give its shape")
        rows[path] = row
    if leaves:
        raise ValueError(f"parameters without a row in ROWS: {', '.join(leaves)}")
    return rows
