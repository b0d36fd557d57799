"""Weights alone in a run's folder: found, compared with what was saved, restored and written."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from kdrl_jax.models import hf_table
from kdrl_jax.models.hf_files import limit_lines
from kdrl_jax.sharding import path_name
from kdrl_jax.training.integrity import (
    CHECKSUMS,
    Damaged,
    checksums,
    compare,
    read_meta,
    seal,
    shapes_of,
)
from kdrl_jax.training.storage import storage_explained
from kdrl_jax.training.streaming import damaged, open_stored
from kdrl_jax.types import Params, UserError


def save_params(folder: Path, params: Params) -> None:
    """Write weights alone as checkpoint 0 of a run folder; blocks. Every process must call."""
    where = (folder / "checkpoints").resolve()
    meta = seal({"step": 0, CHECKSUMS: checksums({"params": params})})
    with storage_explained(where), ocp.CheckpointManager(where) as manager:
        parts = {"params": by_layer(params), "meta": ocp.args.JsonSave(meta)}
        manager.save(0, args=ocp.args.Composite(**parts))


def restore_params(folder: Path, like: Params, step: int | None = None) -> Params:
    """The weights of a run folder, in the shapes, dtypes and shardings of `like`.

    Each process reads what its own devices hold, shard by shard, and casts it there once it has
    been compared with the checksums that were saved with it.

    Args:
      step: which checkpoint; None: the newest.

    Raises:
      UserError: no checkpoint there, a damaged one, or one of another model.
    """
    step, stored = find_params(folder, like, step)
    # Read together at most twice the largest parameter: what is on its way is held by the host.
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(stored))
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + 2 * largest // 10**9)
    where = (folder / "checkpoints").resolve()
    with ocp.CheckpointManager(where, item_handlers={"params": handler}) as manager:

        def read(tree: Params) -> Params:
            how = ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(_restore_args, tree))
            return manager.restore(step, args=ocp.args.Composite(params=how)).params

        try:
            saved = (read_meta(where / str(step)) or {}).get(CHECKSUMS)
            return _read_and_compare(read, like, saved) if saved else read(like)
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:  # Orbax raises bare ones where a file cannot be read
            raise UserError(damaged(where / str(step), error)) from error


def _read_and_compare(
    read: Callable[[Params], Params], like: Params, saved: Mapping[str, Sequence[Any]]
) -> Params:
    """All at once where nothing is cast; else array by array, cast when it has been compared."""
    kinds = [jnp.dtype(saved[name][1]) for name in shapes_of({"params": like})]
    leaves, tree = jax.tree.flatten(like)
    if kinds == [leaf.dtype for leaf in leaves]:
        params = read(like)
        compare(saved, {"params": params})
        return params
    found = []
    for i, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True)):
        alone = [ocp.PLACEHOLDER] * len(leaves)
        alone[i] = leaf.update(dtype=kind)
        part = read(jax.tree.unflatten(tree, alone))
        part = jax.tree.map(lambda x: None if x is ocp.PLACEHOLDER else x, part)
        compare(saved, {"params": part})
        found.append(jax.tree.leaves(part)[0].astype(leaf.dtype))
    return jax.tree.unflatten(tree, found)


def _restore_args(x: Any) -> ocp.RestoreArgs:
    if x is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)


def split_step(path: Path) -> tuple[Path, int | None]:
    """(RUN, STEP) of RUN/checkpoints/STEP; (RUN, None) of RUN/checkpoints and of RUN."""
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return (path.parent if path.name == "checkpoints" else path), None


def is_run(folder: Path) -> bool:
    """Whether a folder with weights is a run's; else it is a Hugging Face model's."""
    return (folder / "checkpoints").is_dir()


def find_params(folder: Path, shapes: Params, step: int | None = None) -> tuple[int, Params]:
    """The step and the opened weights of a run folder's checkpoint, compared with `shapes`.

    Args:
      shapes: what the weights must be, by shape; dtypes may differ.
      step: which checkpoint; None: the newest.

    Raises:
      UserError: no checkpoint there, an incomplete one, or one of another model.
    """
    where = (folder / "checkpoints").resolve()
    if not is_run(folder):
        raise UserError(f"{folder}: holds no checkpoints/ folder; give a run's folder")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with ocp.CheckpointManager(where, options=ocp.CheckpointManagerOptions(read_only=True)) as m:
        steps = sorted(m.all_steps())
    if not steps:
        raise UserError(f"{where}: holds no whole checkpoint; let the run reach its first save")
    if step not in (None, *steps):
        raise UserError(f"{where}: holds no checkpoint {step}; there are {steps}")
    step = steps[-1] if step is None else step
    try:
        return step, open_params(where / str(step), shapes)
    except Damaged as error:
        raise UserError(damaged(where / str(step), error)) from error


def open_params(at: Path, shapes: Params) -> Params:
    """The opened weights of a checkpoint.

    Raises:
      Damaged: they cannot be opened.
      UserError: there are none, or those of another model.
    """
    if not (at / "params").is_dir():
        raise UserError(f"{at}: holds no params/; give a checkpoint that a run or convert wrote")
    try:
        stored = open_stored(at.parent.parent, int(at.name))
    except Exception as error:
        raise Damaged(str(error)) from error
    wanted = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(shapes)}
    found = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(stored)}
    problems = [
        f"{at}: {name} is {'missing' if name in wanted else 'surplus'}; "
        "use the config.json that belongs to the checkpoint"
        for name in sorted(wanted.keys() ^ found.keys())
    ]
    problems += [
        f"{at}: {name} has shape {list(found[name].shape)}, config.json asks for "
        f"{list(wanted[name].shape)}; use the config.json that belongs to the checkpoint"
        for name in sorted(wanted.keys() & found.keys())
        if tuple(wanted[name].shape) != found[name].shape
    ]
    if problems:
        raise UserError(*limit_lines(problems))
    return stored


def by_layer(params: Params) -> Any:
    """Saves large stacks of layers in chunks of one, so that one can be read without the others."""

    def one(path: Any, x: Any) -> ocp.SaveArgs:
        large = path_name(path).startswith("layers/") and x.nbytes > hf_table.PIECE_BYTES
        return ocp.SaveArgs(shard_axes=(0,) if large else ())

    return ocp.args.StandardSave(params, jax.tree_util.tree_map_with_path(one, params))


def abstract_params(model: Any, shardings: Any, dtype: Any = jnp.float32) -> Params:
    """Shapes of a model's weights with shardings, to restore into as `dtype`, or a tree of them."""
    dtypes = dtype if isinstance(dtype, dict) else jax.tree.map(lambda _: dtype, shardings)
    return jax.tree.map(
        lambda x, s, kind: jax.ShapeDtypeStruct(x.shape, kind, sharding=s),
        model.shapes(),
        shardings,
        dtypes,
    )
