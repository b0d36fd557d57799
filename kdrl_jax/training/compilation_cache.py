"""Compiled programs, kept on disk."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from kdrl_jax.processes import is_first
from kdrl_jax.training.safety import own_folder
from kdrl_jax.training.storage import drop_torn_programs


def enable_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs under `folder`, so that a resumed run starts at once.

    Raises:
      UserError: anybody may write there; the programs are executed.
    """
    own_folder(folder, "cache_dir", make=False)
    found = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if found is None:
        jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").resolve()))
    if is_first():
        drop_torn_programs(Path(found) if found else folder / "compiled")
