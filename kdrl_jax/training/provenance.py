"""What a run was made of, each time it was started: versions, code, models, data."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import kdrl_jax
from kdrl_jax.config import ROOT, digest
from kdrl_jax.models.checksums import SUMS, digest_of
from kdrl_jax.own_functions import is_here, source_digest
from kdrl_jax.training.locate import PROVENANCE, model_name
from kdrl_jax.training.roles import model_folder
from kdrl_jax.training.storage import write_atomic

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


def add_provenance(
    workdir: Path,
    config: ConfigDict,
    models: Mapping[str, Path],
    data: Mapping[str, Any],
    devices: Mapping[str, Any],
) -> None:
    """Add this start to `workdir/provenance.json`, unless it is as the one before.

    Args:
      models: the folders of the models that are read, by config key.
      data: the run's data report; of the hub's data sets the commits are taken.
      devices: what they are, and what was chosen for them.
    """
    file = workdir / PROVENANCE
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        starts = []
    sources = {what: found for what, found in data.items() if "commit" in found}
    start = {
        "kdrl_jax": {"version": kdrl_jax.__version__, "commit": code_commit()},
        "python": platform.python_version(),
        **devices,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "config": digest(config.to_dict()),
        "models": {
            key.removesuffix(".path"): model_facts(folder) for key, folder in models.items()
        },
        "data": {k: {"path": v["path"], "commit": v["commit"]} for k, v in sources.items()},
    }
    if own := own_code(config):
        start["own_code"] = own
    if not starts or starts[-1] != start:
        write_atomic(file, json.dumps([*starts, start], indent=2) + "\n")


def own_code(config: ConfigDict) -> dict[str, str]:
    """The SHA-256 of each file of the user's own that the config names by 'module:…'."""
    names = [str(name) for name in config.reward.functions]
    names += [name for name in (config.data.task, config.data.prompt_style) if ":" in name]
    given = [("reward.functions", str(name).partition("*")[0]) for name in config.reward.functions]
    given.append(("data.prompt_style", config.data.prompt_style))
    found = {name: source_digest(key, name) for key, name in given if is_here(name)}
    for module in sorted({name.partition(":")[0] for name in names} & sys.modules.keys()):
        file = getattr(sys.modules[module], "__file__", None)
        if file and Path(file).is_file():
            found[module] = digest_of(Path(file))
    return found


def model_facts(folder: Path) -> dict[str, str]:
    """A model's folder, or its name and commit on the hub, and the SHA-256 of its config.json and,
    if it has one, its SHA256SUMS.
    """
    found = {"path": model_name(folder)}
    for file in (model_folder(folder) / "config.json", folder / SUMS):
        if file.is_file():
            found[file.name] = digest_of(file)
    return found


def code_commit() -> str:
    """The commit of the checkout that runs, with '+changes' if it has any; "" outside of one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != ROOT:  # installed within another project's checkout
        return ""
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", "kdrl_jax")
    return git("rev-parse", "HEAD") + ("+changes" if dirty else "")
