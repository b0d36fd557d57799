"""Checkpoints of the whole state with Orbax, written while training goes on.

A run's folder holds `checkpoints/STEP/{params,opt_state,meta}` and, so that nothing else is needed
to use the weights, `model/` with the Hugging Face config and the tokenizer.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

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
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave((state.step, state.opt_state)),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, in the shapes, dtypes and shardings of `like`, and its meta.

        Raises:
          UserError: the checkpoint is of another model.
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
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0][:300]
            raise UserError(
                f"{self.folder}/{step}: does not fit this model ({reason}); "
                "use the config that made it or another --workdir"
            ) from error
        count, opt_state = found.opt_state
        return TrainState(count, found.params, opt_state), found.meta

    def close(self) -> None:
        """Wait for writes under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(folder: Path, params: Params) -> None:
    """Write weights alone as checkpoint 0 of a run folder; blocks."""
    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))


def restore_params(folder: Path, like: Params, step: int | None = None) -> Params:
    """The weights of a run folder, in the shapes and shardings of `like`.

    Args:
      step: which checkpoint; None: the newest.

    Raises:
      UserError: no checkpoint there, or of another model.
    """
    where = (folder / "checkpoints").resolve()
    if not where.is_dir():
        raise UserError(f"{folder}: holds no checkpoints/ folder; give a run's folder")
    with ocp.CheckpointManager(where) as manager:
        steps = manager.all_steps()
        if not steps:
            raise UserError(f"{where}: holds no whole checkpoint; let the run reach its first save")
        if step not in (None, *steps):
            raise UserError(f"{where}: holds no checkpoint {step}; there are {sorted(steps)}")
        step = max(steps) if step is None else step
        try:
            args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
            return manager.restore(step, args=args).params
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0][:300]
            raise UserError(f"{where}/{step}: does not fit model/config.json ({reason})") from error


def abstract_params(model: Any, shardings: Any, dtype: Any = jnp.float32) -> Params:
    """Shapes of a model's weights with shardings, to restore into as `dtype`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
        model.shapes(),
        shardings,
    )
