"""Checkpoints of the whole state with Orbax, written while training goes on.

A run's folder holds `checkpoints/STEP/{params,opt_state,meta}` and, so that nothing else is needed
to use the weights, `model/` with the Hugging Face config and the tokenizer.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kdrl_jax import processes
from kdrl_jax.training import tensorstore_leaks
from kdrl_jax.training.integrity import (
    CHECKSUMS,
    META,
    Damaged,
    checksums,
    compare,
    compare_shapes,
    read_meta,
    seal,
)
from kdrl_jax.training.run_weights import by_layer, open_params
from kdrl_jax.training.storage import storage_explained, storage_problem, sync_folder
from kdrl_jax.types import TrainState, UserError


class CheckpointStore:
    """Saves and restores TrainStates under `workdir/checkpoints`.

    A folder that is named by a number is a checkpoint that was once whole: they appear and go by
    renaming. Old ones go only after a newer one has been written.

    Args:
      workdir: the run's folder.
      keep: how many of the latest checkpoints stay.
    """

    def __init__(self, workdir: Path, keep: int = 3):
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        tensorstore_leaks.avoid()
        self.folder = (workdir / "checkpoints").resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,
        )
        with storage_explained(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._sweep()
        with processes.together():
            if not stored_steps(self.folder) and (found := set_aside(self.folder)):
                raise UserError(
                    f"{self.folder}: holds no whole checkpoint, only {', '.join(found)}; use "
                    "another --workdir, or remove them to begin anew"
                )

    def latest_step(self) -> int | None:
        """The newest checkpoint; None where there is none."""
        return max(stored_steps(self.folder), default=None)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Start writing; the arrays are copied to the host before this returns.

        Args:
          step: number of updates made.
          meta: JSON-able: seed, data position.

        Raises:
          UserError: the storage fails, or has failed while the last one was written.
        """
        self.wait()
        if step in stored_steps(self.folder):
            return
        meta = meta | {CHECKSUMS: checksums(_parts(state))}
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=by_layer(state.params),
                    opt_state=ocp.args.StandardSave((state.step, state.opt_state)),
                    meta=ocp.args.JsonSave(seal(meta)),
                ),
            )

    def restore(
        self, like: TrainState, say: Callable[[str], None] = print
    ) -> tuple[TrainState, dict[str, Any]]:
        """The newest whole state, in the shapes, dtypes and shardings of `like`, and its meta.

        One that is damaged is set aside under another name, once an older one has been read.

        Args:
          say: told what is damaged and what is read instead.

        Raises:
          UserError: all checkpoints are damaged, or the newest readable one is of another model.
        """
        wrong: dict[int, str] = {}
        for step in sorted(stored_steps(self.folder), reverse=True):
            where = self.folder / str(step)
            found, problem = self._try(step, like)
            if processes.any_of(bool(problem)):
                wrong[step] = problem or "another process cannot read it"
                del found
                continue
            assert found
            for bad, reason in wrong.items():
                name = self._set_aside(bad)
                say(f"{self.folder / str(bad)}: damaged ({reason}); kept as {name}")
            if wrong:
                say(f"falling back to the checkpoint of step {step}")
            if CHECKSUMS not in found[1]:
                say(f"{where}: was written without checksums, so damage to it may go unseen")
            return found
        raise UserError(
            *(f"{self.folder / str(step)}: damaged ({why})" for step, why in wrong.items()),
            f"{self.folder}: no checkpoint can be read; copy one back, or use another --workdir",
        )

    def _try(
        self, step: int, like: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """A checkpoint's state and meta, or what is wrong with it."""
        where = self.folder / str(step)
        try:
            meta = read_meta(where)
            if meta is None or meta["step"] != step:
                raise Damaged(f"holds no {META} of this step")
            if CHECKSUMS in meta:
                compare_shapes(where, meta[CHECKSUMS], _parts(like))
            elif not (where / "params").is_dir():
                raise Damaged("holds no params/")
            else:
                open_params(where, like.params)
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(like.params),
                    opt_state=ocp.args.StandardRestore((like.step, like.opt_state)),
                ),
            )
            count, opt_state = found.opt_state
            state = TrainState(count, found.params, opt_state)
            if CHECKSUMS in meta:
                compare(meta[CHECKSUMS], _parts(state))
            return (state, meta), ""
        except (jax.errors.JaxRuntimeError, MemoryError, UserError):
            raise
        except Exception as error:  # Orbax raises bare ones where a file cannot be read
            return None, " ".join(str(error).split())[:200] or type(error).__name__

    def _set_aside(self, step: int) -> str:
        """Rename a checkpoint so that nobody takes it for one; returns the new name."""
        taken, name = set_aside(self.folder), f"{ASIDE}{step}"
        while name in taken:
            name += "_again"
        processes.barrier(f"choose {name}")

        def rename() -> None:
            with storage_explained(self.folder):
                (self.folder / str(step)).rename(self.folder / name)
                sync_folder(self.folder)

        processes.first_does(rename)
        self._manager.reload()
        return name

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
          UserError: the storage failed.
        """
        with self._explained():
            self._manager.wait_until_finished()
        sync_folder(self.folder)
        self._sweep()

    def close(self) -> None:
        """Wait for writes under way.

        Raises:
          UserError: the storage failed.
        """
        self.wait()
        self._manager.close()

    def _sweep(self) -> None:
        """Remove the files of checkpoints that were renamed for it."""
        if processes.is_first():
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if problem := storage_problem(error, self.folder):
                raise UserError(problem, self.newest()) from error
            raise

    def newest(self) -> str:
        """A line about what a run that ends here can continue from."""
        steps = stored_steps(self.folder)
        return f"{self.folder}: " + (
            f"the newest whole checkpoint is step {max(steps)}"
            if steps
            else "no checkpoint has been written yet"
        )


DELETED = ".deleted"
"""Where old checkpoints are moved to before their files are removed one by one."""
ASIDE = "damaged_"
"""Begins the name of a checkpoint that was found damaged."""


def stored_steps(folder: Path) -> list[int]:
    """The steps that are in a `checkpoints` folder, whole when they were written."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def set_aside(folder: Path) -> list[str]:
    """The names of damaged checkpoints in a `checkpoints` folder."""
    return sorted(p.name for p in folder.glob(f"{ASIDE}*"))


def _parts(state: TrainState) -> dict[str, Any]:
    """A state as the tree that checksums are taken of."""
    return {"params": state.params, "opt_state": (state.step, state.opt_state)}
