"""Finding and loading the policy that is to be evaluated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdrl_jax.config import digest
from kdrl_jax.data import Tokenizer, load_tokenizer
from kdrl_jax.models import Decoder, ModelConfig
from kdrl_jax.models.hub import hub_model_of
from kdrl_jax.models.lora import join
from kdrl_jax.training.adapters import (
    frozen_dtypes,
    load_base,
    load_weights,
    read_record,
    restore_adapters,
)
from kdrl_jax.training.checkpoints import stored_steps
from kdrl_jax.training.display import Display
from kdrl_jax.training.locate import fetch_model, model_name
from kdrl_jax.training.roles import model_folder, read_model_config
from kdrl_jax.training.run_weights import split_step
from kdrl_jax.types import Params, UserError


@dataclasses.dataclass(frozen=True)
class PolicyFolder:
    """Where a policy's weights are: a Hugging Face folder, or a run's folder and a step."""

    folder: Path
    step: int | None
    """Which checkpoint of a run; None: the folder is a Hugging Face one."""

    def __str__(self) -> str:
        name = model_name(self.folder)
        return name if self.step is None else f"{name} (step {self.step})"

    @property
    def name(self) -> str:
        """A short name: the folder's, with the step of a run, or the hub's without the owner."""
        if model := hub_model_of(self.folder):
            return model.repo.partition("/")[2]
        return self.folder.resolve().name + (f"@{self.step}" if self.step else "")

    def digest(self) -> str:
        """Names the weights by the files' names, sizes and times, without reading them."""
        if model := hub_model_of(self.folder):
            return digest(str(model))
        where = self.folder
        where = where / "checkpoints" / str(self.step) if self.step is not None else where
        files = [p for p in sorted(where.rglob("*")) if p.is_file()]
        stats = [(str(p.relative_to(where)), p.stat()) for p in files]
        return digest([[name, s.st_size, s.st_mtime_ns] for name, s in stats])

    def shape(self) -> ModelConfig:
        """The model's shape, without its weights."""
        return read_model_config(self.folder)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that is kept with the model."""
        return load_tokenizer(model_folder(self.folder))


def find_policy(
    path: str | Path,
    option: str = "--checkpoint",
    *,
    offline: bool = False,
    display: Display | None = None,
) -> PolicyFolder:
    """Returns what `path` names: a Hugging Face folder, a run's folder (its newest checkpoint), one
    checkpoint of a run, RUN/checkpoints/STEP, or a model of the hub, OWNER/NAME[@REVISION], which
    is downloaded if the cache lacks it.

    Args:
      option: what the path was given by, for errors.
      offline: takes a model of the hub from the cache alone.
      display: shows a download.

    Raises:
      UserError: no such folder or model, no model in it, or no whole checkpoint.
    """
    display = display or Display(quiet=True)
    folder, step = split_step(fetch_model(option, str(path), display, offline=offline))
    if not (model_folder(folder) / "config.json").is_file():
        raise UserError(
            f"{option}: {path} holds no config.json of a model; give a Hugging Face folder or "
            "a run's"
        )
    if model_folder(folder) == folder:
        return PolicyFolder(folder, None)
    steps = stored_steps(folder / "checkpoints")
    if not steps:
        raise UserError(
            f"{option}: {folder} holds no whole checkpoint; let the run reach its first save"
        )
    return PolicyFolder(folder, max(steps) if step is None else step)


def load_policy(
    path: str | Path | PolicyFolder, mesh: Mesh, dtype: Any, display: Display | None = None
) -> tuple[Decoder, Params, Tokenizer]:
    """The model with its weights, sharded on `mesh`, and its tokenizer.

    Args:
      path: see `find_policy`.
      dtype: of the computation. Weights are kept as `Decoder.cast` has them, so that a policy
        samples as it does while it is trained.
      display: shows how far the weights are read.

    Raises:
      UserError: no such model, or files that do not fit it.
    """
    found = path if isinstance(path, PolicyFolder) else find_policy(path)
    tokenizer = found.tokenizer()
    model = Decoder(found.shape(), dtype=dtype)
    record = read_record(found.folder) if found.step is not None else None
    display = display or Display(quiet=True)
    with display.loading("weights") as progress:
        if record is None:
            params = load_weights(found.folder, model, mesh, jnp.float32, found.step, progress)
        else:
            base = load_base(record, model, mesh, frozen_dtypes(model), progress)
            model = dataclasses.replace(model, lora=record.lora)
            params = join(base, restore_adapters(found.folder, model, mesh, found.step))
    return model, jax.jit(model.cast)(params), tokenizer
