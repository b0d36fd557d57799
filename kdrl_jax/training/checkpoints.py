"""Checkpoints of the whole state with Orbax, written while training goes on.

A run's folder holds `checkpoints/STEP/{params,opt_state,meta}` and, so that nothing else is needed
to use the weights, `model/` with the Hugging Face config and the tokenizer.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from kdrl_jax.models import hf_table
from kdrl_jax.models.hf_files import limit_lines
from kdrl_jax.sharding import path_name
from kdrl_jax.training.streaming import damaged, open_stored
from kdrl_jax.types import Params, TrainState, UserError


class CheckpointStore:
    """Saves and restores TrainStates under `workdir/checkpoints`.

    Args:
      workdir: the run's folder.
      keep: how many of the latest checkpoints stay.
    """

    def __init__(self, workdir: Path, keep: int = 3):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = (workdir / "checkpoints").resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Start writing; the arrays are copied to the host before this returns.

        Args:
          step: number of updates made.
          meta: JSON-able: seed, data position.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=_by_layer(state.params),
                opt_state=ocp.args.StandardSave((state.step, state.opt_state)),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, in the shapes, dtypes and shardings of `like`, and its meta.

        Raises:
          UserError: the checkpoint is damaged, or of another model.
        """
        step = self.latest_step()
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(like.params),
                    opt_state=ocp.args.StandardRestore((like.step, like.opt_state)),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:  # Orbax raises bare ones where a file cannot be read
            reason = str(error).splitlines()[0][:300]
            raise UserError(
                f"{self.folder}/{step}: does not fit this model ({reason}); "
                "use the config that made it or another --workdir, or remove a damaged step"
            ) from error
        count, opt_state = found.opt_state
        return TrainState(count, found.params, opt_state), found.meta

    def close(self) -> None:
        """Wait for writes under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(folder: Path, params: Params) -> None:
    """Write weights alone as checkpoint 0 of a run folder; blocks. Every process must call."""
    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
        manager.save(0, args=ocp.args.Composite(params=_by_layer(params)))


def restore_params(folder: Path, like: Params, step: int | None = None) -> Params:
    """The weights of a run folder, in the shapes, dtypes and shardings of `like`.

    Each process reads what its own devices hold, shard by shard, and casts it there.

    Args:
      step: which checkpoint; None: the newest.

    Raises:
      UserError: no checkpoint there, a damaged one, or one of another model.
    """
    step, stored = find_params(folder, like, step)
    # Read together at most twice the largest parameter: what is on its way is held by the host.
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(stored))
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=1 + 2 * largest // 10**9)
    where = (folder / "checkpoints").resolve()
    with ocp.CheckpointManager(where, item_handlers={"params": handler}) as manager:
        try:
            args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
            return manager.restore(step, args=args).params
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:  # Orbax raises bare ones where a file cannot be read
            raise UserError(damaged(where / str(step), error)) from error


def find_params(folder: Path, shapes: Params, step: int | None = None) -> tuple[int, Params]:
    """The step and the opened weights of a run folder's checkpoint, compared with `shapes`.

    Args:
      shapes: what the weights must be, by shape; dtypes may differ.
      step: which checkpoint; None: the newest.

    Raises:
      UserError: no checkpoint there, an incomplete one, or one of another model.
    """
    where = (folder / "checkpoints").resolve()
    if not where.is_dir():
        raise UserError(f"{folder}: holds no checkpoints/ folder; give a run's folder")
    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.CheckpointManager(where, options=ocp.CheckpointManagerOptions(read_only=True)) as m:
        steps = sorted(m.all_steps())
    if not steps:
        raise UserError(f"{where}: holds no whole checkpoint; let the run reach its first save")
    if step not in (None, *steps):
        raise UserError(f"{where}: holds no checkpoint {step}; there are {steps}")
    step = steps[-1] if step is None else step
    at = where / str(step)
    if not (at / "params").is_dir():
        raise UserError(f"{at}: holds no params/; give a checkpoint that a run or convert wrote")
    try:
        stored = open_stored(folder, step)
    except Exception as error:
        raise UserError(damaged(at, error)) from error
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
    return step, stored


def _by_layer(params: Params) -> Any:
    """Saves large stacks of layers in chunks of one, so that one can be read without the others."""

    def one(path: Any, x: Any) -> ocp.SaveArgs:
        large = path_name(path).startswith("layers/") and x.nbytes > hf_table.PIECE_BYTES
        return ocp.SaveArgs(shard_axes=(0,) if large else ())

    return ocp.args.StandardSave(params, jax.tree_util.tree_map_with_path(one, params))


def abstract_params(model: Any, shardings: Any, dtype: Any = jnp.float32) -> Params:
    """Shapes of a model's weights with shardings, to restore into as `dtype`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
        model.shapes(),
        shardings,
    )
