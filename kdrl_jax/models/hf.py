"""Hugging Face checkpoints: read straight into shards, and written back bit for bit. No torch.

Names and axes come from the one table in `kdrl_jax.models.hf_table`, both ways.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kdrl_jax.models.config import ModelConfig
from kdrl_jax.models.hf_table import IGNORED, Row, table_rows
from kdrl_jax.models.qwen import Decoder
from kdrl_jax.sharding import param_shardings, path_name
from kdrl_jax.types import Params, UserError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "BF16", "F16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_LISTED = 20


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The model that `folder`'s config.json describes.

    Raises:
      UserError: there is no such file, or it asks for something that this decoder does not do.
    """
    file = Path(folder) / "config.json"
    return ModelConfig.from_hf(_read_json(file), source=str(file))


def load_eos_ids(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """Token ids that end a response: of generation_config.json, else of config.json; or ()."""
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        ids = _read_json(file).get("eos_token_id") if file.exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def load_hf(
    folder: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
) -> tuple[Decoder, Params]:
    """Load a checkpoint folder: config.json, and safetensors whole or sharded with an index.

    Every shard is read from the file, cast and put on its device by itself: at no time is more
    than one shard of one parameter held on the host, nor any parameter unsharded.

    Args:
      folder: what `transformers` writes with `save_pretrained`.
      mesh: devices to load onto; None means the default device.
      dtype: of the parameters.
      compute_dtype, remat: of the model, see `Decoder`.

    Returns:
      (model, params).

    Raises:
      UserError: files are missing or unreadable, or tensors are missing, surplus or misshapen, or
        a mesh axis does not divide a weight; all such tensors by name, at once.
    """
    folder = Path(folder)
    model = Decoder(load_config(folder), dtype=compute_dtype, remat=remat)
    shapes = model.shapes()
    rows = table_rows(model.config, shapes)
    device = jax.devices()[0] if mesh is None else None
    shardings = (
        jax.tree.map(lambda _: SingleDeviceSharding(device), shapes)
        if mesh is None
        else param_shardings(mesh, shapes)
    )
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_tensors(folder, model.config, rows, tensors)

        def load(path: Any, leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
            name = path_name(path)
            row = rows[name]
            sources = [tensors[t] for t in row.tensors(model.config.num_layers)]
            return _load_sharded(row, sources, leaf.shape, sharding, jnp.dtype(dtype))

        return model, jax.tree_util.tree_map_with_path(load, shapes, shardings)


def save_hf(
    folder: str | os.PathLike[str],
    model: Decoder,
    params: Params,
    *,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    eos_ids: Sequence[int] = (),
    bos_id: int | None = None,
    pad_id: int | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder that `load_hf` and `transformers` read.

    The folder appears complete or not at all: it is written beside its place and renamed. Every
    process of a multi-host run must call this; the first one writes.

    Args:
      params: weights, sharded or not.
      tokenizer_folder: where to copy tokenizer files from, unchanged.
      dtype: what to store; None means the parameters' own. What was loaded in fp32 from bf16 and
        is stored as bf16 has its original bits.
      eos_ids, bos_id, pad_id: for config.json and generation_config.json.
      max_shard_bytes: size above which the weights go to several files with an index.
      overwrite: replace an existing folder, all of it.

    Raises:
      UserError: the folder exists and `overwrite` is not set, or there is no tokenizer to copy.
    """
    folder = Path(folder)
    problems = []
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(f"{folder}: exists and is not empty; choose another, or pass overwrite")
    tokenizer = [Path(tokenizer_folder) / n for n in TOKENIZER_FILES] if tokenizer_folder else []
    tokenizer = [file for file in tokenizer if file.is_file()]
    if tokenizer_folder and not tokenizer:
        problems.append(f"{tokenizer_folder}: no tokenizer files found; give the folder with them")
    if problems:
        raise UserError(*problems)

    writer = jax.process_index() == 0
    partial = folder.absolute().with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        if writer:
            partial.mkdir(parents=True)
        stored = _write_weights(partial, model, params, dtype, max_shard_bytes, writer)
        if writer:
            eos = list(eos_ids) if len(eos_ids) != 1 else eos_ids[0]
            special = {"bos_token_id": bos_id, "eos_token_id": eos, "pad_token_id": pad_id}
            special = {k: v for k, v in special.items() if v not in (None, [])}
            config = model.config.to_hf() | special | {"torch_dtype": stored}
            _write_json(partial / "config.json", config)
            _write_json(partial / "generation_config.json", special)
            for file in partial.glob("*.safetensors"):  # which safetensors leaves 0600
                shutil.copymode(partial / "config.json", file)
            for file in tokenizer:
                shutil.copyfile(file, partial / file.name)
            _replace_folder(partial, folder.absolute())
    finally:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_hf {folder}")


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Lazy slices of all tensors in `folder` by name; the files close with `stack`."""
    listed: dict[str, str] = {}
    if (folder / INDEX).is_file():
        listed = _read_json(folder / INDEX).get("weight_map") or {}
        files = sorted(set(listed.values()))
    elif (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        raise UserError(
            f"{folder}: neither {WEIGHTS} nor {INDEX} found; save the checkpoint as safetensors"
        )
    problems = []
    for file in files:
        # Checked by the name, not by what it links to: download caches link to blobs elsewhere.
        parts = PurePosixPath(file).parts
        if ".." in parts or PurePosixPath(file).is_absolute() or "\\" in file or ":" in file:
            problems.append(f"{folder / INDEX}: file {file!r} lies outside the folder; refused")
        elif not (folder / file).is_file():
            problems.append(f"{folder / file}: missing, but listed in {INDEX}; download it again")
    if problems:
        raise UserError(*problems)

    tensors: dict[str, Any] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(folder / file, framework="np"))
        except (SafetensorError, OSError) as error:
            problems.append(f"{folder / file}: unreadable ({error}); download it again")
            continue
        for name in handle.keys():  # noqa: SIM118  (not a dict)
            if name in tensors:
                problems.append(f"{folder / file}: {name} is in another file as well; keep one")
            tensors[name] = handle.get_slice(name)
    absent = [n for n in listed if n not in tensors] if not problems else []
    problems += _limit([f"{folder / INDEX}: {n} is listed but in no file" for n in absent])
    if problems:
        raise UserError(*problems)
    return tensors


def _check_tensors(
    folder: Path, config: ModelConfig, rows: dict[str, Row], tensors: dict[str, Any]
) -> None:
    """Raises UserError unless `tensors` are exactly those of `rows`, in shape and kind."""
    expected = {t: row.hf_shape for row in rows.values() for t in row.tensors(config.num_layers)}
    missing = [
        f"{folder}: {name} is missing; expected shape {list(shape)} by config.json"
        for name, shape in expected.items()
        if name not in tensors
    ]
    surplus = []
    for name in tensors:
        if name in expected or IGNORED.fullmatch(name):
            continue
        if name != HEAD or not config.tie_embeddings:
            surplus.append(f"{folder}: {name} is surplus; config.json describes no such tensor")
        elif EMBEDDING in tensors and not _same(tensors[HEAD], tensors[EMBEDDING]):
            surplus.append(
                f"{folder}: {HEAD} differs from {EMBEDDING}, but config.json ties them; "
                "set tie_word_embeddings to false"
            )
    misshapen = []
    for name, shape in expected.items():
        if name not in tensors:
            continue
        found = tuple(tensors[name].get_shape())
        if found != shape:
            misshapen.append(
                f"{folder}: {name} has shape {list(found)}; config.json asks for {list(shape)}"
            )
        kind = tensors[name].get_dtype()
        if kind not in DTYPES:
            misshapen.append(f"{folder}: {name} is {kind}; supported: {', '.join(DTYPES)}")
    problems = _limit(missing) + _limit(surplus) + _limit(misshapen)
    if problems:
        raise UserError(*problems)


def _same(a: Any, b: Any, rows: int = 4096) -> bool:
    """Whether two [V, D] slices hold the same bits, without reading either whole."""
    if a.get_shape() != b.get_shape() or a.get_dtype() != b.get_dtype():
        return False
    size = a.get_shape()[0]
    parts = [slice(start, min(start + rows, size)) for start in range(0, size, rows)]
    return all(a[part].tobytes() == b[part].tobytes() for part in parts)


def _load_sharded(
    row: Row, sources: list[Any], shape: tuple[int, ...], sharding: Any, dtype: np.dtype
) -> jax.Array:
    """One parameter, block by block; a block that several devices hold is read once."""
    stacked = len(shape) > len(row.axes)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(spans, []).append(device)
    arrays = []
    for spans, devices in holders.items():
        block = np.empty([stop - start for start, stop in spans], dtype)
        index = [slice(*span) for span in spans]
        if stacked:
            for i, source in enumerate(sources[index[0]]):
                block[i] = row.read(source, index[1:])
        else:
            block[...] = row.read(sources[0], index)
        arrays += [jax.device_put(block, device) for device in devices]
        jax.block_until_ready(arrays)  # or transfers queue up, each holding its block
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _write_weights(
    folder: Path, model: Decoder, params: Params, dtype: Any, max_bytes: int, writer: bool
) -> str:
    """Write the safetensors files, one in memory at a time; returns the name of their dtype."""
    config = model.config
    rows = table_rows(config, jax.eval_shape(lambda: params))
    leaves = {path_name(p): v for p, v in jax.tree_util.tree_leaves_with_path(params)}
    stored = jnp.dtype(next(iter(leaves.values())).dtype if dtype is None else dtype)
    # (tensor, path, layer or None, bytes), greedily cut into files.
    files: list[list[tuple[str, str, int | None]]] = [[]]
    held = total = 0
    for path, row in rows.items():
        size = math.prod(row.hf_shape) * stored.itemsize
        stacked = "{layer}" in row.tensor
        for layer, tensor in enumerate(row.tensors(config.num_layers)):
            if files[-1] and held + size > max_bytes:
                files.append([])
                held = 0
            files[-1].append((tensor, path, layer if stacked else None))
            held += size
            total += size
    weight_map: dict[str, str] = {}
    for i, content in enumerate(files):
        name = WEIGHTS if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _, _ in content}
        tensors = {}
        for tensor, path, at in content:
            array = _fetch(leaves[path], at)
            if writer:
                tensors[tensor] = rows[path].write(array.astype(stored))
        if writer:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if writer and len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)
    return stored.name


def _fetch(array: jax.Array, layer: int | None) -> np.ndarray:
    """An array, or one layer of it, on the host; across hosts every process must call."""
    part = array if layer is None else array[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    return np.asarray(part)


def _replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`; an existing target goes once the new one is complete."""
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)


def _limit(problems: list[str]) -> list[str]:
    """The first MAX_LISTED lines, and how many more there are."""
    more = len(problems) - MAX_LISTED
    return problems if more <= 0 else [*problems[:MAX_LISTED], f"... and {more} more like these"]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object at the top")
        return content
    except OSError:
        raise UserError(
            f"{file}: not found; give a folder with config.json and safetensors"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
