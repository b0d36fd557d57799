"""Weights written as a Hugging Face checkpoint folder, one tensor in memory at a time. No torch."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdrl_jax import processes
from kdrl_jax.models.checksums import HashedFile, write_sums
from kdrl_jax.models.config import ModelConfig
from kdrl_jax.models.hf_files import (
    CONFIG,
    GENERATION,
    INDEX,
    TOKENIZER_FILES,
    WEIGHTS,
    read_json,
    write_json,
)
from kdrl_jax.models.hf_table import DTYPES, Row, pieces, table_rows
from kdrl_jax.models.lora import merged_stored, split
from kdrl_jax.models.qwen import Decoder
from kdrl_jax.sharding import path_name
from kdrl_jax.types import Params, UserError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@runtime_checkable
class Stored(Protocol):
    """A parameter that lies in files and is read block by block."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def piece(self) -> int:
        """Along the first axis: how much is best read at a time."""
        ...

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """The block `index`."""
        ...


class _Tensor(NamedTuple):
    """One tensor of the folder: where it comes from and how it is stored."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_hf(
    folder: str | os.PathLike[str],
    model: Decoder,
    params: Params,
    *,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    config_folder: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    eos_ids: Sequence[int] = (),
    bos_id: int | None = None,
    pad_id: int | None = None,
    valid_vocab: int | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    checksums: bool = True,
) -> None:
    """Write a checkpoint folder that `load_hf`, `transformers`, vLLM and SGLang read.

    The folder appears complete or not at all: it is written beside its place and renamed. Every
    process of a multi-host run must call this; the first one writes.

    Args:
      params: weights, sharded or not; or `Stored` ones, which are never whole in memory.
      tokenizer_folder: where to copy tokenizer files from, unchanged.
      config_folder: where to keep config.json and generation_config.json from, unknown keys
        included; None: config.json is made from the model. Its dtype is mended where none of the
        tensors has it.
      dtype: what to store; None means the parameters' own. What was loaded in fp32 from bf16 and
        is stored as bf16 has its original bits.
      eos_ids, bos_id, pad_id: for config.json and generation_config.json, where they do not name
        such ids already.
      valid_vocab: ids that the tokenizer knows. Where generation_config.json is made here it
        suppresses the others, of rows that only fill up the embedding, as rollouts do.
      max_shard_bytes: size above which the weights go to several files with an index.
      overwrite: replace an existing folder, all of it.
      checksums: write SHA256SUMS, which `load_hf` and `sha256sum -c` compare with.

    Raises:
      UserError: the folder exists and `overwrite` is not set, or there is no tokenizer to copy.
    """
    folder = Path(folder).absolute()
    problems = []
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(f"{folder}: exists and is not empty; choose another, or pass overwrite")
    tokenizer = [Path(tokenizer_folder) / n for n in TOKENIZER_FILES] if tokenizer_folder else []
    tokenizer = [file for file in tokenizer if file.is_file()]
    if tokenizer_folder and not tokenizer:
        problems.append(f"{tokenizer_folder}: no tokenizer files found; give the folder with them")
    if problems:
        raise UserError(*problems)
    special: dict[str, Any] = {
        "bos_token_id": bos_id,
        "eos_token_id": list(eos_ids) if len(eos_ids) != 1 else eos_ids[0],
        "pad_token_id": pad_id,
    }
    special = {k: v for k, v in special.items() if v not in (None, [])}
    with whole_folder(folder) as partial:
        stored, sums = _write_weights(partial, model, params, dtype, max_shard_bytes, checksums)
        if processes.is_first():
            source = Path(config_folder) if config_folder else None
            beyond = list(range(valid_vocab or model.config.vocab_size, model.config.vocab_size))
            _write_configs(partial, model.config, source, special, beyond, stored)
            for file in tokenizer:
                shutil.copyfile(file, partial / file.name)
            if checksums:
                write_sums(partial, sums)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in that becomes `folder`, or vanishes where an error ends the context.

    Every process must enter and leave it; all see the same folder, which the first one makes and
    renames. An existing `folder` goes once the new one is complete.
    """
    folder = folder.absolute()
    # Runs that share a cache may write the same folder at the same time, each beside it.
    own = int(processes.gather(np.array(os.getpid()))[0])
    partial = folder.with_name(f".{folder.name}.partial-{own}")
    writer = processes.is_first()
    if writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.barrier(f"made {partial}")
    try:
        yield partial
        processes.barrier(f"written {partial}")
        if writer:
            old = folder.with_name(f".{folder.name}.old-{own}")
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
    processes.barrier(f"renamed {partial}")


def _write_configs(
    folder: Path,
    model: ModelConfig,
    source: Path | None,
    special: dict[str, Any],
    beyond: list[int],
    stored: list[str],
) -> None:
    """config.json and generation_config.json.

    Args:
      beyond: ids that are nothing.
      stored: names of the tensors' dtypes, that of most bytes first.
    """
    content = read_json(source / CONFIG) if source else model.to_hf()
    before = dict(content)
    kept = source / GENERATION if source and (source / GENERATION).is_file() else None
    if not kept and "eos_token_id" not in content:
        content |= special
    key = "dtype" if "dtype" in content else "torch_dtype"
    if content.get(key) not in stored:
        content[key] = stored[0]
    if source and content == before:
        shutil.copyfile(source / CONFIG, folder / CONFIG)
    else:
        write_json(folder / CONFIG, content)
    if kept:
        shutil.copyfile(kept, folder / GENERATION)
    else:
        never = {"suppress_tokens": beyond} if beyond else {}
        write_json(folder / GENERATION, special | never)


def _write_weights(
    folder: Path, model: Decoder, params: Params, dtype: Any, max_bytes: int, hashed: bool
) -> tuple[list[str], dict[str, str]]:
    """Write the safetensors files.

    Returns:
      The names of their dtypes, that of most bytes first; and the files' SHA-256 by name.
    """
    leaves = {path_name(p): v for p, v in jax.tree_util.tree_leaves_with_path(params)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    rows = table_rows(model.config, shapes)
    files: list[list[_Tensor]] = [[]]  # greedily cut
    weight = dict.fromkeys(DTYPES.values(), 0)
    for path, row in rows.items():
        kind = np.dtype(jnp.dtype(leaves[path].dtype if dtype is None else dtype))
        for layer, name in enumerate(row.tensors(model.config.num_layers)):
            tensor = _Tensor(name, path, layer if row.stacked else None, row.hf_shape, kind)
            if files[-1] and sum(t.bytes for t in files[-1]) + tensor.bytes > max_bytes:
                files.append([])
            files[-1].append(tensor)
            weight[kind] += tensor.bytes
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}
    for i, content in enumerate(files):
        name = WEIGHTS if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in content}
        sums[name] = _write_file(folder / name, content, rows, leaves, hashed)
    if len(files) > 1 and processes.is_first():
        index = {"metadata": {"total_size": sum(weight.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    kinds = [kind for kind in weight if weight[kind]]
    return [kind.name for kind in sorted(kinds, key=lambda k: -weight[k])], sums


def _write_file(
    file: Path,
    content: list[_Tensor],
    rows: dict[str, Row],
    leaves: dict[str, Any],
    hashed: bool,
) -> str:
    """One safetensors file; its SHA-256, taken as it is written, or "" if that is not asked for.

    The library's own writer wants all its tensors in memory at once. The format:
    https://huggingface.co/docs/safetensors#format.
    """
    # Wide dtypes first, as the library does, so that every tensor is aligned.
    content = sorted(content, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in content:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer = processes.is_first()
    with file.open("wb") if writer else contextlib.nullcontext() as opened:
        out = HashedFile(opened, hashed) if opened else None
        if out:
            out.write(len(text).to_bytes(8, "little") + text)
        parts = _Parts(leaves)
        for tensor in content:
            for block in parts.take(tensor.path, tensor.layer):  # every process: it may gather
                if out:
                    out.write(_bytes(rows[tensor.path], block, tensor.dtype))
        return out.hexdigest() if out else ""


class _Parts:
    """The parameters layer by layer, on the host; a stored one a group of layers at a time."""

    def __init__(self, leaves: dict[str, Any]):
        self._leaves = leaves
        self._path, self._layers, self._block = "", range(0), np.empty(0)

    def take(self, path: str, layer: int | None) -> Iterator[np.ndarray]:
        """One layer of a parameter, or all of it by pieces; every process must call."""
        array = self._leaves[path]
        if isinstance(array, jax.Array | np.ndarray):
            yield _fetch(array, layer)
            return
        rest = [slice(None)] * (len(array.shape) - 1)
        if layer is None:
            for part in pieces(array.shape[0], array.piece):
                yield array.read([part, *rest])
            return
        if path != self._path or layer not in self._layers:
            start = layer // array.piece * array.piece
            self._layers = range(start, min(start + array.piece, array.shape[0]))
            self._block = np.empty(0)  # let go before the next one is read
            self._block = array.read([slice(start, self._layers.stop), *rest])
            self._path = path
        yield self._block[layer - self._layers.start]


class _OnDevices:
    """A stacked parameter on devices as a `Stored` one: a layer at a time goes to the host."""

    piece = 1

    def __init__(self, array: jax.Array):
        self._array, self.shape, self.dtype = array, array.shape, np.dtype(array.dtype)

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """The block `index`; across hosts every process must call."""
        layers = range(*index[0].indices(self.shape[0]))
        return np.stack([_fetch(self._array, layer)[tuple(index[1:])] for layer in layers])


def merged_leaves(model: Decoder, params: Params) -> Params:
    """What `save_hf` takes for weights with adapters: kernels merged one by one as it writes them.

    Args:
      model: without adapters nothing is done.
    """
    if model.lora is None:
        return params
    adapters, base = split(params)
    host = jax.tree.map(lambda x: _fetch(x, None), adapters)
    kernels = jax.tree.map(
        lambda x: _OnDevices(x) if isinstance(x, jax.Array) and x.ndim > 2 else x, base
    )
    return merged_stored(kernels, host, model.lora.scale)


def _bytes(row: Row, block: np.ndarray, dtype: np.dtype) -> memoryview:
    """A tensor, or some first rows of one that is not stacked: there our axes are its own."""
    data = row.write(block, dtype) if row.stacked else np.ascontiguousarray(block, dtype)
    return data.reshape(-1).view(np.uint8).data


def _fetch(array: Any, layer: int | None) -> np.ndarray:
    """An array, or one layer of it, on the host; across hosts every process must call."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if layer is None else array[layer])
    if layer is not None:
        array = _layer_of(array, np.int32(layer))
    if not array.is_fully_addressable:
        array = _replicate(array.sharding.mesh)(array)
    return np.asarray(array)


@jax.jit
def _layer_of(array: jax.Array, layer: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


@functools.lru_cache(maxsize=8)
def _replicate(mesh: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
